"""NVFP4 kernels: torch against the formats, Triton (in its interpreter, and on a GPU) against torch, bit for bit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fp4cast.errors import ShapeError
from fp4cast.formats import nvfp4_values
from fp4cast.kernels import (
    dynamic_fp4_fake_quant,
    quantize_nvfp4,
    reference,
    static_blockwise_fp4_fake_quant,
)

pytestmark = pytest.mark.oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def every(dtype):
    """Every value of a 16-bit type, infinities and NaN among them."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(a, b):
    """Equal, signs of zero included; NaN is NaN."""
    nan = a.isnan() & b.isnan()
    return bool(((a == b) & (a.signbit() == b.signbit()) | nan).all())


def slow_fake_quant(x, amax, global_amax):
    """The definition in FP32, one value at a time, rounding by a table."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    top = np.float32(global_amax) if global_amax > 0 else np.float32(2688)
    wanted = np.float32(amax if amax > 0 else 6) / np.float32(6) * np.float32(448) / (top / np.float32(6))
    scale = torch.tensor(min(max(wanted, np.float32(2**-9)), np.float32(448))).to(torch.float8_e4m3fn).float().item()
    step = np.float32(scale) * (top / np.float32(2688))
    with np.errstate(over="ignore"):
        ratio = np.float64(np.abs(np.float32(x)) / step)
    distance = np.abs(table.astype(np.float64) - min(ratio, 100))
    best = min(range(8), key=lambda i: (distance[i], i % 2))
    return float(np.copysign(table[best] * step, np.float32(x)))


def test_the_reference_is_the_definition():
    rng = np.random.default_rng(0)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7, -0.0, 0.0, -0.1, 2, 4, 1e30, -5], np.float32)
    for amax, top in ((6, 2688), (3, 2688), (0, 5), (1, 0), (7.3, 11), (1e-30, 1e-28), (1e5, 1e5), (1e-9, 1)):
        for scale in (1.0, 0.37, 2.0**-9 * top / 2688 if top else 1.0):
            x = np.concatenate([ties * scale, (rng.standard_normal(16) * scale)]).astype(np.float32)
            out = static_blockwise_fp4_fake_quant(
                torch.tensor(x), torch.full((2,), float(amax)), torch.tensor(float(top))
            )
            expected = [slow_fake_quant(each, amax, top) for each in x]
            assert same(out.double(), torch.tensor(expected, dtype=torch.float64)), (amax, top, scale)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_infinity_and_nan(dtype):
    x = every(dtype)
    out = static_blockwise_fp4_fake_quant(x, torch.full((4096,), 6.0), torch.tensor(2688.0))
    assert out.dtype == dtype
    assert torch.equal(out.isnan(), x.isnan())
    assert out[~x.isnan()].abs().max() == 6
    assert set(out[~x.isnan()].abs().unique().tolist()) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}


@pytest.mark.parametrize("shape", [(32,), (3, 48), (2, 3, 16), (2, 2, 2, 64), (1, 1, 1, 1, 16)])
def test_any_rank(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    amax = x.reshape(-1, 16).abs().amax(1)
    out = static_blockwise_fp4_fake_quant(x, amax)
    assert out.shape == x.shape
    assert torch.equal(out, dynamic_fp4_fake_quant(x))
    assert torch.equal(out.reshape(-1), static_blockwise_fp4_fake_quant(x.reshape(-1), amax[:, None], amax.max()))
    codes, scales, tensor_scale = quantize_nvfp4(x)
    assert codes.shape == (*shape[:-1], shape[-1] // 2) and scales.shape == (*shape[:-1], shape[-1] // 16)
    stored = nvfp4_values(codes.numpy(), scales.numpy(), float(tensor_scale))
    # An engine's product of code, block and tensor scale is rounded elsewhere than s * S here.
    assert np.allclose(stored, out.numpy(), rtol=3e-7, atol=0)


def test_blocks_of_other_sizes():
    x = torch.randn(4, 96)
    for block in (8, 32, 48, 96):
        amax = x.reshape(-1, block).abs().amax(1)
        assert torch.equal(static_blockwise_fp4_fake_quant(x, amax), dynamic_fp4_fake_quant(x, block=block))


def test_bad_shapes_are_refused():
    x = torch.randn(4, 48)
    with pytest.raises(ShapeError, match="amax is empty"):
        static_blockwise_fp4_fake_quant(x, torch.empty(0))
    for many in (5, 24 * 16, 2):
        with pytest.raises(ShapeError, match=r"amax \(\d+,\) does not cut the last axis of x \(4, 48\)"):
            static_blockwise_fp4_fake_quant(x, torch.ones(many))
    with pytest.raises(ShapeError, match=r"global_amax \(2,\): expected one number"):
        static_blockwise_fp4_fake_quant(x, torch.ones(12), torch.ones(2))
    for call in (dynamic_fp4_fake_quant, quantize_nvfp4):
        for wrong in (torch.randn(4, 40), torch.tensor(1.0)):
            with pytest.raises(ShapeError, match="whole blocks of 16"):
                call(wrong)
    with pytest.raises(ShapeError, match="does not cut"):
        static_blockwise_fp4_fake_quant(torch.tensor(1.0), torch.ones(1))
    with pytest.raises(ShapeError, match="expected 12, one for each block of 16"):
        quantize_nvfp4(x, amax=torch.ones(6))


def test_a_cast_block_keeps_its_codes_and_the_sign_of_zero():
    """The closed form: amax 6 * 2^k and global amax 6 * 448 * 2^m give back MXFP4's codes."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(-1, 8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    unpacked = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(len(codes), 16)
    for k in range(-17, 1):
        x = (values[unpacked.long()] * 2.0**k).to(torch.bfloat16)
        packed, scales, tensor_scale = quantize_nvfp4(
            x, torch.tensor(6 * 448 * 2.0**-8), torch.full((len(x),), 6 * 2.0**k)
        )
        assert torch.equal(packed, codes)
        assert (scales.view(torch.float8_e4m3fn).float() == 2.0 ** (k + 8)).all() and tensor_scale == 2.0**-8


def equal_packed(x, amax, top):
    """Whether both quantize to the same bytes."""
    from fp4cast.kernels import gpu

    ours, theirs = (each.quantize(x, amax, top, 16) for each in (gpu, reference))
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_triton(device):
    """Every 16-bit value and many of 32 bits under scales of all kinds, torch against Triton."""
    from fp4cast.kernels import gpu

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 15,), generator=generator).to(torch.int32)
    some = torch.rand(4096, generator=generator)
    wild = torch.exp2(some * 240 - 130)
    full = ((6.0, 2688.0), (1e-3, 1.7), (0.0, 3.0), (1e-41, 1e-38), (2e-42, 1e-44), (2e-24, 2e-23), (3e38, 3e38))
    sets = [(torch.full((4096,), amax), top) for amax, top in full]
    sets += [(some, 0.0), (some, 1.0), (wild, float(wild.max())), (wild * 2.0**-20, 1e-30)]
    for x in (every(torch.bfloat16), every(torch.float16), words.view(torch.float32).repeat(2)):
        # 0 / 0, where S underflows, has no code. It is left out.
        finite = torch.where(x.isfinite() & (x != 0), x, torch.ones_like(x)).reshape(64, -1).to(device)
        # Triton's interpreter loses subnormal BF16 values and truncates to BF16: conversions are checked on the GPU.
        x = x.to(device) if device != "cpu" else x.float()
        for amax, top in sets:
            amax, top = amax.to(device), torch.tensor(top, device=device)
            for out_dtype in (torch.float32,) if device == "cpu" else DTYPES:
                ours, theirs = (each.fake_quant(x, amax, top, out_dtype, 16) for each in (gpu, reference))
                assert same(ours, theirs), (x.dtype, float(top), out_dtype)
            for given in (amax, None):
                assert equal_packed(finite, given, top), (x.dtype, float(top))
            wide = finite if device != "cpu" else finite.float()
            a, b = (each.fake_quant(wide, None, top, torch.float32, 16) for each in (gpu, reference))
            assert same(a, b), (x.dtype, float(top))
    for block in (2, 8, 32, 128):
        x = torch.randn(3, 5, 128, generator=generator).to(device)
        top = x.abs().amax()
        assert same(gpu.fake_quant(x, None, top, x.dtype, block), reference.fake_quant(x, None, top, x.dtype, block))


def check_shapes(device):
    """Ranks 1 to 4 and odd sizes, around those of one program (256 blocks), however the values lie in memory."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((16,), (1, 16), (255, 16), (257, 16), (3, 5, 48), (1, 3, 1, 16), (2, 3, 7, 80), (4, 1040))
    dtypes = (*DTYPES, torch.float64)
    for i, shape in enumerate(shapes):
        for dtype in dtypes if device != "cpu" else (dtypes[i % 4],):  # the interpreter is slow
            x = torch.randn(shape, generator=generator).to(device, dtype)
            x.view(-1)[:16] = 0
            amax = torch.rand(x.numel() // 16, generator=generator).to(device, torch.bfloat16)
            top = x.abs().amax().float()
            shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].copy_(x.view(-1)).view(shape)
            turned = torch.randn(shape[::-1], generator=generator).to(device, dtype).permute(*range(len(shape))[::-1])
            for each in (x, shifted, turned):
                assert equal_packed(each, None, top) and equal_packed(each, amax, top), (shape, dtype)


def check_exponents(device):
    """Scales of MXFP4 to those of NVFP4, for sizes of one program, of part of one, and of more."""
    from fp4cast.kernels import exponents
    from fp4cast.torch import _powers

    for many in (1, 4095, 4096, 4097, 50001):
        for m in (-126, -8, 0, 118):
            window = (torch.arange(many) % 18 + (127 + m - 9)).clamp(min=0).to(torch.uint8)
            codes, tensor_scale = exponents.powers(window.to(device), m)
            assert torch.equal(codes.cpu(), _powers(window, m)[0]) and float(tensor_scale) == 2.0**m


def check_large_programs():
    """In the interpreter, which takes as long for a program of 4096 blocks as for one of 256."""
    from fp4cast.kernels import packing

    packing._WARPS = 64
    check_triton("cpu")


@pytest.mark.parametrize("call", ["check_large_programs()", "check_shapes('cpu')", "check_exponents('cpu')"])
def test_triton_in_its_interpreter_is_torch(call):
    pytest.importorskip("triton")
    code = f"import sys; sys.path.insert(0, 'tests/kernels'); import test_kernels; test_kernels.{call}"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_every_tie(part):
    """The fast division at the ties of E2M1: every significand of the step, the floats next to each tie."""
    from fp4cast.kernels import packing

    steps = (torch.arange(part << 19, (part + 1) << 19, device="cuda", dtype=torch.int32) + 0x3F800000).view(
        torch.float32
    )
    ties = steps[:, None] * torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device="cuda")
    near = ties.view(torch.int32)[:, :, None] + torch.arange(-4, 5, device="cuda", dtype=torch.int32)
    x = torch.cat([near.view(torch.float32).reshape(len(steps), -1), steps[:, None]], dim=1)  # 64 values a step
    found = torch.empty_like(x, dtype=torch.int32)
    packing.divide_codes(x, steps, found)
    expected = reference.round_e2m1(x / steps[:, None])
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device="cuda")
    assert torch.equal(values[found.long()], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_fast_division_is_right_at_every_tie():
    for part in range(16):
        check_every_tie(part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("top", [2688.0, 1.0, 0.37, 5e-9, 1.7e6])
def test_block_scales_of_every_amax(top):
    """Every significand, 18 binades of them: those under which scales are neither clamped nor saturated, and more."""
    from fp4cast.kernels import gpu

    top = torch.tensor(top, device="cuda")
    ones = torch.ones(1 << 23, 16, device="cuda", dtype=torch.bfloat16)
    for binade in range(-18, 2):
        first = ((top * 2.0**binade).view(torch.int32) >> 23) << 23
        amax = (torch.arange(1 << 23, device="cuda", dtype=torch.int32) + first).view(torch.float32)
        scales = gpu.quantize(ones, amax, top, 16)[1]
        assert torch.equal(scales.reshape(-1), reference.block_scales(amax, top).view(torch.uint8))
        values = torch.cat([(amax / 2)[:, None].expand(-1, 15), -amax[:, None]], dim=1)
        own = gpu.quantize(values, None, top, 16)[1]
        assert torch.equal(own.reshape(-1), reference.own_block_scales(amax, top).view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two CUDA devices")
def test_a_tensor_on_another_gpu_than_the_current_one():
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    expected = quantize_nvfp4(x)
    with ThreadPoolExecutor(2) as threads:  # the current device is a thread's own
        for codes, scales, _ in threads.map(lambda _: quantize_nvfp4(x.to("cuda:1")), range(4)):
            assert torch.equal(codes.cpu(), expected[0]) and torch.equal(scales.cpu(), expected[1])
    assert torch.equal(dynamic_fp4_fake_quant(x.to("cuda:1")).cpu(), dynamic_fp4_fake_quant(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", [check_triton, check_shapes, check_exponents])
def test_triton_on_a_gpu_is_torch(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_and_a_cpu_agree():
    x = torch.randn(2, 3, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(dynamic_fp4_fake_quant(x).cpu(), dynamic_fp4_fake_quant(x.cpu()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_two_to_the_31_values():
    x = torch.randn((1 << 27) + 3, 16, device="cuda", dtype=torch.bfloat16)
    amax, top, end = x[:, 0].abs(), torch.tensor(4.0, device="cuda"), slice(-1000, None)
    for given, last in ((amax, amax[end]), (None, None)):
        codes, scales, _ = quantize_nvfp4(x, top, given)
        expected = reference.quantize(x[end], last, top, 16)
        assert torch.equal(codes[end], expected[0]) and torch.equal(scales[end], expected[1])
