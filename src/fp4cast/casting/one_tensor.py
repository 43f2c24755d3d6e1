"""Cast one tensor in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4cast.casting.inexact import check_inexact
from fp4cast.casting.nearest import choose_nearest, encode
from fp4cast.casting.tight_rule import ArrayBlocks, choose
from fp4cast.errors import InexactError, ShapeError, UsageError
from fp4cast.formats import E8M0_BIAS, MX_BLOCK_BYTES, Bytes


@dataclass(frozen=True)
class Cast:
    """An NVFP4 tensor.

    Attributes:
        codes: packed uint8 [..., K/2]; the given array itself where no code changes.
        block_scales: E4M3 codes, uint8 [..., K/16].
        tensor_scale: S, a float32 value; a weight is code value * block scale * S.
        exact: every value equals the MXFP4 tensor's.
        shifted: half-blocks whose codes were divided by a power of two; exact.
        rounded: half-blocks that hold the nearest values instead.
    """

    codes: Bytes
    block_scales: Bytes
    tensor_scale: float
    exact: bool
    shifted: int
    rounded: int


def cast(codes: Bytes, scales: Bytes, inexact: str = "fail", bias: int = E8M0_BIAS) -> Cast:
    """Cast one MXFP4 tensor in memory, as one scale domain.

    Args:
        codes: packed uint8 [..., K/2], two E2M1 codes a byte, low nibble = even element.
        scales: E8M0 uint8 [..., K/32].
        inexact: "fail", or "nearest" to round what cannot be exact.
        bias: exponent bias of the scales: 127, or 125 for scales that compressed-tensors 0.13 wrote.

    Returns:
        The NVFP4 tensor.

    Raises:
        ShapeError: shapes or dtypes that do not fit together.
        ScaleError: a scale byte of 255.
        InexactError: no tensor scale is exact and `inexact` is "fail".

    >>> import numpy as np
    >>> out = cast(np.full((1, 16), 0x72, np.uint8), np.array([[120]], np.uint8))
    >>> out.tensor_scale == 2.0**-15, out.block_scales.tolist()
    (True, [[120, 120]])
    """
    check_inexact(inexact)
    if bias not in (E8M0_BIAS, E8M0_BIAS - 2):
        raise UsageError(f"bias must be 127, or 125 for scales that compressed-tensors 0.13 wrote; got {bias}")
    for name, array in (("codes", codes), ("scales", scales)):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise ShapeError(f"{name}: expected a uint8 array, got {getattr(array, 'dtype', type(array).__name__)}")
    if not scales.size or not scales.ndim or codes.shape != (*scales.shape[:-1], scales.shape[-1] * MX_BLOCK_BYTES):
        raise ShapeError(f"codes {codes.shape} and scales {scales.shape}: expected [..., K/2] and [..., K/32]")
    blocks = ArrayBlocks("the tensor", codes.reshape(-1, MX_BLOCK_BYTES), scales.reshape(-1), bias)
    scaling, _ = choose([blocks])
    if not scaling.exact:
        if inexact == "fail":
            raise InexactError(
                f"exponents {scaling.k_min} to {scaling.k_max} span {scaling.spread} binades and no tensor scale is "
                'exact for all codes; pass inexact="nearest" to round'
            )
        scaling = choose_nearest([blocks])
    encoded = encode(blocks.packed, blocks.scales, scaling, bias)
    return Cast(
        codes if encoded.codes is blocks.packed else encoded.codes.reshape(codes.shape),
        encoded.block_scales.reshape(*scales.shape[:-1], -1),
        scaling.tensor_scale,
        scaling.exact,
        encoded.shifted,
        encoded.rounded,
    )
