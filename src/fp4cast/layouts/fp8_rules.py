"""What must `quantized_layers` say of weights in FP8, and which of them can engines serve at all?

Stated a second time, for verification, as everything in `engine_rules`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from fp4cast.families.attention import Attention
from fp4cast.families.family import Family
from fp4cast.layouts.patterns import spellings

ALGORITHM, _BLOCK = "FP8_PB_WO", 128


def fp8_sentences(
    listed: Collection[str], family: Family, fp8: Mapping[str, tuple[int, ...]], modules: Collection[str]
) -> Iterator[str]:
    """Everything that is wrong.

    Args:
        listed: the names that `quantized_layers` lists with FP8's algorithm.
        family: the source's.
        fp8: by module, the shape of the weights that are FP8.
        modules: all modules with weight matrices.
    """
    attention = family.attention
    expected, whole = set(fp8), frozenset(modules)
    if attention is not None:
        for parent in sorted({module.rpartition(".")[0] for module in fp8}):
            expected |= _merged(attention, parent, fp8, whole)
            yield from _split(attention, parent, fp8, whole)
    for module in sorted(module for module, shape in fp8.items() if shape[-1] % _BLOCK):
        yield f"quantized_layers lists {module} as FP8, whose rows are no whole blocks of {_BLOCK}: engines refuse it"
    names = {each for name in expected for each in spellings(name, family.aliases)}
    for name in sorted(names - set(listed)):
        yield f"quantized_layers lacks {name}, by which an engine may look up what is FP8"
    for name in sorted(set(listed) - names):
        yield f"quantized_layers lists {name[:200]}, under which nothing was quantized to FP8"


def _merged(attention: Attention, parent: str, fp8: Collection[str], modules: Collection[str]) -> set[str]:
    """The names of the matrices that engines merge of an attention's weights in FP8 alone."""
    groups = [each for each in attention.merged if all(f"{parent}.{part}" in modules for part in each.parts)]
    whole = [each for each in groups if all(f"{parent}.{part}" in fp8 for part in each.parts)]
    return {f"{parent}.{name}" for each in whole for name in each.names}


def _split(
    attention: Attention, parent: str, fp8: Mapping[str, tuple[int, ...]], modules: Collection[str]
) -> Iterator[str]:
    """Matrices of which a part is FP8 and another not, or in which a block of scales would cover two parts."""
    for merged in attention.merged:
        parts = [f"{parent}.{part}" for part in merged.parts]
        there = [part for part in parts if part in fp8]
        if not there or not all(part in modules for part in parts):
            continue
        if there != parts:
            yield f"{', '.join(there)} is FP8 and the rest of {parent}.{merged.names[0]} is not: engines merge them"
        elif any(fp8[part][0] % _BLOCK for part in parts[:-1]):
            yield f"parts of {parent}.{merged.names[0]} end within a block of {_BLOCK} rows: engines mix their scales"
