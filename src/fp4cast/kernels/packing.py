"""Quantize to NVFP4 and pack, in Triton, at the speed of a copy. Equal to `reference`, bit for bit.

What bounds it is instructions: in the time that the bytes of a BF16 value take, an H100 starts some 25. This takes 18.
A thread owns two blocks of 16 from the loads, 16 bytes each, to the stores, 8 bytes each, so nothing crosses threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4cast.kernels.arithmetic import (
    HAS_FMA,
    bits_of,
    block_scale,
    e4m3_code,
    float_of,
    invert,
    moved,
    quotient,
    tensor_scale,
)

_BLOCK = 16
_WARPS = 4  # each of their 128 threads takes two blocks, both loaded before the first is used
_KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@triton.jit
def _four(words, inside, many: tl.constexpr):
    """Load 16 bytes a row, as four columns."""
    loaded = tl.load(words + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0).to(tl.uint32, bitcast=True)
    even, odd = tl.split(tl.reshape(loaded, (many, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _words(at, inside, many: tl.constexpr, kind: tl.constexpr):
    """Load half a block a row: eight values in words."""
    words = _four(at, inside, many)
    if kind == "f32":
        words = words + _four(at + 4, inside, many)
    return words


@triton.jit
def _value(words, i: tl.constexpr, power, kind: tl.constexpr):
    """The i-th value as float32, times power."""
    if kind == "f32":
        value = float_of(words[i])
    elif kind == "bf16":
        value = float_of(words[i // 2] & 0xFFFF0000 if i % 2 else words[i // 2] << 16)
    else:
        half = words[i // 2] >> 16 if i % 2 else words[i // 2]
        value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return value * power


@triton.jit
def _values(words, power, kind: tl.constexpr):
    """The eight values as float32, times power."""
    values = (_value(words, 0, power, kind),)
    for i in tl.static_range(1, 8):
        values = values + (_value(words, i, power, kind),)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def _largest(low, high):
    largest = tl.maximum(tl.abs(low[0]), tl.abs(high[0]))
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, tl.maximum(tl.abs(low[i]), tl.abs(high[i])))
    return largest


@triton.jit
def _size(sizes, step, inverse, has_fma: tl.constexpr):
    """Codes of sizes / step, at most 7, in the last three bits; what is above them means nothing.

    `binade` is 8, 16 or 32: for ratios that count in halves, ones or twos. 12.5 puts the bounds at 1.9 and 4.4, where
    the steps on both sides give the same value. 2^19 times that, plus the ratio, rounds to a whole number of steps,
    ties to even; its exponent says how many codes lie below: twice 0, 1 or 2.
    """
    ratio = quotient(tl.minimum(sizes, step * 6), step, inverse, has_fma)
    binade = float_of(bits_of(tl.fma(ratio, ratio, 12.5)) & 0x7F800000)
    total = bits_of(tl.fma(binade, 524288.375, ratio))  # (2^22 + 3) / 8: the 3 makes the first code 0
    return total + (total >> 22)


@triton.jit
def _word(values, step, inverse, has_fma: tl.constexpr):
    """Eight codes, the first in the lowest four bits. A shift that fills a word from its end is one instruction."""
    sizes = _size(tl.abs(values[0]), step, inverse, has_fma) << 28
    signs = bits_of(values[7]) >> 28
    for i in tl.static_range(1, 8):
        sizes = (sizes >> 4) | (_size(tl.abs(values[i]), step, inverse, has_fma) << 28)
        signs = (signs << 4) | (bits_of(values[7 - i]) >> 28)
    return (sizes & 0x77777777) | (signs & 0x88888888)


@triton.jit
def _store(
    rows,
    inside,
    low,
    high,
    largest,
    domain,
    packed,
    scales,
    kind: tl.constexpr,
    dynamic: tl.constexpr,
    has_fma: tl.constexpr,
):
    """Quantize a block a row, of which low and high are the halves."""
    top, tensor, power = domain
    low, high = _values(low, power, kind), _values(high, power, kind)
    if dynamic:
        largest = _largest(low, high)
    scale = block_scale(largest, top, tensor, power, dynamic, has_fma)
    step = moved(scale * tensor, power)
    inverse = invert(step)
    first, second = _word(low, step, inverse, has_fma), _word(high, step, inverse, has_fma)
    both = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
    tl.store(packed + rows, both.to(tl.int64, bitcast=True), mask=inside)
    tl.store(scales + rows, e4m3_code(scale), mask=inside)


@triton.jit
def _quantize(
    words,
    amax,
    global_amax,
    packed,
    scales,
    blocks,
    many: tl.constexpr,
    kind: tl.constexpr,
    dynamic: tl.constexpr,
    has_fma: tl.constexpr,
):
    width: tl.constexpr = 16 if kind == "f32" else 8
    rows = tl.program_id(0).to(tl.int64) * (2 * many) + tl.arange(0, many)
    also = rows + many
    at, at2 = words + rows[:, None] * width, words + also[:, None] * width
    # All loads come before anything that waits for one.
    low, high = _words(at, rows < blocks, many, kind), _words(at + width // 2, rows < blocks, many, kind)
    low2, high2 = _words(at2, also < blocks, many, kind), _words(at2 + width // 2, also < blocks, many, kind)
    if dynamic:
        largest, largest2 = 0.0, 0.0
    else:
        largest = tl.load(amax + rows, mask=rows < blocks, other=0.0).to(tl.float32)
        largest2 = tl.load(amax + also, mask=also < blocks, other=0.0).to(tl.float32)
    domain = tensor_scale(global_amax)
    _store(rows, rows < blocks, low, high, largest, domain, packed, scales, kind, dynamic, has_fma)
    _store(also, also < blocks, low2, high2, largest2, domain, packed, scales, kind, dynamic, has_fma)


def quantize(x: Tensor, amax: Tensor | None, global_amax: Tensor) -> tuple[Tensor, Tensor]:
    """See `fp4cast.kernels.quantize_nvfp4`, in blocks of 16."""
    x = (x if x.dtype in _KINDS else x.float()).contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # as the loads of 16 bytes need
    blocks, many = x.numel() // _BLOCK, 32 * _WARPS
    packed = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // _BLOCK, dtype=torch.uint8, device=x.device)
    words, given = x.view(-1).view(torch.int32), scales if amax is None else amax.reshape(-1).contiguous()
    out = packed.view(-1).view(torch.int64)
    grid = (triton.cdiv(blocks, 2 * many),)
    with torch.cuda.device_of(x):  # Triton launches on the thread's current device
        _quantize[grid](
            words,
            given,
            global_amax,
            out,
            scales,
            blocks,
            many,
            _KINDS[x.dtype],
            amax is None,
            HAS_FMA,
            num_warps=_WARPS,
        )
    return packed, scales


@triton.jit
def _divide_codes(x, steps, out, width: tl.constexpr, many: tl.constexpr):
    rows = tl.program_id(0) * many + tl.arange(0, many)
    at = rows[:, None] * width + tl.arange(0, width)[None, :]
    step = tl.broadcast_to(tl.load(steps + rows)[:, None], at.shape)
    tl.store(out + at, (_size(tl.load(x + at), step, invert(step), True) & 7).to(tl.int32))


def divide_codes(x: Tensor, steps: Tensor, out: Tensor) -> None:
    """For the tests: codes of x [128 n, 64] / steps [128 n] by the quick division, into out int32."""
    _divide_codes[(len(steps) // 128,)](x, steps, out, x.shape[1], 128, num_warps=8)
