"""The plan of the way back: an NVFP4 checkpoint whose weights are all MXFP4 values becomes the MXFP4 one again.

It is a plan as every other: codes are copied where they stay, transposed banks are turned, scales looked up.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fp4cast.checkpoints.card_files import PICTURE, behind_card
from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG, RECEIPT, Checkpoint, gc_paused, open_checkpoint, stamp
from fp4cast.checkpoints.header import UNQUANTIZED, lay_out
from fp4cast.checkpoints.json_files import json_bytes
from fp4cast.checkpoints.quantization_config import (
    drop_quantization_configs,
    find_quantization_config,
    misplaced_quantization_configs,
    set_quantization_config,
)
from fp4cast.checkpoints.raw_header import digest_of_header
from fp4cast.conversion.destination import companions_to_carry
from fp4cast.conversion.direction import WayBack
from fp4cast.conversion.outside import decode
from fp4cast.conversion.plan import ConvertOptions, Plan
from fp4cast.conversion.recipe import CopyOf, OriginalOf, Output, OutputShard, index, place
from fp4cast.conversion.scan_back import Scanned, explain, scan_weights
from fp4cast.errors import CheckpointError, InexactError, UnsupportedError, UsageError
from fp4cast.layouts.fp8 import stored_fp8
from fp4cast.layouts.layout import Selection, Target
from fp4cast.layouts.read_back import Readable, Weight, read_nvfp4
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.verification.original import Original
from fp4cast.verification.receipt import Receipt


@gc_paused()
def plan_way_back(
    path: Path, options: ConvertOptions, *, jobs: int | None = None, progress: AdvanceOf = ignore
) -> Plan:
    """Read an NVFP4 checkpoint's headers and scales and decide everything; nothing is written.

    Args:
        path: the NVFP4 checkpoint's directory.
        options: nothing but `to` may differ from the defaults, and what decides no byte.
        jobs: threads; None for one a core.
        progress: called with (scale bytes just read, total scale bytes).

    Raises:
        CheckpointError: it is malformed, or holds no NVFP4 weights.
        UsageError: options that mean nothing here.
        InexactError: some weights are no MXFP4 values; the message names them, and the blocks.
    """
    _check_options(options)
    checkpoint = open_checkpoint(path)
    _check_others(checkpoint)
    stamps, receipt = stamp(checkpoint), Receipt.read(path)
    original = receipt.original if receipt.intact else Original()
    config = _parse(original.config)
    said = str(receipt.facts.get("family")) if original != Original() else ""
    found = read_nvfp4(checkpoint, said, original.scales, config or checkpoint.config)
    outside = {
        module: decoded
        for module, text in original.outside.items()
        if module in found.weights and (decoded := decode(text, found.source.pairs[module].blocks)) is not None
    }
    known = scan_weights(list(found.weights.values()), outside, jobs, progress)
    if bad := [module for module, scanned in known.items() if scanned.lost]:
        raise InexactError(f"{path}: {explain(bad, known, found)}")
    new: dict[str, list[Output]] = {name: [] for name in found.selection.replaced}
    for module, weight in found.weights.items():
        new |= _outputs(weight, known[module])
    shards = tuple(_like_original(shard, original.headers) for shard in place(checkpoint, new))
    renamed, companions = _companions(checkpoint, receipt)
    forgotten = {module for module in original.outside if module not in known or known[module].outside is None}
    return Plan(
        source=found.source,
        target=Target(found.target.layout, "w4a16", found.source.family),
        selection=found.selection,
        domains=(),
        shards=shards,
        documents={CONFIG: _config(found, config, original.config), **_beside(original.beside), **index(shards)},
        companions=companions,
        stamps=stamps,
        card=False,
        back=WayBack(original, renamed, original.lost | forgotten, found.dropped),
    )


def _check_options(options: ConvertOptions) -> None:
    names = ("layout", "activations", "input_scales", "inexact", "kv_cache_qformat", "fp8")
    if any(getattr(options, name) != getattr(ConvertOptions(), name) for name in names):
        raise UsageError(
            "--to mxfp4 knows no --layout, --activations, --input-scales, --inexact, --kv-cache-qformat or --fp8: the "
            "original's names and values come back, or nothing is written"
        )


def _check_others(checkpoint: Checkpoint) -> None:
    """Raise for weights that `--fp8`, or another tool, has quantized beside the cast: nothing brings their values back.

    Raises:
        InexactError: there are some.
    """
    if fp8 := stored_fp8(checkpoint.tensors):
        raise InexactError(
            f"{checkpoint.path}: {len(fp8)} weights were quantized to FP8 beside the cast, as {fp8[0]}; nothing was "
            "written. Their values are not the original's any more: only the MXFP4 checkpoint itself has them"
        )


def _outputs(weight: Weight, scanned: Scanned) -> dict[str, list[Output]]:
    """An NVFP4 weight's MXFP4 tensors, by the name of the tensor in whose place they lie."""
    pair, scale, changed = weight.pair, scanned.tensor_scale, scanned.changed > 0
    stays = not changed and not weight.form.transposed
    turned = OriginalOf(weight, scale, scales=False, changed=changed, outside=scanned.outside)
    codes = CopyOf.tensor(weight.codes) if stays else turned
    scales = replace(turned, scales=True)
    return {
        weight.codes.name: [Output(pair.codes.name, pair.codes.dtype, pair.codes.shape, codes)],
        weight.block_scales.name: [Output(pair.scales.name, pair.scales.dtype, pair.scales.shape, scales)],
    }


def _like_original(shard: OutputShard, headers: Mapping[str, str]) -> OutputShard:
    """The shard without the metadata that a conversion adds, where the original's header had none."""
    if headers.get(shard.file) in (None, digest_of_header(shard.layout.header)):
        return shard
    bare = lay_out(((output.name, output.dtype, output.shape) for output in shard.outputs), {})
    return replace(shard, layout=bare) if digest_of_header(bare.header) == headers[shard.file] else shard


def _parse(text: str) -> dict[str, Any] | None:
    """The original's config.json, where a receipt holds one."""
    try:
        text.encode()
        config = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _beside(text: str) -> dict[str, bytes]:
    return {QUANT_CONFIG: text.encode(errors="replace")} if text else {}


def _config(found: Readable, original: Mapping[str, Any] | None, text: str) -> bytes:
    """config.json: the original's own text if nothing but the quantization differs, else with its quantization_config.

    Raises:
        CheckpointError: config.json is nested too deeply, or has a quantization_config where engines read none.
    """
    checkpoint, family = found.source.checkpoint, found.source.family
    for sentence in misplaced_quantization_configs(checkpoint.config):
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {sentence}")
    try:
        config = copy.deepcopy(dict(checkpoint.config))
        if original is not None and _without_quantization(original) == _without_quantization(config):
            return text.encode()
    except RecursionError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: is nested too deeply") from error
    said = find_quantization_config(config)
    if original is not None:
        home, section = find_quantization_config(original)
    elif said.section.get("quant_method") == "fp8" and not family.beside_fp8:
        raise UnsupportedError(
            f"{checkpoint.path}: NVFP4 beside FP8, and without the receipt of its conversion nothing says how its "
            f"original is described; expected {RECEIPT} as it was written"
        )
    else:
        home, section = family.home, family.section(said.section, _plain_modules(found.selection))
    if home and said.path != home and (len(home) == 1 or isinstance(config.get(home[0]), dict)):
        drop_quantization_configs(config)
        (config if len(home) == 1 else config[home[0]])[home[-1]] = section
    elif home:
        set_quantization_config(config, section)
    else:
        drop_quantization_configs(config)
    return json_bytes(config)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    rest = copy.deepcopy(dict(config))
    drop_quantization_configs(rest)
    return rest


def _plain_modules(selection: Selection) -> list[str]:
    """The modules whose weight matrices are not quantized."""
    return sorted(
        tensor.name.removesuffix(".weight")
        for tensor in selection.untouched
        if tensor.name.endswith(".weight") and tensor.dtype in UNQUANTIZED and len(tensor.shape) == 2
    )


def _companions(
    checkpoint: Checkpoint, receipt: Receipt
) -> tuple[dict[PurePosixPath, PurePosixPath], dict[PurePosixPath, int]]:
    """(the names of companions that had another one, the companions and their sizes) without a conversion's card."""
    companions = companions_to_carry(checkpoint)
    if PICTURE not in receipt.files:  # which every card of a conversion has
        return {}, companions
    places = {name: behind_card(name) for name in companions}
    renamed = {name: place for name, place in places.items() if place is not None and place != name}
    return renamed, {name: size for name, size in companions.items() if places[name] is not None}
