"""The table of target layouts: how an NVFP4 tensor is named, shaped and oriented, and who can serve it.

`configs` writes the documents that go with each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fp4cast.errors import UsageError
from fp4cast.families.recognise import Family, Pair
from fp4cast.formats import NV_BLOCK

__all__ = ["MODELOPT", "MODELOPT_FUSED", "Activations", "LayoutName", "Names", "Target", "choose_target"]

LayoutName = Literal["modelopt", "compressed-tensors"]
Activations = Literal["w4a16", "w4a4"]

LAYOUTS: tuple[LayoutName, ...] = ("modelopt", "compressed-tensors")
ACTIVATIONS: tuple[Activations, ...] = ("w4a16", "w4a4")


class Names(NamedTuple):
    """What the four tensors of one NVFP4 weight are called."""

    codes: str
    block_scale: str
    tensor_scale: str
    input_scale: str


@dataclass(frozen=True)
class Target:
    """A layout for one family.

    Attributes:
        layout: "modelopt" or "compressed-tensors".
        activations: "w4a16" (no activation scale) or "w4a4".
        family: the source family's name.
        suffixes: of the four tensors, after the module's name.
        transposed: banks of experts are [E, K/2, N] with the output channel last, as ModelOpt writes gpt-oss.
        reciprocal: tensor scales are stored as 1/S, in a tensor of shape [1].
        served: where the result can be served today, in words.
    """

    layout: LayoutName
    activations: Activations
    family: str
    suffixes: Names
    transposed: bool
    reciprocal: bool
    served: str

    def casts(self, pair: Pair) -> bool:
        """Whether a pair is cast. DeepSeek-V4's hybrid casts routed experts; its MTP experts stay MXFP4."""
        if self.family == "deepseek-v4":
            return ".ffn.experts." in pair.module and not pair.module.startswith("mtp.")
        return True

    def names(self, module: str) -> Names:
        """The names of a module's four tensors."""
        return Names(*(module + suffix for suffix in self.suffixes))

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the packed codes of a weight [.., N, K]."""
        return self._oriented(shape, 2)

    def block_scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the E4M3 block scales of a weight [.., N, K]."""
        return self._oriented(shape, NV_BLOCK)

    def _oriented(self, shape: tuple[int, ...], weights: int) -> tuple[int, ...]:
        """With one byte for so many weights along K."""
        *bank, rows, columns = shape
        columns //= weights
        return (*bank, columns, rows) if self.transposed else (*bank, rows, columns)

    @property
    def scalar_shape(self) -> tuple[int, ...]:
        """Shape of tensor scales and input scales."""
        return (1,) if self.reciprocal else ()

    @property
    def algorithm(self) -> str:
        """ModelOpt's name for the quantization of a cast layer."""
        return "NVFP4" if self.activations == "w4a4" else "W4A16_NVFP4"


MODELOPT = Names(".weight", ".weight_scale", ".weight_scale_2", ".input_scale")
MODELOPT_FUSED = Names("", "_weight_scale", "_weight_scale_2", "_input_scale")
_COMPRESSED = Names(".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")

# Where each family can be served, from reading vLLM 0.32/0.33 and SGLang 0.5.23.
_SERVED = {
    ("gpt-oss", "modelopt"): "transformers, with fp4cast.hf; no released engine yet (ModelOpt's own fused layout)",
    ("deepseek-v4", "modelopt"): "vLLM and SGLang, as W4A4 experts beside FP8 (MTP experts stay MXFP4)",
    ("kimi-k3", "modelopt"): "vLLM and SGLang (ModelOpt MIXED_PRECISION)",
    ("kimi-k3", "compressed-tensors"): "vLLM",
    ("compressed-tensors", "modelopt"): "vLLM and SGLang",
    ("compressed-tensors", "compressed-tensors"): "vLLM and SGLang; transformers for dense models only",
}


def choose_target(family: Family, layout: str = "modelopt", activations: str | None = None) -> Target:
    """The target for a family.

    Args:
        family: of the source.
        layout: one of `LAYOUTS`.
        activations: one of `ACTIVATIONS`; None for w4a16 where the family can be served so.

    Raises:
        UsageError: the family has no such layout, or cannot be served with such activations.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; expected {' or '.join(LAYOUTS)}")
    if activations is not None and activations not in ACTIVATIONS:
        raise UsageError(f"unknown activations {activations!r}; expected {' or '.join(ACTIVATIONS)}")
    served = _SERVED.get((family.name, layout))
    if served is None:
        raise UsageError(f"no engine reads {family.title} in the {layout} layout; use --layout modelopt")
    if family.name == "deepseek-v4" and activations != "w4a4":
        raise UsageError(
            "engines serve NVFP4 DeepSeek-V4 as W4A4 only. Pass --activations w4a4 with --input-scales FILE "
            "(calibrated amax values: fp4cast calibrate finds them) or --input-scales 1.0 (uncalibrated, as NVIDIA's "
            "Kimi-K3 does it)"
        )
    compressed = layout == "compressed-tensors"
    suffixes = _COMPRESSED if compressed else MODELOPT_FUSED if family.blocked else MODELOPT
    return Target(
        layout="compressed-tensors" if compressed else "modelopt",
        activations="w4a4" if activations == "w4a4" else "w4a16",
        family=family.name,
        suffixes=suffixes,
        transposed=family.blocked,
        reciprocal=compressed,
        served=served,
    )
