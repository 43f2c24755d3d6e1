"""A layout of NVFP4 checkpoints as data: names, dtypes and shapes that its writer and its readers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import UNQUANTIZED, Tensor
from fp4cast.errors import UnsupportedError, UsageError
from fp4cast.families.family import Family, Pair, Source
from fp4cast.formats import NV_BLOCK, Activations, Fp8, KvCache


class Names(NamedTuple):
    """One entry for each of the four tensors of an NVFP4 weight: names, suffixes or dtypes."""

    codes: str
    block_scale: str
    tensor_scale: str
    input_scale: str


DTYPES = Names("U8", "F8_E4M3", "F32", "F32")


@dataclass(frozen=True, slots=True)
class Form:
    """How one NVFP4 weight is stored.

    Attributes:
        suffixes: of the four tensors, after the module's name.
        transposed: the output channel comes last, [E, K/2, N], as ModelOpt writes banks of experts.
        reciprocal: tensor scales are stored as 1/S, in a tensor of shape [1].
    """

    suffixes: Names
    transposed: bool = False
    reciprocal: bool = False

    def names(self, module: str) -> Names:
        """The names of a module's four tensors."""
        codes, block_scale, tensor_scale, input_scale = self.suffixes
        return Names(module + codes, module + block_scale, module + tensor_scale, module + input_scale)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the packed codes of a weight [.., N, K]."""
        return _kinds(self, shape)[0][1]

    def block_scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the E4M3 block scales of a weight [.., N, K]."""
        return _kinds(self, shape)[1][1]

    @property
    def scalar_shape(self) -> tuple[int, ...]:
        """Shape of tensor scales and input scales."""
        return (1,) if self.reciprocal else ()

    def tensors(
        self, module: str, shape: tuple[int, ...], activations: Activations
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every tensor of a weight [.., N, K], by name; W4A16 has no input scale."""
        kinds = _kinds(self, shape) if activations == "w4a4" else _kinds(self, shape)[:-1]
        return dict(zip(self.names(module), kinds, strict=False))


@lru_cache(maxsize=1024)
def _kinds(form: Form, shape: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(dtype, shape) of the four tensors of a weight [.., N, K]."""
    *bank, rows, columns = shape

    def oriented(weights: int) -> tuple[int, ...]:
        """The stored shape, with one byte for so many weights along K."""
        bytes_ = columns // weights
        return (*bank, bytes_, rows) if form.transposed else (*bank, rows, bytes_)

    return tuple(zip(DTYPES, (oriented(2), oriented(NV_BLOCK), form.scalar_shape, form.scalar_shape), strict=True))


@dataclass(frozen=True, eq=False)
class Writing:
    """Everything that the documents of a new checkpoint are made from.

    Attributes:
        checkpoint: the source.
        config: its config.json, a copy to change.
        target: how the new one is stored.
        modules: the modules that become NVFP4.
        kept: the weight matrices that are not cast, by module, sorted.
        bank: some of `modules` are banks of experts in one tensor.
        producer: the value of the field of that name.
        fp8: the modules that become FP8.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    target: Target
    modules: Sequence[str]
    kept: Mapping[str, Tensor]
    bank: bool
    producer: dict[str, str]
    fp8: Collection[str] = ()


@dataclass(frozen=True, eq=False)
class Layout:
    """A layout of NVFP4 checkpoints.

    Attributes:
        name: the value of `--layout`.
        projection: how one projection is stored.
        bank: how a bank of experts is stored; None where no engine reads one.
        documents: returns the config files by name. Conversion calls it; verification never does, and reads the files
            with `engine_view`.
        kv_scales: the suffixes of an FP8 KV cache's scales, for keys and for values, after the attention's name.
        writes_constants: the readers need these scales even where they are 1.
    """

    name: str
    projection: Form
    bank: Form | None
    documents: Callable[[Writing], dict[str, dict[str, Any]]]
    kv_scales: tuple[str, str]
    writes_constants: bool = False

    def form(self, bank: bool) -> Form:
        """How a projection or a bank is stored.

        Raises:
            UsageError: the layout has no banks.
        """
        form = self.bank if bank else self.projection
        if form is None:
            raise UsageError(f"no engine reads banks of experts in the {self.name} layout; use another --layout")
        return form


@dataclass(frozen=True, eq=False)
class Target:
    """A layout for one family.

    Attributes:
        layout: how tensors are named and stored.
        activations: "w4a16" (no activation scale) or "w4a4".
        family: the source's.
        kv_cache: the format of the KV cache.
        fp8: the other weights that are FP8.
    """

    layout: Layout
    activations: Activations
    family: Family
    kv_cache: KvCache = "none"
    fp8: Fp8 = "none"

    @cached_property
    def form(self) -> Form:
        """How the family's pairs are stored."""
        return self.layout.form(self.family.bank)

    @property
    def result(self) -> Family:
        """The family under the name that the result has in the rows of `families.served`."""
        return self.family if self.fp8 == "none" else replace(self.family, known_as=f"{self.family.served_as}+fp8")

    @property
    def served(self) -> str:
        """Which engines read the result, for people."""
        return self.result.served(self.layout.name, self.activations)

    def serving_command(self, path: str) -> str:
        """The command that serves the result at a path, for people."""
        return self.result.serving_command(self.layout.name, self.activations, path)

    def names(self, module: str) -> Names:
        """The names of the four tensors of a module of the family."""
        return self.form.names(module)

    def casts(self, pair: Pair) -> bool:
        """Whether a pair is cast; otherwise it stays MXFP4."""
        family = self.family
        keeps = family.keeps is not None and re.search(family.keeps, pair.module)
        return re.search(family.casts, pair.module) is not None and not keeps


@dataclass(frozen=True)
class Selection:
    """What a target makes of a source's tensors.

    Attributes:
        cast: the pairs that become NVFP4.
        replaced: the names of their tensors.
        untouched: the other tensors, which stay as they are.
        quantized: by module, weights that are unquantized in the source and NVFP4 in the destination; only `ptq` does
            that.
        fp8: by module, weights that are unquantized in the source and FP8 in the destination.
    """

    cast: Sequence[Pair]
    replaced: Collection[str]
    untouched: Sequence[Tensor]
    quantized: Mapping[str, Tensor] = field(default_factory=dict)
    fp8: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[str]:
        """The names of all that is NVFP4."""
        return [*(pair.module for pair in self.cast), *self.quantized]

    def with_quantized(self, modules: Collection[str]) -> Selection:
        """The same, with those of the modules quantized whose weight is an untouched matrix."""
        found = self._matrices(modules)
        return replace(self._without(found), quantized=found) if found else self

    def with_fp8(self, modules: Collection[str]) -> Selection:
        """The same, with those of the modules in FP8 whose weight is an untouched matrix in BF16."""
        matrices = self._matrices(modules).items()
        found = {name: tensor for name, tensor in matrices if tensor.dtype == "BF16" and tensor.nbytes}
        return replace(self._without(found), fp8=found) if found else self

    def _matrices(self, modules: Collection[str]) -> dict[str, Tensor]:
        """By module, the untouched matrices of some modules, in the order of the checkpoint."""
        if not modules:
            return {}
        names = {f"{module}.weight": module for module in modules}
        return {
            names[tensor.name]: tensor
            for tensor in self.untouched
            if tensor.name in names and tensor.dtype in UNQUANTIZED and len(tensor.shape) == 2
        }

    def _without(self, found: Mapping[str, Tensor]) -> Selection:
        """The same, with some matrices replaced."""
        gone = {tensor.name for tensor in found.values()}
        rest = [tensor for tensor in self.untouched if tensor.name not in gone]
        return replace(self, replaced={*self.replaced, *gone}, untouched=rest)


def select(source: Source, target: Target) -> Selection:
    """Separate what is cast from what stays."""
    return selection_of(source, [pair for pair in source.pairs.values() if target.casts(pair)])


def selection_of(source: Source, cast: Sequence[Pair]) -> Selection:
    """The selection that casts these pairs, and no others."""
    replaced = {name for pair in cast for name in (pair.codes.name, pair.scales.name)}
    tensors = source.checkpoint.tensors
    return Selection(cast, replaced, [tensor for name, tensor in tensors.items() if name not in replaced])


def castable(source: Source, target: Target) -> Selection:
    """Like `select`, for a source of which something must be cast.

    Raises:
        UnsupportedError: nothing is.
    """
    selection = select(source, target)
    if not selection.cast:
        raise UnsupportedError(
            f"{source.checkpoint.path}: {len(source.pairs)} MXFP4 tensors, but none that the {target.layout.name} "
            f"layout of {source.family.title} casts; nothing was written"
        )
    return selection
