"""E8M0 scales of MXFP4 to E4M3 scales of NVFP4, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4cast.formats import E8M0_BIAS

_MANY, _WARPS = 4096, 4  # bytes that a program takes


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
