"""Sentences of a report about what verification could not judge, and what is no cast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.families.merging import shared_scale_group
from fp4cast.verification.opened import Opened
from fp4cast.verification.values import Comparison

_NAMED = 5  # names in a note


def notes_of(
    opened: Opened, measured: Mapping[str, Comparison], noise: Mapping[str, float], fp8: Mapping[str, float]
) -> Iterator[str]:
    """What could not be judged, and what is no cast.

    Args:
        opened: both sides.
        measured: by module, what was found of the cast tensors.
        noise: by module, the SNR in dB of other weights that `ptq` quantized.
        fp8: by module, that of weights in FP8.
    """
    if free := _zeros(measured):
        names = [opened.target.names(module).tensor_scale for module in free]
        hold, its = (
            ("tensors hold", "their tensor scales are") if len(names) > 1 else ("tensor holds", "its tensor scale is")
        )
        yield f"{len(names)} {hold} only zeros, so {its} free: {named(names)}"
    yield from _not_cast(opened, measured, noise)
    if fp8:
        what = (
            f"were quantized to FP8, with an SNR of {min(fp8.values()):.1f} dB and more: that is no cast, and not exact"
        )
        yield f"{len(fp8)} other weights {what}"
    if opened.maker and (signs := sum(comparison.signs for comparison in measured.values())):
        yield f"{signs:,} half-blocks have zeros of the other sign, as some tools write -0: they are equal as numbers"
    if opened.maker:
        yield f"{opened.maker} made DST: its weights were compared, what it writes around them is listed alone"
    elif not opened.receipt.found and not opened.back:
        scales = " and of input scales" * (opened.target.activations == "w4a4")
        scales += " and of the KV cache's scales" * bool(opened.kv_scales)
        yield (
            f"{RECEIPT} is missing: configs were judged by what they must say; whether every byte of them{scales} is "
            "what a conversion wrote could not be checked"
        )


def _not_cast(opened: Opened, measured: Mapping[str, Comparison], noise: Mapping[str, float]) -> Iterator[str]:
    """What the receipt calls quantized from values, where an export of `ptq` is no cast."""
    pairs, others = sorted(measured.keys() & opened.receipt.quantized), sorted(noise)
    if pairs:
        what = "quantized from values by `fp4cast ptq`: their errors were measured"
        yield f"{len(pairs)} of {len(opened.selection.cast)} MXFP4 tensors are no casts but {what}: {named(pairs)}"
    if others:
        what = f"quantized by `fp4cast ptq`, too, with an SNR of {min(noise.values()):.1f} dB and more"
        yield f"{len(others)} weights that the source does not hold in MXFP4 are {what}: {named(others)}"


def named(names: Sequence[str], most: int = _NAMED) -> str:
    """The first names, and how many there are beside."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _zeros(measured: Mapping[str, Comparison]) -> list[str]:
    """The modules whose tensor scale no value pins down: they and all that engines merge with them hold only zeros."""
    zeros = {module for module, comparison in measured.items() if comparison.zeros}
    others = measured.keys() - zeros
    return sorted(module for module in zeros if others.isdisjoint(shared_scale_group(module)[1]))
