"""The cast of what vLLM has loaded, where it lies."""

from __future__ import annotations

import logging

from torch import Tensor

from fp4cast.casting.tight_rule import MARLIN_BINADES
from fp4cast.errors import CheckpointError, InexactError
from fp4cast.formats import E8M0_NAN
from fp4cast.torch import Cast, cast
from fp4cast.vllm.filled import is_empty

_LOG = logging.getLogger("vllm.fp4cast")


def cast_loaded(name: str, codes: Tensor, scales: Tensor) -> Cast:
    """Cast one scale domain; where codes have to be shifted, they are where they lie.

    Args:
        name: for messages.
        codes: uint8 [..., N, K/2].
        scales: E8M0 as uint8 [..., N, K/32].

    Raises:
        InexactError: by the tight rule, with what to do.
    """
    try:
        made = cast(codes, scales.contiguous())
    except InexactError as error:
        advice = "serve what `fp4cast convert --inexact nearest` writes, or the MXFP4 checkpoint as it is"
        raise InexactError(f"{name}: {str(error).partition(';')[0]}; {advice}") from error
    if made.codes is not codes:
        codes.copy_(made.codes)
        _LOG.info("fp4cast: %s: codes of %d half-blocks were shifted, exactly", name, made.shifted)
    _warn_of_marlin(name, made)
    return made


def check_loaded(name: str, *, weight: Tensor, weight_scale: Tensor, **biases: Tensor) -> None:
    """Raise for what the checkpoint did not fill of a layer whose parameters were emptied before.

    Raises:
        CheckpointError: codes, scales (E8M0's NaN) or biases are as they were.
    """
    lost = {"weight": is_empty(weight), "weight_scale": weight_scale == E8M0_NAN}
    for leaf, where in (lost | {leaf: is_empty(bias) for leaf, bias in biases.items()}).items():
        if bool(where.any()):
            raise CheckpointError(f"{name}_{leaf}: nothing in the checkpoint filled it, or it holds NaN")


def _warn_of_marlin(name: str, made: Cast) -> None:
    """Say where Marlin's window is narrower than NVFP4's: it zeroes small block scales."""
    top = made.block_scales.float().max()
    small = made.block_scales.float() < top * 2.0**-MARLIN_BINADES
    if bool(small.any()):
        used = (made.codes & 0x77).reshape(*small.shape, 8).any(-1)
        if lost := int((small & used).sum()):
            _LOG.warning(
                "fp4cast: %s: the cast is exact, but vLLM's Marlin kernel zeroes %d half-blocks more than %d binades "
                "below the largest scale", name, lost, MARLIN_BINADES,
            )  # fmt: skip
