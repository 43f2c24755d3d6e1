"""What verification can see without looking at a weight: names, dtypes, shapes, index, configs, companions.

Part of the independent witness.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fp4cast.bulk import many_objects
from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, RECEIPT, Checkpoint, open_checkpoint, read_json
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import drop_manifests
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.families.recognise import UNQUANTIZED, Pair, Source, read_source
from fp4cast.layouts.engine_view import Claims, config_faults, read_claims
from fp4cast.layouts.layout import Target, choose_target
from fp4cast.verification.report import Difference, digest_bytes

__all__ = ["Work", "documents", "open_both", "structure"]


@dataclass(frozen=True)
class Work:
    """Both sides, opened and recognised.

    Attributes:
        source: the MXFP4 checkpoint and its pairs.
        destination: the NVFP4 checkpoint.
        target: the layout that the destination's config claims.
        claims: what that config says of each module.
        receipt: the destination's fp4cast.json, empty where there is none.
    """

    source: Source
    destination: Checkpoint
    target: Target
    claims: Claims
    receipt: Mapping[str, Any]

    @cached_property
    def cast(self) -> list[Pair]:
        """The pairs that the layout casts."""
        return [pair for pair in self.source.pairs.values() if self.target.casts(pair)]

    @cached_property
    def untouched(self) -> list[Tensor]:
        """The source's tensors that are no part of such a pair: the destination holds them as they are."""
        parts = {name for pair in self.cast for name in (pair.codes.name, pair.scales.name)}
        return [tensor for name, tensor in self.source.checkpoint.tensors.items() if name not in parts]

    @cached_property
    def announced(self) -> Mapping[str, int]:
        """Rounded half-blocks by module, as the receipt announces them."""
        inexact = self.receipt.get("inexact")
        entries = [entry for entry in inexact if isinstance(entry, dict)] if isinstance(inexact, list) else []
        counts = {str(entry.get("name")): entry.get("rounded_half_blocks") for entry in entries}
        return {name: count for name, count in counts.items() if isinstance(count, int)}


@many_objects()
def open_both(source: Path, destination: Path, config: str) -> Work:
    """Open both checkpoints and recognise what they claim to be."""
    found = read_source(open_checkpoint(source))
    opened = open_checkpoint(destination, config)
    claims = read_claims(opened.config)
    receipt = read_json(destination / RECEIPT) if (destination / RECEIPT).exists() else {}
    try:
        target = choose_target(found.family, claims.layout, claims.activations)
    except UsageError as error:
        raise CheckpointError(f"{destination}: claims to be {claims.layout} {claims.activations}: {error}") from error
    return Work(found, opened, target, claims, receipt)


def _expected(work: Work) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor that the destination must hold."""
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in work.untouched}
    for pair in work.cast:
        names = work.target.names(pair.module)
        table[names.codes] = ("U8", work.target.codes_shape(pair.shape))
        table[names.block_scale] = ("F8_E4M3", work.target.block_scale_shape(pair.shape))
        table[names.tensor_scale] = ("F32", work.target.scalar_shape)
        if work.target.activations == "w4a4":
            table[names.input_scale] = ("F32", work.target.scalar_shape)
    return table


def structure(work: Work) -> Iterator[Difference]:
    """Every source tensor has its counterpart, of the right dtype and shape, and nothing else is there."""
    expected, actual = _expected(work), work.destination.tensors
    for name, (dtype, shape) in expected.items():
        tensor = actual.get(name)
        if tensor is None:
            yield Difference(name, "missing", "is not in the destination")
        elif tensor.dtype != dtype:
            yield Difference(name, "dtype", f"expected {dtype}, got {tensor.dtype}")
        elif tensor.shape != shape:
            yield Difference(name, "shape", f"expected {list(shape)}, got {list(tensor.shape)}")
    for name in sorted(actual.keys() - expected.keys()):
        yield Difference(name, "unexpected", "has no counterpart in the source")
    for file in sorted(work.destination.path.glob("*.safetensors")):
        if file.name not in work.destination.shards:
            yield Difference(file.name, "unexpected", "is a shard that the index does not name")


def documents(work: Work, config: str) -> Iterator[Difference]:
    """Index, configs and companions agree with the tensors and with the source."""
    path = work.destination.path
    if (path / INDEX).exists():
        metadata = read_json(path / INDEX).get("metadata")
        claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
        if claimed != work.destination.total_size:
            yield Difference(INDEX, "index", f"total_size is {claimed}, the tensors take {work.destination.total_size}")
    beside = read_json(path / QUANT_CONFIG) if (path / QUANT_CONFIG).exists() else None
    faults = [*config_faults(work.destination.config, beside), *_claimed(work)]
    if _without_manifests(work.destination.config) != _without_manifests(work.source.checkpoint.config):
        faults.append("what it says beside the quantization differs from the source's")
    yield from (Difference(config, "config", fault) for fault in faults)
    if not faults:
        yield from _sealed(work, config)
    for name in work.source.checkpoint.companions():
        try:
            same = filecmp.cmp(path / name, work.source.checkpoint.path / name, shallow=False)
        except OSError as error:
            yield Difference(str(name), "file", f"cannot be read: {error.strerror}")
        else:
            if not same:
                yield Difference(str(name), "file", "differs from the source's")


def _without_manifests(config: Mapping[str, Any]) -> dict[str, Any]:
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    drop_manifests(copy)
    return copy


def _sealed(work: Work, config: str) -> Iterator[Difference]:
    """The documents are, byte for byte, those that the receipt names."""
    sealed = work.receipt.get("documents")
    for name, expected in sealed.items() if isinstance(sealed, dict) else ():
        path = work.destination.path / (config if name == CONFIG else PurePosixPath(name).name)
        if not path.is_file() or digest_bytes(path.read_bytes()) != expected:
            yield Difference(name, "config", "is not the document that the conversion wrote")


def _claimed(work: Work) -> Iterator[str]:
    """The config says NVFP4 of every module that was cast, and of no other."""
    cast = {pair.module for pair in work.cast}
    for module in sorted(cast):
        if not work.claims.quantized(module):
            yield f"{module} was cast, but the config does not say that it is NVFP4"
    for tensor in work.untouched:
        module = tensor.name.removesuffix(".weight").removesuffix(".weight_packed")
        matrix = module != tensor.name and len(tensor.shape) >= 2
        # compressed-tensors describes other quantized groups by patterns of their own, beside `ignore`.
        plain = tensor.dtype in UNQUANTIZED or work.claims.layout == "modelopt"
        if matrix and plain and work.claims.quantized(module):
            yield f"{module} was not cast, but the config says that it is NVFP4"
