"""The Report on a destination whose format has no tensor scale: GGUF, and MLX's nvfp4."""

from __future__ import annotations

from collections.abc import Sequence

from fp4cast.verification.report import ByteCounts, Difference, HalfBlockCounts, Report


def unscaled_report(
    source: str,
    destination: str,
    *,
    family: str,
    layout: str,
    served: str,
    serve: str,
    cast: int,
    copied: int,
    half_blocks: HalfBlockCounts,
    bytes: ByteCounts,  # noqa: A002
    inexact: int = 0,
    differences: Sequence[Difference] = (),
    strict: bool = False,
    seconds: float = 0.0,
    verified: bool = False,
    notes: Sequence[str] = (),
) -> Report:
    """A report; the arguments are those of `Report`, `inexact` a number of tensors. vLLM's Marlin reads neither."""
    return Report(
        source=source,
        destination=destination,
        family=family,
        layout=layout,
        activations="w4a16",
        exact=not inexact and not any(each.area == "weights" for each in differences),
        tensors={"cast": cast, "exact": cast - inexact, "inexact": inexact, "copied": copied},
        half_blocks=half_blocks,
        inexact=(),
        marlin_exact=False,
        bytes=bytes,
        seconds=seconds,
        verified=verified,
        served=served,
        serve=serve,
        differences=tuple(differences),
        strict=strict,
        notes=tuple(notes),
    )
