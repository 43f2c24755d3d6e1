"""Export a quantized model in memory to a Hugging Face directory, with the targets and the writer of `convert`.

Quantized weights come from the model, everything else byte for byte from the checkpoint that it was loaded from: no
tensor that transformers does not know is lost, and none changes its dtype.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from torch import nn

from fp4cast.checkpoints.checksums import Checksum
from fp4cast.checkpoints.directory import RECEIPT, Checkpoint, check_stamps, companion_sizes, open_checkpoint
from fp4cast.checkpoints.json_files import json_bytes
from fp4cast.conversion.destination import check_destination, real_path
from fp4cast.conversion.execute import Finished, execute
from fp4cast.conversion.recipe import FromModel, Output, OutputShard, index, kv_constants, kv_scales, nvfp4, place
from fp4cast.conversion.staging import ONCE, Staging, staging
from fp4cast.errors import VerificationError
from fp4cast.formats import NV_BLOCK
from fp4cast.layouts.documents import documents
from fp4cast.layouts.layout import Target
from fp4cast.parallel.engines import Engine, Threads
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.ptq.attention import calibrated_kv_scales
from fp4cast.ptq.exported import Exported, WeightCounts
from fp4cast.ptq.model_weights import ReadRows, Weight, calibrated_weights, check_untouched
from fp4cast.ptq.opened import OpenedModel, model_target, open_model
from fp4cast.ptq.read_back import read_back
from fp4cast.verification.figures import InexactTensor
from fp4cast.verification.kv_cache import kv_scales_digest, kv_scales_of
from fp4cast.verification.receipt import Receipt, weight_digest


def export(
    model: nn.Module,
    destination: str | Path,
    source: str | Path,
    *,
    layout: str = "modelopt",
    kv_cache_qformat: str | None = None,
    lossless: Collection[str] = (),
    cast: Collection[str] = (),
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress = ignore,
) -> Exported:
    """Write a quantized model as an NVFP4 checkpoint.

    Args:
        model: calibrated, as `max_calibrate` or `apply_to_model` leave it.
        destination: the directory to make; it is published when it is complete.
        source: the checkpoint that the model was loaded from: a directory or a model id.
        layout: "modelopt", or "compressed-tensors" for models without batched experts.
        kv_cache_qformat: as in `Options`; None for "fp8" where `attach` quantized the KV cache, else "none".
        lossless: modules whose written weights must equal the source's MXFP4 ones.
        cast: modules that `apply_to_model` has set, which may be rounded to the nearest; all other inexact ones are
            no casts, and `verify` says so.
        overwrite: replace an existing `destination`, once the new one is complete.
        jobs: threads; None for one a core.
        progress: called, from worker threads, with (phase, bytes just done, bytes in all).

    Raises:
        QuantizerError: a quantizer is not calibrated, or a weight is not one of the source's.
        CheckpointError: a parameter that is not quantized differs from the source's.
        VerificationError: a weight in `lossless` lost a value; nothing is published.
        DestinationError: `destination` cannot be written.
    """
    opened = open_model(source)
    check_destination(opened.checkpoint.path, real_path(destination), overwrite=overwrite)
    target = model_target(opened, model, layout, kv_cache_qformat)
    return write_model(
        model,
        destination,
        opened,
        target,
        lossless=lossless,
        cast=cast,
        overwrite=overwrite,
        jobs=jobs,
        progress=progress,
    )


def write_model(
    model: nn.Module,
    destination: str | Path,
    opened: OpenedModel,
    target: Target,
    *,
    lossless: Collection[str],
    cast: Collection[str],
    overwrite: bool,
    jobs: int | None,
    progress: Progress,
    read: ReadRows | None = None,
) -> Exported:
    """Like `export`, with an open checkpoint and a chosen target; `read` as in `calibrated_weights`."""
    begin, checkpoint = time.monotonic(), opened.checkpoint
    weights = calibrated_weights(model, opened, target, read)
    replaced = {tensor.name for weight in weights for tensor in weight.replaces}
    check_untouched(model, checkpoint, replaced)
    engine = Threads(jobs)  # what the weights are made from is in this process
    shards = list(place(checkpoint, _outputs(weights), _kv_outputs(model, checkpoint, target)))
    files, companions = _documents(checkpoint, target, weights, replaced, shards), companion_sizes(checkpoint)
    with staging(checkpoint.path, real_path(destination), overwrite=overwrite, keep=False) as stage:
        written = _write(shards, companions, stage, engine, progress)
        check_stamps(checkpoint, opened.stamps, "export")
        noted = stage.write_documents(files, companions, checkpoint)
        noted |= {name: shard.checksum for name, shard in written.items()}
        inexact = read_back(weights, target, stage, engine, progress)
        _check_lossless(inexact, lossless, destination)
        stage.write_receipt(
            RECEIPT, _receipt(weights, target, checkpoint.tensors, stage, inexact, cast, noted).to_bytes()
        )
        stage.publish(checkpoint.path, overwrite=overwrite)
    return Exported(
        source=str(checkpoint.path),
        destination=str(destination),
        layout=target.layout.name,
        activations=target.activations,
        kv_cache_qformat=target.kv_cache,
        tensors=_counts(weights, len(inexact), len(checkpoint.tensors) - len(replaced)),
        inexact=inexact,
        bytes={
            "read": sum(shard.size for shard in checkpoint.shards.values()),
            "written": sum(shard.layout.size for shard in shards),
        },
        seconds=time.monotonic() - begin,
        served=target.served,
        serve=_serve(opened, weights, target, str(destination)),
    )


def _serve(opened: OpenedModel, weights: Sequence[Weight], target: Target, destination: str) -> str:
    """The command that serves an export; a sentence where no engine was run or read with such a model."""
    if opened.source is not None and all(weight.pair is not None for weight in weights):
        return target.serving_command(destination)
    title = target.family.title
    what = "this model" if opened.source is None else f"{title} with more than its MXFP4 weights quantized"
    return (
        f"not known: no row of docs/engines.md says which engine serves {what}; "
        f"those about the {target.layout.name} layout: {target.served}"
    )


def _counts(weights: Sequence[Weight], inexact: int, copied: int) -> WeightCounts:
    pairs = sum(weight.pair is not None for weight in weights)
    return {"quantized": len(weights), "exact": pairs - inexact, "inexact": inexact, "copied": copied}


def _write(
    shards: Sequence[OutputShard],
    companions: Mapping[PurePosixPath, int],
    stage: Staging,
    engine: Engine,
    progress: Progress,
) -> dict[str, Finished]:
    """Write all shards; returns what was noted of each."""
    fingerprint = ONCE + os.urandom(16).hex()  # for this run alone: an export from memory cannot be resumed
    stage.adopt(fingerprint)
    sizes = {shard.file: shard.layout.size for shard in shards}
    total = sum(sizes.values())
    stage.check_space(sizes | {str(name): size for name, size in companions.items()})

    def count(nbytes: int) -> None:
        progress("write", nbytes, total)

    return execute(shards, stage.out, fingerprint=fingerprint, state=stage.state, engine=engine, progress=count)


def _documents(
    checkpoint: Checkpoint,
    target: Target,
    weights: Sequence[Weight],
    replaced: Collection[str],
    shards: Sequence[OutputShard],
) -> dict[str, bytes]:
    """The index and the configs, as bytes by name."""
    modules, bank = [weight.module for weight in weights], any(weight.bank for weight in weights)
    files = documents(checkpoint, target, modules, replaced, bank=bank)
    return index(shards) | {name: json_bytes(document) for name, document in files.items()}


def _receipt(
    weights: Sequence[Weight],
    target: Target,
    source: Collection[str],
    stage: Staging,
    inexact: Sequence[InexactTensor],
    cast: Collection[str],
    noted: Mapping[str, Checksum],
) -> Receipt:
    """The receipt: what is no cast, and digests of what the source does not determine."""
    written = open_checkpoint(stage.out, stage.config).tensors
    cache = kv_scales_of(target.layout, source, written)
    facts = {
        "layout": target.layout.name,
        "activations": target.activations,
        "kv_cache_qformat": target.kv_cache,
        "inexact": [tensor.to_json() for tensor in inexact],
    }
    return Receipt(
        facts,
        digests={tensor.name: weight_digest(target.names(tensor.name), written) for tensor in inexact},
        files=noted,
        kv_scales=kv_scales_digest(cache) if target.kv_cache != "none" else None,
        quantized=frozenset(weight.module for weight in weights if weight.pair is None)
        | {tensor.name for tensor in inexact if tensor.name not in cast},
    )


def _check_lossless(inexact: Sequence[InexactTensor], lossless: Collection[str], destination: str | Path) -> None:
    if wrong := [tensor for tensor in inexact if tensor.name in lossless]:
        first = f"{wrong[0].name} ({wrong[0].rounded_half_blocks} half-blocks, SNR {wrong[0].snr_db:.1f} dB)"
        raise VerificationError(
            f"{destination}: {len(wrong)} of {len(lossless)} weights that the cast keeps were written with other "
            f"values, the first is {first}; nothing was published. Do the quantizers still hold what the cast set?"
        )


def _kv_outputs(model: nn.Module, checkpoint: Checkpoint, target: Target) -> dict[str, list[Output]]:
    """The scales of the KV cache, by the source tensor that they are written beside."""
    if target.kv_cache == "fp8":
        return kv_scales(target.layout, checkpoint, calibrated_kv_scales(model))
    return kv_constants(checkpoint, target)


def _outputs(weights: Sequence[Weight]) -> dict[str, list[Output]]:
    """The weights' new tensors, by the source tensor that they replace."""
    new: dict[str, list[Output]] = {}
    for weight in weights:
        shape, experts = tuple(weight.rows.shape), weight.experts
        elements = math.prod(shape) // experts
        codes = FromModel(experts, elements // 2, weight.codes)
        scales = FromModel(experts, elements // NV_BLOCK, weight.block_scales)
        home, block_scales = nvfp4(
            weight.form, weight.module, shape, codes, scales, weight.tensor_scale, weight.input_scale
        )
        new[weight.replaces[0].name] = home
        new.setdefault(weight.replaces[-1].name, []).append(block_scales)
    return new
