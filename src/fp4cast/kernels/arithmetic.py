"""Arithmetic of the Triton kernels: quotients and E4M3 scales with the bits that `reference` gives them.

Two things keep the bits equal: divisions round as IEEE asks (Triton's `/` does not), and E4M3 is rounded by adding and
subtracting 1.5 * 2^23, which rounds a float32 to a whole number, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

HAS_FMA = not triton.knobs.runtime.interpret  # the interpreter multiplies and adds in two steps
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def whole(x):
    """The nearest whole number of 0 <= x < 2^22, ties to even."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def bits_of(x):
    """The bits of a float32, as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power(exponent):
    """2^exponent for a normal float32."""
    return float_of((exponent + 127) << 23)


@triton.jit
def _round_e4m3(x):
    """The nearest E4M3 value of 2^-9 <= x <= 448."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    return whole(x * _power(3 - exponent)) * _power(exponent - 3)


@triton.jit
def e4m3_code(value):
    """The byte of a positive E4M3 value."""
    normal = (bits_of(value) >> 20) - 960  # sign, exponent and three bits, bias 7 instead of 127
    return tl.where(value < 0.015625, (value * 512.0).to(tl.uint32), normal).to(tl.uint8)


@triton.jit
def quotient(x, y, inverse, has_fma: tl.constexpr):
    """Divide x by y as IEEE rounds it, by Markstein: an estimate, whose error a fused multiply-add finds exactly.

    Three instructions instead of some ten, where nothing over- or underflows and `inverse` is 1 / y, rounded.
    """
    if has_fma:
        rough = x * inverse
        exact = tl.fma(tl.fma(rough, -y, x), inverse, rough)
    else:
        exact = tl.div_rn(x, y)
    return exact


@triton.jit
def invert(y):
    """1 / y, correctly rounded but for the last bit of a few: one step of Newton from the GPU's own estimate."""
    rough = 1.0 / y
    return tl.fma(rough, tl.fma(rough, -y, 1.0), rough)


@triton.jit
def tensor_scale(global_amax):
    """The global amax, the tensor scale S, and the power of two that moves values and steps away from FP32's lower end.

    Quotients stay the same, and have room for the error that `quotient` computes, down to 2^-48 of the value.
    """
    top = tl.load(global_amax)
    top = tl.where(top > 0, top, 2688.0)
    scale = tl.div_rn(top, 2688.0)
    return top, scale, tl.where(scale < 8.27e-25, 18446744073709551616.0, 1.0)  # 2^64, if S < 2^-80


@triton.jit
def moved(y, power):
    """A divisor, moved. One that underflowed to 0 becomes so small that every quotient is too large, as if infinite."""
    return tl.maximum(y * power, 7.888609052210118e-31)


@triton.jit
def block_scale(largest, top, scale, power, dynamic: tl.constexpr, has_fma: tl.constexpr):
    """E4M3 scales of given amax, as float32; dynamic: of the blocks' own, which were moved."""
    if dynamic:
        part, unit = largest, scale * 6.0
    else:
        six = tl.full(largest.shape, 6.0, tl.float32)
        part, unit = tl.div_rn(tl.where(largest > 0, largest, six), six) * 448.0 * power, tl.div_rn(top, 6.0)
    unit = moved(unit, power)
    inverse = tl.broadcast_to(tl.div_rn(1.0, unit), largest.shape)
    unit = tl.broadcast_to(unit, largest.shape)
    wanted = quotient(tl.minimum(part, unit * 512.0), unit, inverse, has_fma)
    if dynamic:
        wanted = tl.where(largest == 0, 1.0, wanted)
    # In this order: infinity by `unit` is NaN, of which the minimum is 448.
    return _round_e4m3(tl.maximum(tl.minimum(wanted, 448.0), 0.001953125))
