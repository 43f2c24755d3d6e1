"""What conversions into different formats refuse alike: options, tensors that are not exact, results that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp4cast.conversion.plan import ConvertOptions
from fp4cast.errors import UsageError, VerificationError
from fp4cast.verification.report import Difference

_SHOWN = 5  # tensors that an error names
_DIFFERENCES = 10  # that it shows


def only_scaled(options: ConvertOptions) -> dict[str, bool]:
    """The options that a format without a tensor scale has no place for, and whether they were given."""
    return {
        "activations": options.activations not in (None, "w4a16"),
        "input_scales": options.input_scales is not None,
        "inexact": options.inexact != "fail",
        "kv_cache_qformat": options.kv_cache_qformat != "none",
        "to": options.to != "nvfp4",
        "fp8": options.fp8 != "none",
    }


def refuse_options(given: Mapping[str, bool], why: str) -> None:
    """Raise a UsageError for the options that were given."""
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise UsageError(f"{', '.join(wrong)}: no option for {why}")


def first_of(reasons: Sequence[str]) -> str:
    """The first reasons, one a line, and how many there are beside."""
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    return "\n".join(f"  {line}" for line in [*reasons[:_SHOWN], *more])


def unlike(destination: str, source: object, differences: Sequence[Difference]) -> VerificationError:
    """The error about a result that is not published."""
    shown = "\n".join(f"  {difference}" for difference in differences[:_DIFFERENCES])
    return VerificationError(
        f"{destination}: the result differs from {source} in {len(differences)} places; nothing was published:\n{shown}"
    )
