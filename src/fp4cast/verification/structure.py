"""Compare everything but the weights: names, dtypes, shapes, index, configs, companion files."""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.checkpoints.checksums import checksum_of_path
from fp4cast.checkpoints.directory import CONFIG, OTHER_SUFFIXES, QUANT_CONFIG, RECEIPT, walk
from fp4cast.checkpoints.index import INDEX
from fp4cast.checkpoints.json_files import read_json
from fp4cast.errors import UnsupportedError
from fp4cast.layouts.engine_rules import Fault
from fp4cast.layouts.engine_view import read_claims
from fp4cast.layouts.fp8 import fp8_tensors
from fp4cast.layouts.layout import DTYPES
from fp4cast.verification.configs import config_faults, original_faults
from fp4cast.verification.opened import Opened
from fp4cast.verification.report import Difference

RECEIPT_CHANGED = "is not the receipt that the conversion wrote: its digest does not hold"


def _expected(opened: Opened) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor that the destination must hold."""
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in opened.selection.untouched}
    for pair in opened.selection.cast:
        table |= opened.target.form.tensors(pair.module, pair.shape, opened.target.activations)
    for module, tensor in opened.selection.quantized.items():
        table |= opened.target.layout.projection.tensors(module, tensor.shape, opened.target.activations)
    for module, tensor in opened.selection.fp8.items():
        table |= fp8_tensors(module, tensor.shape)
    scalar = (DTYPES.tensor_scale, opened.target.layout.projection.scalar_shape)
    return table | dict.fromkeys(opened.kv_scales, scalar)


def tensor_differences(opened: Opened) -> Iterator[Difference]:
    """Check that every source tensor has a counterpart of the right dtype and shape, and that nothing else is there."""
    expected, actual = _expected(opened), opened.destination.tensors
    # On the way back it is the other side that lacks something, or has too much.
    lacks = Difference("", "missing", "is not in the destination")
    excess = Difference("", "unexpected", "has no counterpart in the source")
    if opened.back:
        lacks, excess = excess, lacks
    for name, (dtype, shape) in expected.items():
        tensor = actual.get(name)
        if tensor is None:
            yield replace(lacks, name=name)
        elif tensor.dtype != dtype:
            yield Difference(name, "dtype", f"expected {dtype}, got {tensor.dtype}")
        elif tensor.shape != shape:
            yield Difference(name, "shape", f"expected {list(shape)}, got {list(tensor.shape)}")
    for name in sorted(actual.keys() - expected.keys()):
        yield replace(excess, name=name)
    yield from _metadata(opened)


def _metadata(opened: Opened) -> Iterator[Difference]:
    """The headers' `__metadata__`: the source's, with the format that transformers asks for; originals may lack it."""
    sources = opened.given.shards
    for file, shard in opened.made.shards.items():
        expected = {"format": "pt"} | dict(sources[file].metadata) if file in sources else dict(shard.metadata)
        if shard.metadata != expected and not (opened.back and {"format": "pt"} | dict(shard.metadata) == expected):
            found = str(dict(shard.metadata))[:200]
            yield Difference(file, "header", f"__metadata__ is {found}, expected {str(expected)[:200]}")


def document_differences(opened: Opened) -> Iterator[Difference]:
    """Check that index, configs and companions agree with the tensors and with the source."""
    path = opened.made.path
    if (path / INDEX).exists():
        metadata = read_json(path / INDEX).get("metadata")
        claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
        if claimed != opened.made.total_size:
            yield Difference(INDEX, "index", f"total_size is {claimed}, the tensors take {opened.made.total_size}")
    faults = _config_faults(opened)
    for file, detail in faults:
        yield Difference(opened.config if file == CONFIG else file, "config", detail)
    if not faults:
        yield from _sealed(opened)
    if not opened.receipt.intact:
        yield Difference(RECEIPT, "config", opened.receipt.problem or RECEIPT_CHANGED)
    yield from _companions(opened)


def _config_faults(opened: Opened) -> list[Fault]:
    """What is wrong with the configs of what was made; of another tool's NVFP4, what fp4cast would write otherwise."""
    path = opened.made.path
    beside = read_json(path / QUANT_CONFIG) if (path / QUANT_CONFIG).exists() else None
    source, config = opened.source, opened.made.config
    if opened.back:
        return original_faults(config, beside, source, opened.destination.config)
    claims = opened.claims
    if claims is None:
        try:
            claims = read_claims(config, path / opened.config)
        except UnsupportedError as error:
            return [Fault(CONFIG, str(error))]
    return config_faults(config, beside, claims, source, opened.target, opened.selection)


def _companions(opened: Opened) -> Iterator[Difference]:
    """Compare the files that are no weights: DST has the source's and no others. People may edit cards."""
    path, source = opened.made.path, opened.given
    expected = {name for name in map(str, source.companions()) if not is_card_file(name)}
    filecmp.clear_cache()  # it believes sizes and times
    for name in sorted(expected):
        try:
            same = filecmp.cmp(path / name, source.path / name, shallow=False)
        except OSError as error:
            yield Difference(name, "file", f"cannot be read: {error.strerror}")
        else:
            if not same:
                yield Difference(name, "file", "differs from the source's")
    known = {*expected, *opened.made.shards, CONFIG, INDEX, QUANT_CONFIG, RECEIPT}
    yield from unlisted(path, known, "is in the destination alone")


def unlisted(path: Path, known: Collection[str], sentence: str) -> Iterator[Difference]:
    """The other files of a destination, which a loader may take for the model's; download tools keep hidden ones."""
    for name in map(str, walk(path)):
        if name.endswith(".safetensors") and name not in known:
            yield Difference(name, "unexpected", sentence)
        elif name not in known and not is_card_file(name):
            what = ", and holds weights in another format" if name.endswith(OTHER_SUFFIXES) else ""
            yield Difference(name, "file", sentence + what)


def _sealed(opened: Opened) -> Iterator[Difference]:
    """Check that the documents are, byte for byte, those that the receipt names."""
    receipt = opened.receipt
    if not receipt.found or receipt.problem:
        return
    for name in (CONFIG, QUANT_CONFIG):
        path = opened.made.path / (opened.config if name == CONFIG else name)
        if path.is_file() and checksum_of_path(path) != receipt.files.get(name):
            yield Difference(name, "config", "is not the document that the conversion wrote")
