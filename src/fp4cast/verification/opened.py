"""Both sides of a verification, opened and recognised; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fp4cast.checkpoints.directory import Checkpoint, gc_paused, open_checkpoint
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.families.family import Source
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.engine_view import Claims, read_claims
from fp4cast.layouts.layout import Selection, Target, select
from fp4cast.verification.kv_cache import KvScales, asks_for_fp8, kv_cache_format, kv_scales_of
from fp4cast.verification.receipt import Receipt


@dataclass(frozen=True)
class Opened:
    """A source, and a destination that claims to be made from it.

    Attributes:
        source: the MXFP4 checkpoint and its pairs.
        destination: the NVFP4 checkpoint.
        config: the name of the destination's config file.
        target: the layout that its config claims.
        claims: what that config says of each module.
        selection: which of the source's tensors that layout casts.
        receipt: the destination's fp4cast.json.
        kv_scales: the scales of its KV cache; empty where it does not ask for a quantized one.
    """

    source: Source
    destination: Checkpoint
    config: str
    target: Target
    claims: Claims
    selection: Selection
    receipt: Receipt
    kv_scales: KvScales


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
    found = read_source(source if isinstance(source, Checkpoint) else open_checkpoint(source))
    opened = open_checkpoint(destination, config)
    claims = read_claims(opened.config, destination / config)
    try:
        target = choose_target(found.family, claims.layout, claims.activations)
    except UsageError as error:
        raise CheckpointError(f"{destination}: claims to be {claims.layout} {claims.activations}: {error}") from error
    scales: KvScales = {}
    if asks_for_fp8(claims, found):
        scales = kv_scales_of(target.layout, found.checkpoint.tensors, opened.tensors)
        target = replace(target, kv_cache=kv_cache_format(target.layout, scales))
    receipt = Receipt.read(destination)
    selection = select(found, target).with_quantized(receipt.quantized)
    return Opened(found, opened, config, target, claims, selection, receipt, scales)
