"""The public functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp4cast.conversion import Progress, convert_checkpoint
from fp4cast.errors import InexactError, ShapeError, UsageError
from fp4cast.exact import ArrayBlocks, choose
from fp4cast.formats import E8M0_BIAS, Bytes
from fp4cast.hub import resolve
from fp4cast.inputs import InputScalesLike
from fp4cast.inspection import Inspection, inspect_checkpoint
from fp4cast.nearest import choose_nearest, encode
from fp4cast.report import Report
from fp4cast.verify import verify_checkpoint

__all__ = ["Cast", "cast", "convert", "inspect", "verify"]


@dataclass(frozen=True)
class Cast:
    """An NVFP4 tensor.

    Attributes:
        codes: packed uint8 [..., K/2]; the very array that was passed in where no code changes.
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
        bias: exponent bias of the scales, 127 in the standard.

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
    if inexact not in ("fail", "nearest"):
        raise UsageError(f"inexact must be 'fail' or 'nearest', got {inexact!r}")
    for name, array in (("codes", codes), ("scales", scales)):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise ShapeError(f"{name}: expected a uint8 array, got {getattr(array, 'dtype', type(array).__name__)}")
    if not scales.size or not scales.ndim or codes.shape != (*scales.shape[:-1], scales.shape[-1] * 16):
        raise ShapeError(f"codes {codes.shape} and scales {scales.shape}: expected [..., K/2] and [..., K/32]")
    blocks = ArrayBlocks("the tensor", codes.reshape(-1, 16), scales.reshape(-1), bias)
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
        codes if scaling.verbatim else encoded.codes.reshape(codes.shape),
        encoded.block_scales.reshape(*scales.shape[:-1], -1),
        scaling.tensor_scale,
        scaling.exact,
        encoded.shifted,
        encoded.rounded,
    )


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = "modelopt",
    activations: str | None = None,
    input_scales: InputScalesLike | None = None,
    inexact: str = "fail",
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = lambda *_: None,
) -> Report:
    """Convert an MXFP4 checkpoint into an NVFP4 one.

    Args:
        src: a directory, or a Hugging Face model id.
        dst: the directory to make.
        layout: "modelopt" or "compressed-tensors".
        activations: "w4a16" or "w4a4"; None for w4a16 where the family can be served so.
        input_scales: for w4a4: a number (the input_scale of every projection), or a mapping or file (JSON,
            safetensors) of projection name -> amax of its input.
        inexact: "fail" stops before a byte is written when a domain is not exact; "nearest" rounds there.
        jobs: threads; None for one a core.
        resume: go on with an interrupted conversion of the same source and options.
        overwrite: replace an existing `dst`, once the new one is complete.
        verify: read everything again and compare every value before `dst` appears.
        progress: called, from worker threads, with (phase, bytes just done, bytes in all or 0).

    Returns:
        What was done, measured on what was written.

    Raises:
        Fp4CastError: see `fp4cast.errors`; `dst` is as it was before.
    """
    return convert_checkpoint(
        resolve(src),
        Path(dst),
        layout=layout,
        activations=activations,
        input_scales=input_scales,
        inexact=inexact,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
    )


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Compare every value of an NVFP4 checkpoint with the MXFP4 one that it was made from.

    Args:
        src: the MXFP4 checkpoint: a directory or a model id.
        dst: the NVFP4 checkpoint: likewise.
        jobs: threads; None for one a core.
        progress: called, from worker threads, with the number of bytes just read, and of all.

    Returns:
        A report; `report.ok` is False and `report.differences` says why when anything is wrong.

    Raises:
        CheckpointError: one of the two cannot be read as a checkpoint at all.
    """
    return verify_checkpoint(resolve(src), resolve(dst), jobs=jobs, progress=progress)


def inspect(
    src: str | Path, *, jobs: int | None = None, progress: Callable[[int, int], None] = lambda *_: None
) -> Inspection:
    """Say what a checkpoint is and what a conversion would do; nothing is written.

    Args:
        src: a directory, or a Hugging Face model id.
        jobs: threads; None for one a core.
        progress: called, from worker threads, with the number of scale bytes just read, and of all.

    Returns:
        Family, scale domains with their spreads and windows, sizes.

    Raises:
        CheckpointError: the source is malformed, or holds nothing to cast.
    """
    return inspect_checkpoint(resolve(src), jobs=jobs, progress=progress)
