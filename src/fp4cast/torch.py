"""Cast MXFP4 torch tensors on their own device, a CPU or a GPU: for loaders that want NVFP4 and write no file.

Where no half-block needs a shift, the result holds the given codes, not a copy; only the scales are new.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from fp4cast.casting import one_tensor
from fp4cast.casting.tight_rule import WINDOW, closed_form
from fp4cast.errors import ScaleError, ShapeError
from fp4cast.extras import require
from fp4cast.formats import E8M0_BIAS, E8M0_NAN, MX_BLOCK_BYTES

require("torch", "ptq")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

__all__ = ["Cast", "cast"]


@dataclass(frozen=True)
class Cast:
    """Like `fp4cast.Cast`, in torch tensors on the device of the source.

    Attributes:
        codes: packed uint8 [..., K/2]; the same tensor that was passed in where no code changes.
        block_scales: float8_e4m3fn [..., K/16].
        tensor_scale: S, float32 [].
        exact: see `fp4cast.Cast`.
        shifted: see `fp4cast.Cast`.
        rounded: see `fp4cast.Cast`.
    """

    codes: Tensor
    block_scales: Tensor
    tensor_scale: Tensor
    exact: bool
    shifted: int
    rounded: int


def cast(codes: Tensor, scales: Tensor, inexact: str = "fail") -> Cast:
    """Cast one MXFP4 tensor, as one scale domain.

    Where all exponents span at most 17 binades, this is a reduction and a pass over the scales on their device, with
    one synchronisation between them. Beyond that the codes decide, and the CPU reads them.

    Args:
        codes: packed uint8 [..., K/2], two E2M1 codes a byte, low nibble = even element.
        scales: E8M0 uint8 (or float8_e8m0fnu) [..., K/32], on the same device.
        inexact: "fail", or "nearest" to round what cannot be exact.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together.
        ScaleError: a scale byte of 255.
        InexactError: no tensor scale is exact and `inexact` is "fail".

    >>> import torch
    >>> codes, scales = torch.full((1, 16), 0x72, dtype=torch.uint8), torch.tensor([[120]], dtype=torch.uint8)
    >>> out = cast(codes, scales)
    >>> out.codes is codes, float(out.tensor_scale) == 2.0**-15, out.block_scales.float().tolist()
    (True, True, [[256.0, 256.0]])
    """
    exponents = scales if scales.dtype == torch.uint8 else scales.view(torch.uint8)
    _check(codes, exponents)
    found = torch.empty(2, dtype=torch.uint8, device=exponents.device)
    torch.aminmax(exponents, out=(found[0], found[1]))
    low, high = found.tolist()
    if high == E8M0_NAN:
        raise ScaleError("a scale byte is 255, which is NaN in E8M0; expected 0 to 254")
    if high - low > WINDOW:
        return _slow(codes, exponents, inexact)
    m = closed_form(high - E8M0_BIAS)
    block_scales, tensor_scale = _powers(exponents, m)
    return Cast(codes, block_scales.view(torch.float8_e4m3fn), tensor_scale, True, 0, 0)


def _check(codes: Tensor, exponents: Tensor) -> None:
    for name, tensor in (("codes", codes), ("scales", exponents)):
        if tensor.dtype != torch.uint8:
            raise ShapeError(f"{name}: expected uint8, got {tensor.dtype}")
    if not exponents.numel() or codes.shape != (*exponents.shape[:-1], exponents.shape[-1] * MX_BLOCK_BYTES):
        raise ShapeError(
            f"codes {tuple(codes.shape)} and scales {tuple(exponents.shape)}: expected [..., K/2] and [..., K/32]"
        )
    if codes.device != exponents.device:
        raise ShapeError(f"codes on {codes.device} and scales on {exponents.device}: expected one device")


def _powers(exponents: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes of 2^(k-m) within the window, each twice: uint8 [..., n] -> uint8 [..., 2n]; and 2^m."""
    if exponents.is_cuda and importlib.util.find_spec("triton"):
        from fp4cast.kernels import exponents as kernels

        return kernels.powers(exponents, m)
    e = exponents.contiguous().to(torch.int16) - (E8M0_BIAS + m)
    # 2^e is (e + 7) << 3 from 2^-6 on; below are the subnormal codes 4, 2 and 1.
    code = torch.where(e >= -6, (e + 7) << 3, torch.bitwise_right_shift(4, (-7 - e).clamp(0, 2)))
    return (code * 0x0101).view(torch.uint8), torch.tensor(2.0**m, device=exponents.device)


def _slow(codes: Tensor, exponents: Tensor, inexact: str) -> Cast:
    """Cast on the CPU, which reads the codes."""
    made = one_tensor.cast(codes.cpu().contiguous().numpy(), exponents.cpu().contiguous().numpy(), inexact)
    kept = made.shifted == 0 and made.rounded == 0
    return Cast(
        codes if kept else torch.from_numpy(made.codes).to(codes.device),
        torch.from_numpy(made.block_scales).view(torch.float8_e4m3fn).to(codes.device),
        torch.tensor(made.tensor_scale, device=codes.device),
        made.exact,
        made.shifted,
        made.rounded,
    )
