"""Predict where transformers puts every tensor of a checkpoint: its own renaming, on names alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from fp4cast.checkpoints.header import Tensor
from fp4cast.hf.dequantize import Dequantize
from fp4cast.layouts.layout import Form, Names
from fp4cast.layouts.modelopt import MODELOPT

PROJECTION, BANK = MODELOPT.form(bank=False), MODELOPT.form(bank=True)
BANKS = (".experts.gate_up_proj", ".experts.down_proj")  # all experts of a layer in one tensor, as in gpt-oss


class Place(NamedTuple):
    """One tensor of a checkpoint, and the parameters that the loader makes of it.

    Attributes:
        tensor: as the header describes it.
        parameter: the loader's name for it: the first of the parameters that are made of it.
        made: all of them; more than one where a merged tensor is split.
        converter: the converter that collects it; None if it is only renamed.
        pattern: the converter's source pattern that matches.
    """

    tensor: Tensor
    parameter: str
    made: tuple[str, ...]
    converter: WeightConverter | None
    pattern: str | None

    @property
    def reads_codes(self) -> bool:
        """Whether its converter understands quantized weights."""
        return self.converter is not None and isinstance(self.converter.operations[0], Dequantize)

    @property
    def alone(self) -> bool:
        """Whether one weight alone makes the parameter, quantized or not."""
        return self.converter is not None and len(self.converter.operations) == 1 and self.reads_codes

    @property
    def of_experts(self) -> bool:
        """Whether the tensor belongs to a bank of experts."""
        return "*" in (self.pattern or "") or self.tensor.name.endswith(BANKS)

    @property
    def sources(self) -> list[str]:
        """The patterns of all weights that make the parameter."""
        operation = self.converter.operations[0] if self.converter is not None else None
        return [names.codes for names in operation.names] if isinstance(operation, Dequantize) else []


def companions(codes: str) -> Names:
    """The names of an NVFP4 weight's four tensors, from the name of its codes; patterns, from a pattern."""
    return _form(codes).names(module_of(codes))


def _form(codes: str) -> Form:
    return PROJECTION if codes.endswith(PROJECTION.suffixes.codes) else BANK


def module_of(name: str) -> str:
    """The module of a weight, as configs name it: for a bank, the name of its tensor."""
    return name.removesuffix(PROJECTION.suffixes.codes)


def reading(
    conversions: Sequence[WeightTransform], faults: list[str]
) -> list[tuple[WeightTransform, WeightTransform | None]]:
    """Make a model's conversions read NVFP4, and add conversions for the weights that have none.

    Args:
        conversions: the model's.
        faults: see `Dequantize`.

    Returns:
        (conversion to load with, that to save with or None).
    """
    pairs: list[tuple[WeightTransform, WeightTransform | None]] = [
        (_reading(each, faults), each) for each in conversions
    ]
    for target in (PROJECTION.suffixes.codes, *BANKS):
        names = companions(target.replace(".", r"\."))
        pairs.append((WeightConverter(list(names), target, [Dequantize([names], faults, last=True)]), None))
    return pairs


def _reading(conversion: WeightTransform, faults: list[str]) -> WeightTransform:
    """Make a converter of `.weight` tensors collect their scales too; other conversions stay as they are."""
    sources = conversion._original_source_patterns
    if not isinstance(conversion, WeightConverter) or not all(source.endswith(".weight") for source in sources):
        return conversion
    names = [companions(source) for source in sources]
    operations = [Dequantize(names, faults, last=False), *conversion.operations]
    patterns = [pattern for each in names for pattern in each]
    return conversion.copy(patterns, list(conversion._original_target_patterns), operations=operations)


def places(
    tensors: Iterable[Tensor], conversions: Sequence[WeightTransform], model: PreTrainedModel
) -> dict[str, Place]:
    """The `Place` of each tensor by name, in the loader's order.

    Args:
        tensors: the checkpoint's.
        conversions: to load with; they are not changed.
        model: on any device.
    """
    conversions = copy.deepcopy(list(conversions))  # renaming marks them as used
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for tensor in sorted(tensors, key=lambda each: dot_natural_key(each.name)):
        parameter, pattern = rename_source_key(tensor.name, renamings, converters, prefix, known)
        if parameter not in known and tensor.name in known:
            parameter, pattern = rename_source_key(tensor.name, [], [], prefix, known)
        converter = by_pattern[pattern] if pattern is not None else None
        found[tensor.name] = Place(tensor, parameter, _made(parameter, converter, known), converter, pattern)
    return found


def _made(parameter: str, converter: WeightConverter | None, known: Mapping[str, object]) -> tuple[str, ...]:
    if parameter not in known:
        return ()
    if converter is None:
        return (parameter,)
    first = converter.target_patterns[0]
    names = (parameter.replace(first, target) for target in converter.target_patterns)
    return tuple(name for name in names if name in known)


def is_linear(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter is the weight of a linear layer, and not of an embedding or a norm."""
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.Linear)
