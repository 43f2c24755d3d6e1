"""NVFP4 in Triton: one pass over the values, a few thousand for each program. Equal to `reference`, bit for bit.

Two things keep the bits equal: divisions round as IEEE asks (Triton's `/` does not), and E4M3 and E2M1 are rounded by
adding and subtracting 1.5 * 2^23, which rounds a float32 to a whole number, ties to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values that a program takes and its warps, measured on an H100 (benchmarks/kernels.py --tune).
_FAKE_QUANT, _QUANTIZE = (8192, 8), (4096, 2)
_HAS_FMA = not triton.knobs.runtime.interpret  # the interpreter multiplies and adds in two steps
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _whole(x):
    """The nearest whole number of 0 <= x < 2^22, ties to even."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _power(exponent):
    """2^exponent for a normal float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_e4m3(x):
    """The nearest E4M3 value of 2^-9 <= x <= 448."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    return _whole(x * _power(3 - exponent)) * _power(exponent - 3)


@triton.jit
def _divide(x, y, inverse):
    """The quotient as IEEE rounds it, by Markstein: an estimate, whose error a fused multiply-add finds exactly.

    Three instructions instead of some ten, where nothing over- or underflows and `inverse` is 1 / y, rounded.
    """
    rough = x * inverse
    return tl.fma(tl.fma(-rough, y, x), inverse, rough)


@triton.jit
def _inverse(y):
    """1 / y, correctly rounded but for the last bit of a few: one step of Newton from the GPU's own estimate."""
    rough = 1.0 / y
    return tl.fma(rough, tl.fma(-y, rough, 1.0), rough)


@triton.jit
def _ordinary(tensor_scale):
    """Whether no quotient that matters is near the ends of FP32: S within 2^-80 and 2^80."""
    return (tensor_scale > 8.27e-25) & (tensor_scale < 1.2e24)


@triton.jit
def _block_scale(amax, top, quick):
    amax = tl.where(amax > 0, amax, 6.0)
    sixth = tl.div_rn(top, 6.0)
    if quick:  # an amax so small that it underflows is clamped in any case, and so is one over top
        amax = tl.minimum(amax, top * 2)
        one = tl.full(amax.shape, 1.0, tl.float32)
        wanted = _divide(_divide(amax, one * 6.0, one * 0.16666667) * 448.0, one * sixth, one * tl.div_rn(1.0, sixth))
    else:
        wanted = tl.div_rn(tl.div_rn(amax, 6.0) * 448.0, sixth)
    return _round_e4m3(tl.minimum(tl.maximum(wanted, 0.001953125), 448.0))


@triton.jit
def _own_block_scale(amax, top, tensor_scale, quick):
    unit = tensor_scale * 6.0
    if quick:
        one = tl.full(amax.shape, 1.0, tl.float32)
        wanted = _divide(tl.minimum(amax, top * 2), one * unit, one * tl.div_rn(1.0, unit))
    else:
        wanted = tl.div_rn(amax, tl.broadcast_to(unit, amax.shape))
    wanted = tl.where(amax == 0, 1.0, wanted)
    return _round_e4m3(tl.minimum(tl.maximum(wanted, 0.001953125), 448.0))


@triton.jit
def _load(
    x, amax, global_amax, blocks, block: tl.constexpr, many: tl.constexpr, dynamic: tl.constexpr, has_fma: tl.constexpr
):
    """Load a program's blocks: (their indices, which of them exist, offsets of their values, values, s, S, quick)."""
    rows = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    inside = rows < blocks
    offsets = rows[:, None] * block + tl.arange(0, block)[None, :]
    values = tl.load(x + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1) if dynamic else tl.load(amax + rows, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(global_amax)
    top = tl.where(top > 0, top, 2688.0)
    tensor_scale = tl.div_rn(top, 2688.0)
    quick = has_fma & _ordinary(tensor_scale)
    scale = _own_block_scale(largest, top, tensor_scale, quick) if dynamic else _block_scale(largest, top, quick)
    return rows, inside, offsets, values, scale, tensor_scale, quick


@triton.jit
def _round_e2m1(size):
    """The nearest E2M1 value of size >= 0; NaN stays NaN."""
    per_unit = tl.where(size < 2, 2.0, tl.where(size < 4, 1.0, 0.5))
    unit = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))
    rounded = _whole(size * per_unit) * unit
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
    _, inside, offsets, values, scale, tensor_scale, _ = _load(
        x, amax, global_amax, blocks, block, many, dynamic, has_fma
    )
    step = (scale * tensor_scale)[:, None]
    scaled = tl.div_rn(values, tl.broadcast_to(step, values.shape))
    bits = scaled.to(tl.int32, bitcast=True)
    size = _round_e2m1(tl.abs(scaled))
    rounded = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    tl.store(out + offsets, (rounded * step).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _codes(values, scale, tensor_scale, quick):
    """Codes of finite values: a magnitude is a number of halves, ones or twos, found in the last bits of a sum."""
    steps = scale * tensor_scale
    step = tl.broadcast_to(steps[:, None], values.shape)
    sizes = tl.abs(values)
    if quick:
        inverse = tl.broadcast_to(_inverse(steps)[:, None], values.shape)
        ratio = _divide(tl.minimum(sizes, step * 6), step, inverse)
    else:
        ratio = tl.minimum(tl.div_rn(sizes, step), 6.0)
    # 1.5 * 2^23 units, and the codes below: 0 halves, 2 ones, 4 twos. Adding rounds to units, ties to even.
    start = tl.where(ratio < 2, 6291456.0, tl.where(ratio < 4, 12582914.0, 25165832.0))
    size = (start + ratio).to(tl.int32, bitcast=True) & 7
    return size | ((values.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _quantize(
    x,
    amax,
    top,
    out,
    scales,
    blocks,
    block: tl.constexpr,
    many: tl.constexpr,
    dynamic: tl.constexpr,
    has_fma: tl.constexpr,
):
    rows, inside, _, values, scale, tensor_scale, quick = _load(x, amax, top, blocks, block, many, dynamic, has_fma)
    even, odd = tl.split(tl.reshape(_codes(values, scale, tensor_scale, quick), (many, block // 2, 2)))
    at = rows[:, None] * (block // 2) + tl.arange(0, block // 2)[None, :]
    tl.store(out + at, (even | (odd << 4)).to(tl.uint8), mask=inside[:, None])
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - 960  # sign, exponent and three bits, bias 7 instead of 127
    byte = tl.where(scale < 0.015625, (scale * 512.0).to(tl.int32), normal)
    tl.store(scales + rows, byte.to(tl.uint8), mask=inside)


@triton.jit
def _divide_codes(x, steps, out, width: tl.constexpr, many: tl.constexpr):
    rows = tl.program_id(0) * many + tl.arange(0, many)
    at = rows[:, None] * width + tl.arange(0, width)[None, :]
    tl.store(out + at, _codes(tl.load(x + at), tl.load(steps + rows), 1.0, True))


def divide_codes(x: Tensor, steps: Tensor, out: Tensor) -> None:
    """For the tests: codes of x [128 n, 64] / steps [128 n] by the quick division, into out int32."""
    _divide_codes[(len(steps) // 128,)](x, steps, out, x.shape[1], 128, num_warps=8)


@triton.jit
def _powers(exponents, out, count, bias, many: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    e = tl.load(exponents + at, mask=at < count, other=0).to(tl.int32) - bias
    subnormal = tl.where(e == -7, 4, tl.where(e == -8, 2, 1))
    code = tl.where(e >= -6, (e + 7) << 3, subnormal)
    tl.store(out + at, (code * 0x0101).to(tl.int16), mask=at < count)


def powers(exponents: Tensor, bias: int) -> Tensor:
    """E4M3 codes of 2^(byte - bias), each twice: uint8 [..., n] -> uint8 [..., 2n]; the exponents are -9 to 8."""
    exponents = exponents.contiguous()
    out = torch.empty(exponents.shape, dtype=torch.int16, device=exponents.device)
    grid = (triton.cdiv(exponents.numel(), 4096),)
    with torch.cuda.device_of(exponents):
        _powers[grid](exponents, out, exponents.numel(), bias, 4096, num_warps=4)
    return out.view(torch.uint8)


def fits(block: int) -> bool:
    """Whether the kernels take blocks of this size."""
    return 2 <= block <= 1024 and block & (block - 1) == 0


def _grid(blocks: int, block: int, values: int) -> tuple[tuple[int], int]:
    rows = max(1, values // block)
    return (triton.cdiv(blocks, rows),), rows


def fake_quant(x: Tensor, amax: Tensor | None, global_amax: Tensor, out_dtype: torch.dtype, block: int) -> Tensor:
    """See `fp4cast.kernels.static_blockwise_fp4_fake_quant`; amax None: each block's own."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=out_dtype)
    blocks = x.numel() // block
    values, warps = _FAKE_QUANT
    grid, rows = _grid(blocks, block, values)
    given = x if amax is None else amax.reshape(-1).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the thread's current device
        _fake_quant[grid](x, given, global_amax, out, blocks, block, rows, amax is None, _HAS_FMA, num_warps=warps)
    return out


def quantize(x: Tensor, amax: Tensor | None, global_amax: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """See `fp4cast.kernels.quantize_nvfp4`."""
    x = x.contiguous()
    blocks = x.numel() // block
    packed = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // block, dtype=torch.uint8, device=x.device)
    values, warps = _QUANTIZE
    grid, rows = _grid(blocks, block, values)
    given = x if amax is None else amax.reshape(-1).contiguous()
    own = amax is None
    with torch.cuda.device_of(x):
        _quantize[grid](x, given, global_amax, packed, scales, blocks, block, rows, own, _HAS_FMA, num_warps=warps)
    return packed, scales
