"""NVFP4 weights of a checkpoint as the MXFP4 tensors that they become again: the layouts' names turned round.

Names, dtypes and shapes decide, and no config: other people's casts spell theirs in many ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.errors import PartnerError, ShapeError, UnsupportedError
from fp4cast.families.family import Family, Pair, Source
from fp4cast.families.recognise import FAMILIES
from fp4cast.formats import MX_BLOCK, MX_BLOCK_BYTES
from fp4cast.layouts.choose import LAYOUTS
from fp4cast.layouts.layout import DTYPES, Form, Layout, Selection, Target

_SCALAR_SHAPES = ((), (1,))


@dataclass(frozen=True, slots=True)
class Weight:
    """One NVFP4 weight.

    Attributes:
        pair: the MXFP4 tensor that it becomes; its two tensors lie nowhere yet.
        form: how the NVFP4 weight is stored.
        codes: its packed codes.
        block_scales: its E4M3 block scales.
        tensor_scale: S or 1/S.
    """

    pair: Pair
    form: Form
    codes: Tensor
    block_scales: Tensor
    tensor_scale: Tensor


@dataclass(frozen=True)
class Readable:
    """An NVFP4 checkpoint, recognised.

    Attributes:
        source: the checkpoint, its family, and the MXFP4 pairs that its weights become.
        target: what it is: its layout and activations.
        selection: what changes: `cast` are the pairs, `replaced` the names of the NVFP4 tensors.
        weights: by module, in the order of `selection.cast`.
        dropped: the tensors that have no counterpart: input scales and those of the KV cache.
    """

    source: Source
    target: Target
    selection: Selection
    weights: Mapping[str, Weight]
    dropped: Sequence[str]


def holds_nvfp4(names: Iterable[str]) -> bool:
    """Whether some of these are the names of tensor scales of an NVFP4 weight."""
    endings = tuple(form.suffixes.tensor_scale for _, form in _forms())
    return any(name.endswith(endings) for name in names)


def read_nvfp4(
    checkpoint: Checkpoint, said: str = "", scales: str = "", config: Mapping[str, Any] | None = None
) -> Readable:
    """Find the NVFP4 weights of a checkpoint.

    Args:
        checkpoint: the opened directory.
        said: the name of the family that it came from, where a receipt says it.
        scales: the dtype of that family's scales in it, where a receipt says it.
        config: the config.json that says which exponent bias its scales had; None for the checkpoint's.

    Raises:
        UnsupportedError: it holds none, or some that were not MXFP4 in any family that fp4cast reads.
        PartnerError: a weight lacks a tensor.
        ShapeError: its tensors do not fit together.
    """
    tensors = checkpoint.tensors
    found = {
        name.removesuffix(form.suffixes.tensor_scale): (layout, form)
        for name in tensors
        for layout, form in _forms()
        if name.endswith(form.suffixes.tensor_scale)
    }
    if not found:
        raise UnsupportedError(
            f"{checkpoint.path}: holds no NVFP4 weights, so there is no way back; expected a checkpoint that "
            "`fp4cast convert` or another tool has cast from MXFP4"
        )
    layouts = {layout.name: layout for layout, _ in found.values()}
    if len(layouts) > 1 or len({form.transposed for _, form in found.values()}) > 1:
        raise UnsupportedError(
            f"{checkpoint.path}: {', '.join(sorted(found)[:3])}: NVFP4 weights in several forms, expected one: what "
            "was quantized beside a cast has no MXFP4 original"
        )
    layout, form = next(iter(found.values()))
    _check_orphans(tensors, found.keys(), form)
    family = _family(checkpoint, found, form, said)
    bias = family.bias(checkpoint.config if config is None else config)
    weights = {
        module: _weight(tensors, module, form, family, scales, bias) for module in _in_order(tensors, found, form)
    }
    return _readable(checkpoint, layout, family, weights)


def _forms() -> Iterator[tuple[Layout, Form]]:
    for layout in LAYOUTS:
        for form in (layout.projection, layout.bank):
            if form is not None:
                yield layout, form


def _check_orphans(tensors: Mapping[str, Tensor], modules: Collection[str], form: Form) -> None:
    """Raise for codes with block scales and no tensor scale: they would be carried along as if they were no weights."""
    for name, tensor in tensors.items():
        module = name.removesuffix(form.suffixes.block_scale)
        if tensor.dtype == DTYPES.block_scale and module != name and module not in modules:
            codes = tensors.get(form.names(module).codes)
            if codes is not None and codes.dtype == DTYPES.codes:
                expected = form.names(module).tensor_scale
                raise PartnerError(f"{tensor.path}: {tensor}: expected {expected!r} in one of the shards")


def _in_order(tensors: Mapping[str, Tensor], modules: Iterable[str], form: Form) -> list[str]:
    """Modules in the order of their codes; those without any first, so that they are named."""
    places = {name: place for place, name in enumerate(tensors)}
    return sorted(modules, key=lambda module: places.get(form.names(module).codes, -1))


def _family(checkpoint: Checkpoint, modules: Iterable[str], form: Form, said: str) -> Family:
    """The first family whose patterns fit all modules; the one that is said, if it is among those that do."""
    names = list(modules)
    fits = [
        family
        for family in FAMILIES
        if family.bank == form.transposed
        and (family.described is None or family.name == said)
        and all(re.search(family.casts, name) for name in names)
        and any(re.search(family.module, name + family.codes.text) for name in names)
    ]
    if not fits:
        raise UnsupportedError(f"{checkpoint.path}: no family of MXFP4 checkpoints has weights named {names[0]!r}")
    return next((family for family in fits if family.name == said), fits[0])


def _weight(tensors: Mapping[str, Tensor], module: str, form: Form, family: Family, scales: str, bias: int) -> Weight:
    names = form.names(module)
    for name in names[:3]:
        if name not in tensors:
            raise PartnerError(f"{tensors[names.tensor_scale].path}: {module}: expected {name!r} in one of the shards")
    codes, block_scales, tensor_scale = (tensors[name] for name in names[:3])
    *experts, rows, width = codes.shape if len(codes.shape) > 1 else (1, *codes.shape)
    if form.transposed:
        rows, width = width, rows
    shape = (*experts, rows, width * 2)
    expected = form.tensors(module, shape, "w4a16")
    for tensor in (codes, block_scales):
        if (tensor.dtype, tensor.shape) != expected[tensor.name] or not tensor.nbytes:
            raise ShapeError(f"{tensor.path}: {tensor}: expected {expected[tensor.name]} beside {codes}")
    if len(shape) != 2 + form.transposed or shape[-1] % MX_BLOCK:
        raise ShapeError(f"{codes.path}: {codes}: expected rows of whole MXFP4 blocks of {MX_BLOCK} weights")
    if tensor_scale.dtype != DTYPES.tensor_scale or tensor_scale.shape not in _SCALAR_SHAPES:
        raise ShapeError(
            f"{tensor_scale.path}: {tensor_scale}: expected one {DTYPES.tensor_scale} for the whole weight"
        )
    return Weight(_pair(module, shape, codes, family, scales, bias), form, codes, block_scales, tensor_scale)


def _pair(module: str, shape: tuple[int, ...], at: Tensor, family: Family, scales: str, bias: int) -> Pair:
    blocks = (*shape[:-1], shape[-1] // MX_BLOCK)
    dtypes = family.scales.dtypes
    dtype = scales if scales in dtypes else "U8" if "U8" in dtypes else dtypes[0]
    packed = (*blocks, MX_BLOCK_BYTES) if family.bank else (*shape[:-1], shape[-1] // 2)
    count = at.nbytes // MX_BLOCK_BYTES
    return Pair(
        module,
        Tensor(module + family.codes.text, family.codes.dtypes[0], packed, 0, at.nbytes, at.path),
        Tensor(module + family.scales.text, dtype, blocks, 0, count, at.path),
        bias,
        family.bank,
    )


def _readable(checkpoint: Checkpoint, layout: Layout, family: Family, weights: Mapping[str, Weight]) -> Readable:
    tensors, cast = checkpoint.tensors, [weight.pair for weight in weights.values()]
    form = layout.form(family.bank)
    inputs = [name for module in weights if (name := form.names(module).input_scale) in tensors]
    # Scales of an FP8 KV cache that are no part of a source are told from modules' own by what they hold.
    cached = [
        name
        for name, tensor in tensors.items()
        if name.endswith(layout.kv_scales) and (tensor.dtype, tensor.shape) == (DTYPES.tensor_scale, form.scalar_shape)
    ]
    replaced = {name for module in weights for name in form.names(module)[:3]} | {*inputs, *cached}
    rest = [tensor for name, tensor in tensors.items() if name not in replaced]
    target = Target(layout, "w4a4" if inputs else "w4a16", family)
    source = Source(checkpoint, family, {pair.module: pair for pair in cast})
    return Readable(source, target, Selection(cast, replaced, rest), weights, [*inputs, *cached])
