"""Check every tensor of a checkpoint against its config and the model, before a weight is read.

transformers only warns of a tensor that is missing or left over, and fills a missing weight with random numbers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist

from fp4cast.checkpoints.header import UNQUANTIZED, Tensor, read_header
from fp4cast.errors import CheckpointError, PartnerError, ShapeError, UnsupportedError
from fp4cast.formats import NV_BLOCK_BYTES
from fp4cast.hf.placement import BANK, BANKS, PROJECTION, Place, companions, is_linear, module_of
from fp4cast.layouts.engine_view import Claims
from fp4cast.layouts.layout import DTYPES


def headers(files: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's files by name.

    Raises:
        CheckpointError: a file is not in safetensors, or a tensor is in two files.
    """
    found: dict[str, Tensor] = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise UnsupportedError(f"{path}: expected a safetensors file")
        for name, tensor in read_header(path).tensors.items():
            if name in found:
                raise CheckpointError(f"{tensor}: is in {found[name].path.name} too; expected one tensor of that name")
            found[name] = tensor
    return found


def check_partners(tensors: Mapping[str, Tensor], claims: Claims) -> set[str]:
    """Check every NVFP4 weight: claimed by the config, complete, and of the right dtypes and shapes.

    Returns:
        The names of all codes.

    Raises:
        PartnerError: a tensor is missing, or does not belong there.
        ShapeError: one has the wrong dtype or shape.
        UnsupportedError: there are none.
    """
    codes = {name for tensor in tensors.values() for name in _codes(tensor)}
    if not codes:
        raise UnsupportedError("the config describes an NVFP4 checkpoint, but no tensor is NVFP4")
    claimed = claims.quantized({module_of(name) for name in codes})
    for name in sorted(codes):
        _check_claims(name, tensors, claimed, scaled=claims.activations == "w4a4")
        _check_shapes(name, tensors)
    return codes


def _codes(tensor: Tensor) -> Iterator[str]:
    """The name of the codes that a tensor holds or belongs to."""
    if tensor.dtype == "U8" and tensor.name.endswith((".weight", *BANKS)):
        yield tensor.name
    for suffixes in (PROJECTION.suffixes, BANK.suffixes):
        for suffix in suffixes[1:]:
            if tensor.name.endswith(suffix):
                yield tensor.name.removesuffix(suffix) + suffixes.codes


def _check_claims(name: str, tensors: Mapping[str, Tensor], claimed: set[str], *, scaled: bool) -> None:
    names, module = companions(name), module_of(name)
    there = [tensors[each] for each in names if each in tensors]
    foreign = next((each for each in there if each.name != name or each.dtype == "U8"), there[0])
    if module not in claimed:
        raise PartnerError(f"{foreign}: the config does not call {module} quantized; expected no such tensor")
    if there[0].name == name and there[0].dtype in UNQUANTIZED:
        raise PartnerError(f"{foreign}: {there[0]} is not quantized; expected codes in U8, or no such scale")
    for each, dtype in zip(names, DTYPES, strict=True):
        if each not in tensors and (scaled or each != names.input_scale):
            raise PartnerError(
                f"{each} is missing: {module} is NVFP4 ({'W4A4' if scaled else 'W4A16'}) by the config; "
                f"expected {dtype} beside {there[0]}"
            )
    if not scaled and names.input_scale in tensors:
        raise PartnerError(f"{tensors[names.input_scale]}: the config says W4A16; expected no such tensor")


def _check_shapes(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that codes are [N, K/2], or [E, K/2, N] for banks of experts (K is axis 1), and that the rest fits."""
    shape = tensors[name].shape
    if len(shape) != (2 if name.endswith(".weight") else 3) or 0 in shape or shape[1] % NV_BLOCK_BYTES:
        raise ShapeError(
            f"{tensors[name]}: expected [N, K/2], or [E, K/2, N] for banks of experts, with whole blocks of 16"
        )
    blocks = (shape[0], shape[1] // NV_BLOCK_BYTES, *shape[2:])
    for each, dtype, wanted in zip(companions(name), DTYPES, (shape, blocks, (), ()), strict=True):
        if each in tensors and (tensors[each].dtype, tensors[each].shape) != (dtype, wanted):
            raise ShapeError(f"{tensors[each]}: expected {dtype} {list(wanted)} for codes {list(shape)}")


def check_places(placed: Mapping[str, Place], codes: set[str], claims: Claims, model: PreTrainedModel) -> None:
    """Check that every tensor has its place, and every parameter its tensors.

    Args:
        placed: every tensor by name.
        codes: the names of all codes.
        claims: the config's.
        model: on any device.

    Raises:
        CheckpointError: a tensor is missing, left over, or not what its parameter needs.
        ShapeError: one has the wrong dtype or shape for its parameter.
        UnsupportedError: the model's own conversion of a parameter does not understand NVFP4.
    """
    _check_unknown(placed.values(), model)
    scales = {each for name in codes for each in companions(name)[1:]}
    groups: dict[str, list[Place]] = defaultdict(list)
    for name, place in placed.items():
        if name not in scales and place.made:
            groups[place.parameter].append(place)
    claimed = claims.quantized({module_of(name) for name in placed})
    for group in groups.values():
        for place in group:
            _check_weight(place, placed, codes, claimed, model)
        _check_group(group, codes, model)
    _check_complete({name for group in groups.values() for place in group for name in place.made}, model)


def _check_unknown(placed: Iterable[Place], model: PreTrainedModel) -> None:
    left = [place for place in placed if not place.made and not _is_head(place.tensor.name, model)]
    unknown = _after_rules(model, unexpected_keys={place.parameter for place in left})
    for place in left:
        if place.parameter in unknown:
            raise CheckpointError(f"{place.tensor}: {type(model).__name__} has no parameter for it; expected none")


def _after_rules(model: PreTrainedModel, **names: set[str]) -> set[str]:
    """The missing_keys or unexpected_keys that remain after transformers' own exceptions."""
    info: Any = SimpleNamespace(**{"missing_keys": set(), "unexpected_keys": set(), **names})
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.missing_keys | info.unexpected_keys)


def _is_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to a head that the model lacks: `AutoModel` loads the body alone."""
    prefix = model.base_model_prefix
    return bool(prefix) and not hasattr(model, prefix) and not name.startswith(f"{prefix}.")


def _check_weight(
    place: Place, placed: Mapping[str, Place], codes: set[str], claimed: set[str], model: PreTrainedModel
) -> None:
    """Check one tensor that is not a scale."""
    tensor, name = place.tensor, place.tensor.name
    if name in codes:
        partners = [placed[each] for each in companions(name) if each in placed]
        if not place.reads_codes or {each.parameter for each in partners} != {place.parameter}:
            raise UnsupportedError(
                f"{tensor}: transformers converts {place.parameter} in a way that does not support NVFP4"
            )
        return
    if module_of(name) in claimed and place.reads_codes and (place.of_experts or is_linear(model, place.made[0])):
        raise ShapeError(f"{tensor}: the config calls {module_of(name)} NVFP4; expected U8 codes")
    floating = model.get_parameter_or_buffer(place.made[0]).is_floating_point()
    if floating and tensor.dtype not in UNQUANTIZED:
        raise ShapeError(
            f"{tensor}: the config does not call it quantized; expected {' or '.join(sorted(UNQUANTIZED))}"
        )


def _shape(tensor: Tensor, codes: set[str]) -> tuple[int, ...]:
    """The shape of the weight that a tensor holds."""
    shape = tensor.shape
    return (shape[0], 2 * shape[1], *shape[2:]) if tensor.name in codes else shape


def _check_group(group: Sequence[Place], codes: set[str], model: PreTrainedModel) -> None:
    """Check the tensors that make one parameter, or several that were merged: each is there once, in the right size."""
    first, shapes = group[0], [_shape(place.tensor, codes) for place in group]
    wanted = [tuple(model.get_parameter_or_buffer(name).shape) for name in first.made]
    if first.converter is None or first.alone:
        if shapes != wanted:
            others = "".join(f" and {place.tensor}" for place in group[1:])
            raise ShapeError(f"{first.tensor}{others}: expected one tensor {list(wanted[0])} for {first.parameter}")
        return
    if not first.reads_codes:
        return  # transformers' own, which checks what comes out
    for pattern in sorted({str(place.pattern) for place in group}):
        _check_source([place for place in group if place.pattern == pattern], pattern, codes, wanted[0][0])
    have, need = (sum(map(math.prod, each)) for each in (shapes, wanted))
    if have != need:
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        raise ShapeError(
            f"{first.parameter}: expected {need} weights ({', '.join(str(list(each)) for each in wanted)}) of "
            f"{' and '.join(first.sources)}, got {have}: {first.tensor}{others}"
        )


def _check_source(group: Sequence[Place], pattern: str, codes: set[str], count: int) -> None:
    """Check the tensors of one source pattern of a parameter, which are those of its experts."""
    if len({place.tensor.name in codes for place in group}) > 1:
        raise UnsupportedError(f"{group[0].tensor}: some experts of {group[0].parameter} are NVFP4 and some are not")
    merges = group[0].converter is not None and any(
        isinstance(o, MergeModulelist) for o in group[0].converter.operations
    )
    matches = [re.search(pattern.replace("*.", r"(\d+)\."), place.tensor.name) for place in group]
    if not merges or not all(matches):
        return
    found = {int(match[1]): place for match, place in zip(matches, group, strict=True) if match}
    for expert in sorted({*found, *range(count)}):
        if expert not in found:
            name, match = group[0].tensor.name, matches[0]
            if match:
                name = f"{name[: match.start(1)]}{expert}{name[match.end(1) :]}"
            raise CheckpointError(f"{name} is missing: {group[0].parameter} has {count} experts")
        if expert >= count:
            raise CheckpointError(f"{found[expert].tensor}: {group[0].parameter} has {count} experts; expected none")


def _check_complete(made: set[str], model: PreTrainedModel) -> None:
    """Check that every parameter is made, or tied to one that is."""
    tied: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        tied[source] |= {target, source}
    made = made.union(*(each for each in tied.values() if each & made))
    state = model.state_dict()
    missing = _after_rules(model, missing_keys=set(state) - made)
    for name in sorted(missing):
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{name} is missing{others}: expected a tensor for {list(state[name].shape)}")
