"""E8M0 scales of MXFP4 to E4M3 scales of NVFP4, in Triton: two passes over the scales, none over the codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4cast.formats import E8M0_BIAS

_MANY, _WARPS = 4096, 4  # bytes that a program takes at a time
_PROGRAMS = 1024  # at most, of the search for extremes: each leaves two numbers for the CPU


@triton.jit
def _extremes(exponents, lows, highs, count, many: tl.constexpr):
    low, high = tl.full((many,), 255, tl.int32), tl.full((many,), 0, tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * many, count, tl.num_programs(0) * many):
        at = start + tl.arange(0, many)
        read = tl.load(exponents + at, mask=at < count, other=0).to(tl.int32)
        low, high = tl.minimum(low, tl.where(at < count, read, 255)), tl.maximum(high, read)
    tl.store(lows + tl.program_id(0), tl.min(low, axis=0))
    tl.store(highs + tl.program_id(0), tl.max(high, axis=0))


def extremes(exponents: Tensor) -> tuple[int, int]:
    """The smallest and the largest byte. Waits for the device."""
    exponents = exponents.contiguous()
    programs = min(triton.cdiv(exponents.numel(), _MANY), _PROGRAMS)
    found = torch.empty(2, programs, dtype=torch.int32, device=exponents.device)
    with torch.cuda.device_of(exponents):
        _extremes[(programs,)](exponents, found[0], found[1], exponents.numel(), _MANY, num_warps=_WARPS)
    lows, highs = found.cpu()
    return int(lows.min()), int(highs.max())


@triton.jit(do_not_specialize=["bias"])
def _powers(exponents, out, tensor_scale, count, bias, scale, many: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    e = tl.load(exponents + at, mask=at < count, other=0).to(tl.int32) - bias
    subnormal = tl.where(e == -7, 4, tl.where(e == -8, 2, 1))
    code = tl.where(e >= -6, (e + 7) << 3, subnormal)
    tl.store(out + at, (code * 0x0101).to(tl.int16), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(tensor_scale, scale)


def powers(exponents: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes of 2^(byte - 127 - m), each twice: uint8 [..., n] -> uint8 [..., 2n]; and 2^m, float32 [].

    The exponents are -9 to 8.
    """
    exponents = exponents.contiguous()
    out = torch.empty(exponents.shape, dtype=torch.int16, device=exponents.device)
    tensor_scale = torch.empty((), dtype=torch.float32, device=exponents.device)
    grid = (triton.cdiv(exponents.numel(), _MANY),)
    with torch.cuda.device_of(exponents):
        _powers[grid](exponents, out, tensor_scale, exponents.numel(), E8M0_BIAS + m, 2.0**m, _MANY, num_warps=_WARPS)
    return out.view(torch.uint8), tensor_scale
