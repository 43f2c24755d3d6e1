"""Both sides of a verification, opened and recognised; no weight is read.

One side is MXFP4 and the other NVFP4, whichever of them was made from the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import QUANT_CONFIG, Checkpoint, gc_paused, open_checkpoint
from fp4cast.checkpoints.json_files import read_json
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.families.family import Source
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.engine_view import Claims, read_claims
from fp4cast.layouts.fp8 import stored_fp8
from fp4cast.layouts.layout import Selection, Target, select, selection_of
from fp4cast.layouts.read_back import holds_nvfp4, read_nvfp4
from fp4cast.verification.foreign import maker
from fp4cast.verification.kv_cache import KvScales, asks_for_fp8, kv_cache_format, kv_scales_of
from fp4cast.verification.receipt import Receipt


@dataclass(frozen=True)
class Opened:
    """A source, and a destination that claims to be made from it.

    Attributes:
        source: the MXFP4 checkpoint and its pairs.
        destination: the NVFP4 checkpoint.
        config: the name of the config file of what was made.
        target: the layout of the NVFP4 one: that which its config claims, or, where another tool wrote it or nobody
            judges it, that which its tensors have.
        claims: what that config says of each module; None where it is not judged, or not understood.
        selection: which of the source's tensors are cast.
        receipt: the fp4cast.json of what was made.
        kv_scales: the scales of its KV cache; empty where it does not ask for a quantized one.
        back: the MXFP4 one was made from the NVFP4 one.
        maker: the tool that made the NVFP4 one, if it was another than fp4cast.
    """

    source: Source
    destination: Checkpoint
    config: str
    target: Target
    claims: Claims | None
    selection: Selection
    receipt: Receipt
    kv_scales: KvScales
    back: bool = False
    maker: str = ""

    @property
    def given(self) -> Checkpoint:
        """What was there first."""
        return self.destination if self.back else self.source.checkpoint

    @property
    def made(self) -> Checkpoint:
        """What was made from it, and is judged."""
        return self.source.checkpoint if self.back else self.destination


@gc_paused()
def open_both(source: Path | Checkpoint, destination: Path, config: str) -> Opened:
    """Open both checkpoints and recognise what they claim to be.

    Args:
        source: the MXFP4 checkpoint: a directory, or opened already, where its shards do not all lie on this machine.
        destination: the directory of the NVFP4 one.
        config: the name of the destination's config file.

    Raises:
        CheckpointError: one of them cannot be read, or the destination claims a target that its source does not have.
    """
    given = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if holds_nvfp4(given.tensors) and not holds_nvfp4((made := open_checkpoint(destination, config)).tensors):
        return _by_names(read_source(made), given, config, Receipt.read(destination), back=True)
    found = read_source(given)
    opened, receipt = open_checkpoint(destination, config), Receipt.read(destination)
    tool = "" if receipt.found else maker(opened.config, _beside(destination))
    if tool and holds_nvfp4(opened.tensors):
        return _by_names(found, opened, config, receipt, maker=tool)
    claims = read_claims(opened.config, destination / config)
    try:
        target = choose_target(found.family, claims.layout, claims.activations)
    except UsageError as error:
        raise CheckpointError(f"{destination}: claims to be {claims.layout} {claims.activations}: {error}") from error
    scales: KvScales = {}
    if asks_for_fp8(claims, found):
        scales = kv_scales_of(target.layout, found.checkpoint.tensors, opened.tensors)
        target = replace(target, kv_cache=kv_cache_format(target.layout, scales))
    selection = select(found, target).with_quantized(receipt.quantized).with_fp8(claims.fp8)
    if selection.fp8:
        target = replace(target, fp8="attention")
    return Opened(found, opened, config, target, claims, selection, receipt, scales)


def _by_names(
    source: Source, nvfp4: Checkpoint, config: str, receipt: Receipt, *, back: bool = False, maker: str = ""
) -> Opened:
    """Both sides, where the tensors say what is cast, and not the NVFP4 one's config."""
    target = read_nvfp4(nvfp4, source.family.name).target
    if target.family.bank != source.family.bank:
        raise CheckpointError(f"{nvfp4.path}: expected NVFP4 weights of {source.family.title}, got others")
    target = replace(target, family=source.family)
    cast = [pair for pair in source.pairs.values() if target.names(pair.module).tensor_scale in nvfp4.tensors]
    scales = kv_scales_of(target.layout, source.checkpoint.tensors, nvfp4.tensors)
    if scales and not back:
        target = replace(target, kv_cache=kv_cache_format(target.layout, scales))
    selection = selection_of(source, cast)
    if not back:
        selection = selection.with_fp8(stored_fp8(nvfp4.tensors))
    return Opened(source, nvfp4, config, target, None, selection, receipt, scales, back=back, maker=maker)


def _beside(path: Path) -> dict[str, Any] | None:
    return read_json(path / QUANT_CONFIG) if (path / QUANT_CONFIG).is_file() else None
