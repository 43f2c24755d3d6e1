"""Casting tensors of torch in memory: the same as `fp4cast.cast`, on whatever device."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fp4cast
from fp4cast.errors import InexactError, ScaleError, ShapeError
from fp4cast.torch import cast

pytestmark = pytest.mark.oracle


def check(codes, scales, device="cpu", inexact="fail"):
    on = codes.to(device), scales.to(device)
    ours, theirs = cast(*on, inexact), fp4cast.cast(codes.numpy(), scales.numpy(), inexact)
    assert np.array_equal(ours.codes.cpu().numpy(), theirs.codes)
    assert np.array_equal(ours.block_scales.view(torch.uint8).cpu().numpy(), theirs.block_scales)
    assert float(ours.tensor_scale) == theirs.tensor_scale and ours.tensor_scale.dtype == torch.float32
    assert (ours.exact, ours.shifted, ours.rounded) == (theirs.exact, theirs.shifted, theirs.rounded)
    assert ours.codes.device == on[0].device == ours.block_scales.device == ours.tensor_scale.device
    if ours.exact and not ours.shifted:
        assert ours.codes is on[0]


def sweep(device):
    """Every pair of smallest and largest scale byte within the window, and a few beyond."""
    generator = torch.Generator().manual_seed(0)
    for high in range(255):
        for spread in (0, 1, 9, 16, 17):
            low = max(high - spread, 0)
            scales = torch.randint(low, high + 1, (2, 3, 8), generator=generator).to(torch.uint8)
            scales[0, 0, 0], scales[1, 2, 7] = low, high
            check(torch.randint(0, 256, (2, 3, 128), generator=generator).to(torch.uint8), scales, device)
    codes = torch.randint(0, 256, (4, 64), generator=generator).to(torch.uint8)
    scales = torch.tensor([[120, 102, 119, 118]] * 4, dtype=torch.uint8)
    poor = codes.clone()
    poor[:, 16:32] = 0x64  # 2 and 4
    check(poor, scales, device)
    check(codes, scales, device, "nearest")
    with pytest.raises(InexactError):
        cast(codes.to(device), scales.to(device))


def test_it_is_the_cast_of_numpy():
    sweep("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_too():
    sweep("cuda")


def test_scales_as_float8_and_not_contiguous():
    codes = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    scales = torch.randint(110, 125, (4, 8), dtype=torch.uint8).T
    out = cast(codes, scales)
    assert torch.equal(out.block_scales.float(), cast(codes, scales.contiguous()).block_scales.float())
    as_float = cast(codes, scales.contiguous().view(torch.float8_e8m0fnu))
    assert torch.equal(as_float.block_scales.float(), out.block_scales.float())


def test_what_does_not_fit_is_refused():
    codes, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.full((2, 2), 100, dtype=torch.uint8)
    for wrong in ((codes[:, :16], scales), (codes, scales[:1]), (codes[:, :0], scales[:, :0])):
        with pytest.raises(ShapeError, match="expected"):
            cast(*wrong)
    with pytest.raises(ShapeError, match=r"codes: expected uint8, got torch\.int32"):
        cast(codes.int(), scales)
    with pytest.raises(ShapeError, match="expected one device"):
        cast(codes, scales.to("meta"))
    scales[1, 1] = 255
    with pytest.raises(ScaleError, match="255"):
        cast(codes, scales)
