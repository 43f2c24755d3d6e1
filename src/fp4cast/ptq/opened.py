"""A model's checkpoint and the target of its export: opened and chosen once, then passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fp4cast.checkpoints.directory import Checkpoint, Stamps, open_checkpoint, stamp
from fp4cast.errors import QuantizerError, UnsupportedError
from fp4cast.families.compressed_tensors import COMPRESSED_TENSORS
from fp4cast.families.family import Family, Pair, Source
from fp4cast.families.gpt_oss import GPT_OSS
from fp4cast.families.recognise import read_source
from fp4cast.families.services import ANY_BANKS
from fp4cast.formats import Activations
from fp4cast.hub.resolve import resolve
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.layout import Target
from fp4cast.ptq.attention import quantizes_kv_cache
from fp4cast.ptq.modules import input_quantizer, is_bank, quantized_weights


@dataclass(frozen=True)
class OpenedModel:
    """The checkpoint that a model is loaded from.

    Attributes:
        checkpoint: the opened directory.
        stamps: its shards', taken before any of them was read.
        source: its MXFP4 tensors; None where it holds none.
        why_not: why it is not an MXFP4 checkpoint, for people.
    """

    checkpoint: Checkpoint
    stamps: Stamps
    source: Source | None
    why_not: str = ""

    @property
    def pairs(self) -> Mapping[str, Pair]:
        """Its MXFP4 tensors by module."""
        return self.source.pairs if self.source is not None else {}


def open_model(path: str | Path) -> OpenedModel:
    """Open a model's checkpoint, quantized in MXFP4 or not.

    Raises:
        CheckpointError: it is malformed.
    """
    checkpoint = open_checkpoint(resolve(path))
    stamps = stamp(checkpoint)
    try:
        return OpenedModel(checkpoint, stamps, read_source(checkpoint))
    except UnsupportedError as error:
        return OpenedModel(checkpoint, stamps, None, str(error))


def model_target(opened: OpenedModel, model: nn.Module, layout: str, kv_cache: str | None = None) -> Target:
    """Choose the target that stores a model's quantized weights.

    Args:
        opened: the model's checkpoint.
        model: with quantizers; it may be on the meta device.
        layout: the name of the layout.
        kv_cache: the format of the KV cache; None for fp8 where the model has quantizers for it, else none.

    Raises:
        QuantizerError: nothing is quantized.
        UsageError: the model has no such layout.
    """
    names = [name for name, *_ in quantized_weights(model)]
    if not names:
        raise QuantizerError(f"{type(model).__name__}: no weight is quantized, so there is nothing to export")
    activations: Activations = "w4a4" if any(input_quantizer(model, name).is_enabled for name in names) else "w4a16"
    family = _family(opened, any(map(is_bank, names)))
    cache = kv_cache or ("fp8" if quantizes_kv_cache(model) else "none")
    return choose_target(family, layout, activations, opened.checkpoint.path, cache)


# A BF16 model is written like the family whose weights look like its own; what serves it depends on the model.
_PROJECTIONS = replace(COMPRESSED_TENSORS, title="models of linear layers")
_BANKS = replace(
    GPT_OSS,
    title="models with banks of experts",
    known_as=ANY_BANKS,
)


def _family(opened: OpenedModel, banks: bool) -> Family:
    if opened.source is not None:
        return opened.source.family
    return _BANKS if banks else _PROJECTIONS
