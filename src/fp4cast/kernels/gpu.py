"""NVFP4 in Triton, equal to `reference`, bit for bit: fake quantization, in one pass over the values. See `packing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4cast.formats import NV_BLOCK
from fp4cast.kernels import packing, reference
from fp4cast.kernels.arithmetic import HAS_FMA, block_scale, tensor_scale, whole

_VALUES, _WARPS = 8192, 8  # that a program takes, measured on an H100 (benchmarks/kernels.py --tune)


@triton.jit
def _round_e2m1(size):
    """The nearest E2M1 value of size >= 0; NaN stays NaN."""
    per_unit = tl.where(size < 2, 2.0, tl.where(size < 4, 1.0, 0.5))
    unit = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))
    rounded = whole(size * per_unit) * unit
    return tl.where(rounded > 6.0, 6.0, rounded)


@triton.jit
def _fake_quant(
    x,
    amax,
    global_amax,
    out,
    blocks,
    block: tl.constexpr,
    many: tl.constexpr,
    dynamic: tl.constexpr,
    has_fma: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    inside = rows < blocks
    offsets = rows[:, None] * block + tl.arange(0, block)[None, :]
    values = tl.load(x + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1) if dynamic else tl.load(amax + rows, mask=inside, other=0.0).to(tl.float32)
    top, tensor, power = tensor_scale(global_amax)  # after all loads, since it waits for one
    if dynamic:
        largest *= power
    step = (block_scale(largest, top, tensor, power, dynamic, has_fma) * tensor)[:, None]
    scaled = tl.div_rn(values, tl.broadcast_to(step, values.shape))
    bits = scaled.to(tl.int32, bitcast=True)
    size = _round_e2m1(tl.abs(scaled))
    rounded = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    tl.store(out + offsets, (rounded * step).to(out.dtype.element_ty), mask=inside[:, None])


def fits(block: int) -> bool:
    """Whether the kernels take blocks of this size."""
    return 2 <= block <= 1024 and block & (block - 1) == 0


def fake_quant(x: Tensor, amax: Tensor | None, global_amax: Tensor, out_dtype: torch.dtype, block: int) -> Tensor:
    """See `fp4cast.kernels.static_blockwise_fp4_fake_quant`; amax None: each block's own."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=out_dtype)
    blocks, rows = x.numel() // block, max(1, _VALUES // block)
    given = x if amax is None else amax.reshape(-1).contiguous()
    grid = (triton.cdiv(blocks, rows),)
    with torch.cuda.device_of(x):  # Triton launches on the thread's current device
        _fake_quant[grid](x, given, global_amax, out, blocks, block, rows, amax is None, HAS_FMA, num_warps=_WARPS)
    return out


def quantize(x: Tensor, amax: Tensor | None, global_amax: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """See `fp4cast.kernels.quantize_nvfp4`. Blocks of another size than NVFP4's are torch's work."""
    if block == NV_BLOCK:
        return packing.quantize(x, amax, global_amax)
    return reference.quantize(x, amax, global_amax, block)
