"""The number formats, as declared values, and the slow decode that is their specification.

A *code* is a bit pattern, a *value* is a number. `Format.decode` is the readable truth; `Format.values` tabulates it
once for the numpy functions below, which `verify` and the tests decode with. Everything is exact in float64.

Sources: OCP Microscaling Formats (MX) v1.0 (E2M1, E8M0, blocks of 32), OCP 8-bit Floating Point v1.0 (E4M3),
and NVIDIA's NVFP4 (E2M1 codes, E4M3 block scales for 16 elements, one FP32 tensor scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from fp4cast.errors import UsageError

Bytes = npt.NDArray[np.uint8]
Float64s = npt.NDArray[np.float64]

MX_BLOCK = 32  # elements that share an E8M0 scale
NV_BLOCK = 16  # elements that share an E4M3 scale: half of an MX block
MX_BLOCK_BYTES, NV_BLOCK_BYTES = MX_BLOCK // 2, NV_BLOCK // 2  # of packed codes

Activations = Literal["w4a16", "w4a4"]  # 4-bit weights, and activations of 16 or of 4 bits
KvCache = Literal["none", "fp8", "fp8_cast"]  # of engines: their own, or FP8 with scales that are calibrated, or 1
Fp8 = Literal["none", "attention"]  # the other weights that become FP8
Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of at most eight bits without infinities.

    Attributes:
        name: the usual name.
        sign_bits: 1, or 0 for an unsigned format.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: subtracted from the exponent field.
        subnormals: whether exponent field 0 means "no hidden one"; E8M0 has no such codes.
        nans: the codes that are NaN.
    """

    name: str
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    subnormals: bool = True
    nans: frozenset[int] = frozenset()

    @property
    def codes(self) -> int:
        """The number of codes."""
        return 1 << (self.sign_bits + self.exponent_bits + self.mantissa_bits)

    def decode(self, code: int) -> float:
        """The value of one code: the specification that all fast code must equal."""
        if not 0 <= code < self.codes:
            raise ValueError(f"{self.name} has codes 0 to {self.codes - 1}, got {code}")
        if code in self.nans:
            return float("nan")
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        negative = self.sign_bits and code >> (self.exponent_bits + self.mantissa_bits)
        subnormal = self.subnormals and exponent == 0
        significand = mantissa if subnormal else mantissa + (1 << self.mantissa_bits)
        power = max(exponent, 1 if self.subnormals else 0) - self.bias - self.mantissa_bits
        value = float(significand) * 2.0**power
        return -value if negative else value

    @cached_property
    def values(self) -> Float64s:
        """float64 [codes]: `decode` of every code, read-only."""
        table = np.array([self.decode(code) for code in range(self.codes)])
        table.setflags(write=False)
        return table


E2M1 = Format("E2M1", sign_bits=1, exponent_bits=2, mantissa_bits=1, bias=1)
E4M3 = Format("E4M3", sign_bits=1, exponent_bits=4, mantissa_bits=3, bias=7, nans=frozenset({0x7F, 0xFF}))
E8M0 = Format("E8M0", sign_bits=0, exponent_bits=8, mantissa_bits=0, bias=127, subnormals=False, nans=frozenset({0xFF}))

E4M3_MAX = 448.0
TENSOR_TOP = 6 * E4M3_MAX  # the largest magnitude under a tensor scale of 1: amax = TENSOR_TOP * S
E4M3_TOP = 0x7E  # the code of 448; above it come NaN and negative numbers
E8M0_BIAS = E8M0.bias
E4M3_TOP = 0x7E  # the code of 448; above it come NaN and negative numbers
E8M0_NAN = 0xFF


def unpack(packed: Bytes) -> Bytes:
    """Codes of packed bytes: uint8 [..., n] -> uint8 [..., 2n], low nibble first."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1], 2), np.uint8)
    np.bitwise_and(packed, 0xF, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: Bytes) -> Bytes:
    """The inverse of `unpack`: uint8 [..., 2n] with codes 0 to 15 -> uint8 [..., n]."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)), np.uint8)


def _scaled(packed: Bytes, scales: Float64s, block: int) -> Float64s:
    values = E2M1.values[unpack(packed)].reshape(*scales.shape, block)
    return (values * scales[..., None]).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def float_values(data: Bytes, dtype: str) -> Float64s:
    """Float64 [n] of the bytes of unquantized weights, uint8 [n * width], by their dtype in safetensors."""
    with np.errstate(invalid="ignore"):  # signalling NaN are NaN, too
        if dtype == "BF16":
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return data.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def mxfp4_values(packed: Bytes, scales: Bytes, bias: int = E8M0_BIAS) -> Float64s:
    """Values of an MXFP4 tensor.

    Args:
        packed: uint8 [..., K/2], two codes a byte, low nibble = even element.
        scales: uint8 [..., K/32], E8M0 codes.
        bias: the exponent bias that the scales were written with (127 in the standard).

    Returns:
        float64 [..., K], exact; blocks under a NaN scale are NaN.
    """
    return _scaled(packed, E8M0.values[scales] * 2.0 ** (E8M0_BIAS - bias), MX_BLOCK)


def nvfp4_values(packed: Bytes, block_scales: Bytes, tensor_scale: float) -> Float64s:
    """Values of an NVFP4 tensor.

    Args:
        packed: uint8 [..., K/2], two codes a byte, low nibble = even element.
        block_scales: uint8 [..., K/16], E4M3 codes.
        tensor_scale: the FP32 multiplier of the whole tensor.

    Returns:
        float64 [..., K]; the product of 2, 4 and 24 significant bits is exact in float64.
    """
    return _scaled(packed, E4M3.values[block_scales] * tensor_scale, NV_BLOCK)


def usable_scale(value: float) -> bool:
    """Whether a stored scale is a positive normal FP32 number: a GPU flushes subnormal ones to zero."""
    return math.isfinite(value) and value >= float(np.finfo(np.float32).tiny)


def one_of(option: str, name: str, choices: Sequence[Choice]) -> Choice:
    """The choice of that name.

    Raises:
        UsageError: there is none.
    """
    found = next((each for each in choices if each == name), None)
    if found is None:
        raise UsageError(f"{option} must be {' or '.join(choices)}, got {name!r}")
    return found
