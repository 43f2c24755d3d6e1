"""A family of MXFP4 checkpoints as data: everything in which families differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.tiles import Tiling
from fp4cast.families.attention import Attention
from fp4cast.families.served import served_by, serving_command
from fp4cast.formats import E8M0_BIAS, MX_BLOCK, Activations


class Suffix(NamedTuple):
    """The end of some tensors' names, and their safetensors dtypes."""

    text: str
    dtypes: tuple[str, ...]


# The hint of a family that engines serve as W4A4 only.
W4A4_ALONE = (
    "Pass --activations w4a4 with --input-scales FILE (calibrated amax values: fp4cast calibrate finds them) or "
    "--input-scales 1.0 (uncalibrated, as NVIDIA's Kimi-K3 does it)"
)


def _standard_bias(_: Mapping[str, Any]) -> int:
    return E8M0_BIAS


def _plain_section(_: Mapping[str, Any], __: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "mxfp4"}


@dataclass(frozen=True, eq=False)
class Family:
    """How one family of checkpoints spells, stores and serves MXFP4 weights.

    All families store two E2M1 codes a byte, low nibble = even element along K, and row-major E8M0 scales.

    Attributes:
        name: for JSON documents.
        title: for people.
        codes: the codes' suffix after the module's name, and their dtypes.
        scales: the scales' suffix and dtypes.
        layouts: the names of the layouts that are offered; `families.served` says which engine reads each.
        bank: one tensor holds all experts of a layer, codes [E, N, K/32, 16]; otherwise one projection, [N, K/2].
        module: a pattern that the module of some codes matches in every checkpoint of the family.
        ambiguous: other tensors are named and typed like codes; only those whose module matches must have scales.
        casts: a pattern of the modules that become NVFP4.
        keeps: a pattern of those that stay MXFP4 nevertheless; None if there are none.
        activations: those that engines serve.
        hint: what to do, for the error when the user asks for other activations.
        aliases: (pattern, what engines may call that part of a module's name), applied one after the other.
        beside_fp8: names and patterns that the config lists as not NVFP4, for checkpoints that are FP8 but for the
            experts; empty if engines read no such config of this family.
        drops: keys of such a config's quantization_config that speak of MXFP4, and would make engines read it.
        kv_cache: engines keep the KV cache as the config says.
        bias: returns the exponent bias of the scale bytes, given config.json.
        described: whether a checkpoint's configs say that it is the family's, where others name their tensors alike;
            None where names and dtypes suffice.
        known_as: its name in the rows of `families.services`, if another.
        section: returns the quantization_config of an MXFP4 checkpoint, given the one of an NVFP4 checkpoint and the
            modules that are not quantized: for the way back, where no receipt holds the original's.
        home: the keys that lead to it in config.json.
        attention: what `--fp8 attention` quantizes; None where no engine that we know reads that.
    """

    name: str
    title: str
    codes: Suffix
    scales: Suffix
    layouts: tuple[str, ...]
    bank: bool = False
    module: str = ""
    ambiguous: bool = False
    casts: str = ""
    keeps: str | None = None
    activations: tuple[Activations, ...] = ("w4a16", "w4a4")
    hint: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    beside_fp8: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    kv_cache: bool = True
    bias: Callable[[Mapping[str, Any]], int] = _standard_bias
    described: Callable[[Checkpoint], bool] | None = None
    known_as: str = ""
    section: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]] = _plain_section
    home: tuple[str, ...] = ("quantization_config",)
    attention: Attention | None = None

    @property
    def served_as(self) -> str:
        """Its name in the rows of `families.services`."""
        return self.known_as or self.name

    def served(self, layout: str, activations: Activations) -> str:
        """Which engines read a result, for people."""
        return served_by(self.served_as, layout, activations)

    def serving_command(self, layout: str, activations: Activations, path: str) -> str:
        """The command that serves the result, for people."""
        return serving_command(self.served_as, layout, activations, path)


@dataclass(frozen=True, slots=True)
class Pair:
    """One MXFP4 tensor.

    Attributes:
        module: the name that both tensors share, `model.layers.0.mlp.experts.gate_up_proj`.
        codes: uint8 codes, [N, K/2], or [E, N, K/32, 16] of a bank.
        scales: E8M0 bytes, [N, K/32] or [E, N, K/32].
        bias: exponent k is a scale byte minus this.
        bank: all experts of a layer in one tensor.
    """

    module: str
    codes: Tensor
    scales: Tensor
    bias: int = E8M0_BIAS
    bank: bool = False

    @property
    def experts(self) -> int:
        """E of a bank of experts, 1 for a single projection."""
        return self.scales.shape[0] if self.bank else 1

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.scales.shape[-2]

    @property
    def row_blocks(self) -> int:
        """K / 32."""
        return self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] of a projection, [E, N, K] of a bank of experts."""
        return (*self.scales.shape[:-1], self.row_blocks * MX_BLOCK)

    @property
    def blocks(self) -> int:
        """MX blocks of the whole tensor."""
        return self.scales.nbytes

    @property
    def elements(self) -> int:
        """Weights of the whole tensor."""
        return self.blocks * MX_BLOCK

    @property
    def tiling(self) -> Tiling:
        """The tiles of a bank."""
        return Tiling.of(self.experts, self.rows, self.row_blocks)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint whose MXFP4 tensors have been found.

    Attributes:
        checkpoint: the opened directory.
        family: the family whose names and dtypes it has.
        pairs: its MXFP4 tensors by module, in the order of their codes.
    """

    checkpoint: Checkpoint
    family: Family
    pairs: Mapping[str, Pair]
