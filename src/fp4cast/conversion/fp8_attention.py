"""`--fp8 attention`: which weights become FP8, which stay, and why. They are measured, and never called exact."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fp4cast.checkpoints.header import UNQUANTIZED, Tensor
from fp4cast.conversion.fp8_blocks import Fp8Of
from fp4cast.conversion.recipe import Output
from fp4cast.errors import UnsupportedError, UsageError
from fp4cast.families.attention import Attention
from fp4cast.families.family import Source
from fp4cast.layouts.fp8 import BLOCK, LAYOUT, find_choice, fp8_tensors
from fp4cast.layouts.layout import Selection, Target
from fp4cast.verification.notes import named

_NAMED = 3  # in a sentence


def quantize_attention(
    source: Source, target: Target, selection: Selection, choice: str
) -> tuple[Target, Selection, tuple[str, ...]]:
    """(the target, the selection, notes) with the attention in FP8, if that is asked for.

    Args:
        source: the MXFP4 checkpoint.
        target: how the destination is stored.
        selection: what is cast.
        choice: the value of `--fp8`.

    Raises:
        UsageError: there is no such choice, or no engine that we know reads that of this family, or in this layout.
        UnsupportedError: no weight of the attention can be quantized.
    """
    if find_choice(choice) == "none":
        return target, selection, ()
    attention = _attention(source, target)
    there = _weights(attention, selection)
    staying = dict(_staying(attention, there, {*source.pairs, *there}))
    chosen = [module for module in there if module not in staying]
    if not chosen:
        why = "; ".join(_sentences(staying)) or "it has none that is a matrix in BF16"
        raise UnsupportedError(
            f"{source.checkpoint.path}: --fp8 attention: no weight of the attention can be FP8: {why}. Leave out --fp8"
        )
    notes = tuple(f"attention that stays in {_stored(there, staying)}: {text}" for text in _sentences(staying))
    return replace(target, fp8="attention"), selection.with_fp8(chosen), notes


def _attention(source: Source, target: Target) -> Attention:
    """What the family calls its attention.

    Raises:
        UsageError: it has none that an engine would read in FP8.
    """
    path, family = source.checkpoint.path, target.family
    if family.attention is None:
        quantized = [
            name
            for name, tensor in source.checkpoint.tensors.items()
            if "attn" in name
            and name.endswith(".weight")
            and tensor.dtype not in UNQUANTIZED
            and len(tensor.shape) == 2
        ]
        raise UsageError(
            f"{path}: --fp8 attention: the attention of {family.title} is quantized already, as {quantized[0]}"
            if quantized
            else f"{path}: --fp8 attention: no engine that we ran or read serves {family.title} with attention in FP8"
        )
    if target.layout.name != LAYOUT:
        raise UsageError(
            f"--fp8 attention belongs to --layout {LAYOUT}; {target.layout.name} has no FP8 in blocks here"
        )
    return family.attention


def _weights(attention: Attention, selection: Selection) -> dict[str, Tensor]:
    """The weights of the attention that are not cast, by module."""
    found = {}
    for tensor in selection.untouched:
        module = tensor.name.removesuffix(".weight")
        if module != tensor.name and len(tensor.shape) == 2 and re.search(attention.modules, module):
            found[module] = tensor
    return found


def _staying(attention: Attention, weights: Mapping[str, Tensor], modules: set[str]) -> Iterator[tuple[str, str]]:
    """(module, why) of each weight that stays as it is."""
    bad = {module: why for module, tensor in weights.items() if (why := _unfit(tensor))}
    yield from bad.items()
    for parent, merged in attention.among(modules):
        parts = [f"{parent}.{part}" for part in merged.parts]
        ragged = [part for part in parts[:-1] if part in weights and weights[part].shape[0] % BLOCK]
        if any(part not in weights or part in bad for part in parts):
            why = f"engines merge it with others that cannot be FP8, into {merged.names[0]}"
        elif ragged:
            why = f"engines merge it into {merged.names[0]}, of which a part ends within a block of {BLOCK} rows"
        else:
            continue
        yield from ((part, why) for part in parts if part in weights and part not in bad)


def _unfit(tensor: Tensor) -> str:
    """Why a weight cannot be quantized; empty if it can."""
    if tensor.dtype != "BF16":
        return f"it is {tensor.dtype}, expected BF16"
    if tensor.shape[1] % BLOCK or not tensor.nbytes:
        return f"its rows are no whole blocks of {BLOCK} weights, which engines refuse"
    return ""


def _sentences(staying: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each reason."""
    table: dict[str, list[str]] = defaultdict(list)
    for module, why in staying.items():
        table[why].append(module)
    for why, modules in table.items():
        yield f"{named(modules, _NAMED)}: {why}"


def _stored(weights: Mapping[str, Tensor], staying: Mapping[str, str]) -> str:
    return " and ".join(sorted({weights[module].dtype for module in staying}))


def fp8_outputs(selection: Selection) -> dict[str, list[Output]]:
    """The codes and the scales of every weight that becomes FP8, by the name of the tensor that they replace."""
    found = {}
    for module, weight in selection.fp8.items():
        (codes, scales) = fp8_tensors(module, weight.shape).items()
        found[weight.name] = [
            Output(name, dtype, shape, Fp8Of(module, weight, scales=name != weight.name))
            for name, (dtype, shape) in (codes, scales)
        ]
    return found
