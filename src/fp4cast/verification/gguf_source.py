"""Compare the MXFP4 weights of safetensors with a GGUF file that llama.cpp's converter has written, where names map.

That converter moves MXFP4 codes and scales of gpt-oss, DeepSeek-V4 and Kimi-K3 as they are, and the NVFP4 ones that
`convert` writes in its two layouts, with their tensor scales beside. Whether it did, is seen here. Every other tensor
it renames, widens or turns: those are not compared, and neither are q and k, whose rows it reorders for some models.
Source: conversion/base.py, gpt_oss.py, deepseek.py, kimi_k3.py of ggml-org/llama.cpp at 0c1e570.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.checkpoints.byte_ranges import File, Files
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.extras import require
from fp4cast.families.family import Pair, Source
from fp4cast.families.recognise import read_source
from fp4cast.formats import E4M3_TOP, MX_BLOCK, MX_BLOCK_BYTES, Float64s, mxfp4_values, unpack
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.ranges import spans
from fp4cast.parallel.workers import Workers, workers
from fp4cast.verification.gguf_reader import (
    BLOCKS,
    architecture_of,
    find_scales,
    gguf_codes,
    gguf_report,
    gguf_values,
    read_gguf,
    unknown_tensor,
)
from fp4cast.verification.report import Difference, Report

_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)")
_BANK = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
_LEAVES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_MOST_LAYERS = 10_000
_REORDERED = ("attn_q.weight", "attn_k.weight")
_NVFP4_ELEMENTS = 64
_BLOCK_SIZES = {"MXFP4": (32, 17), "NVFP4": (_NVFP4_ELEMENTS, 36)}


@dataclass
class _Place:
    """Where rows of a source's tensor lie in the GGUF file: every `step`-th row from `first` on, of one expert each."""

    pair: Pair
    name: str
    expert: int = 0
    first: int = 0
    step: int = 1


@dataclass
class _Part:
    """Some rows to compare."""

    place: _Place
    tensor: Any
    expert: int
    rows: tuple[int, int]
    scale: float


def verify_gguf_source(
    src: Path, dst: str | Path, *, jobs: int | None = None, strict: bool = False, progress: AdvanceOf = ignore
) -> Report:
    """Compare every value of the MXFP4 tensors of a checkpoint with those of a GGUF file.

    Args:
        src: a directory of safetensors.
        dst: the file; its tensors of types 39 and 40 are compared.
        jobs: threads.
        strict: see `verify`.
        progress: called with (bytes just read, bytes in all).

    Raises:
        CheckpointError: one of them cannot be read.
        MissingExtraError: the `gguf` package is not installed.
    """
    begin, path = time.monotonic(), Path(dst)
    reader, source = read_gguf(path), read_source(open_checkpoint(src))
    places, unmapped = _places(source, reader)
    parts, differences = _check(places, reader)
    if not parts and not differences:
        missing = f"holds the place of none of the {len(source.pairs)} MXFP4 tensors of {src}: nothing was compared"
        differences.append(Difference(str(dst), "missing", missing))
    total = sum(pair.codes.nbytes + pair.scales.nbytes for pair in source.pairs.values())
    with workers(jobs, lambda n: progress(n, total)) as pool, Files() as files, File(path) as written:
        results = list(pool.map(partial(_compare, files, written, pool), parts))
    wrong: dict[str, str] = {}
    for part, (_, difference) in zip(parts, results, strict=True):
        if difference:
            wrong.setdefault(part.tensor.name, difference)
    differences += [Difference(name, "values", difference) for name, difference in wrong.items()]
    compared = {part.place.pair.module for part in parts}
    shifted = sum(count for count, _ in results)
    halves = sum(2 * (part.rows[1] - part.rows[0]) * part.place.pair.row_blocks for part in parts)
    return gguf_report(
        str(src),
        str(dst),
        family=source.family.name,
        cast=len(compared),
        copied=0,
        half_blocks={"verbatim": halves - shifted, "shifted": shifted, "rounded": 0},
        bytes={"read": 2 * total, "written": 0},
        inexact=len({part.place.pair.module for part in parts if part.tensor.name in wrong}),
        differences=differences,
        strict=strict,
        seconds=time.monotonic() - begin,
        verified=True,
        notes=_notes(source, unmapped),
    )


def _notes(source: Source, unmapped: list[str]) -> list[str]:
    others = len(source.checkpoint.tensors) - 2 * len(source.pairs)
    found = [f"{others} tensors that are not MXFP4 were not compared: llama.cpp renames, widens and turns them"]
    if unmapped:
        why = "no name maps, or rows are reordered"
        found.append(f"{len(unmapped)} MXFP4 tensors were not compared, the first is {unmapped[0]}: {why}")
    return found


def _places(source: Source, reader: Any) -> tuple[list[_Place], list[str]]:
    """(where each pair lies, the modules of which that is not known)."""
    names, found, unmapped = _dense_names(reader), list[_Place](), list[str]()
    for module, pair in source.pairs.items():
        if bank := _BANK.search(module):
            at = f"blk.{bank[1]}.ffn_{{}}_exps.weight"
            kinds = [("gate", 0, 2), ("up", 1, 2)] if bank[2] == "gate_up" else [("down", 0, 1)]
            found += [_Place(pair, at.format(kind), 0, first, step) for kind, first, step in kinds]
        elif (expert := _EXPERT.search(module)) and expert[3] in _LEAVES:
            found.append(_Place(pair, f"blk.{expert[1]}.ffn_{_LEAVES[expert[3]]}_exps.weight", int(expert[2])))
        elif (name := names(module)) is not None and not name.endswith(_REORDERED):
            found.append(_Place(pair, name))
        else:
            unmapped.append(module)
    return found, unmapped


def _dense_names(reader: Any) -> Any:
    """The package's own map from a module's name to a tensor's; a function that knows none for an unknown model."""
    package, architecture = require("gguf", "gguf"), architecture_of(reader)
    kinds = {name: kind for kind, name in package.MODEL_ARCH_NAMES.items()}
    entry = reader.get_field(f"{architecture}.block_count")
    layers = entry.contents() if entry is not None else None
    if architecture not in kinds or not isinstance(layers, int) or not 0 < layers < _MOST_LAYERS:
        return lambda _: None
    names = package.get_tensor_name_map(kinds[architecture], layers)
    return lambda module: names.get_name(f"{module}.weight", try_suffixes=(".weight",))


def _check(places: list[_Place], reader: Any) -> tuple[list[_Part], list[Difference]]:
    """(what is compared, what cannot be): names, types and shapes; and tensor scales that nobody would apply."""
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    parts, differences, scales = list[_Part](), list[Difference](), dict[str, Any]()
    many: dict[str, int] = {}
    for place in places:
        many[place.name] = max(many.get(place.name, 0), place.expert + 1)
    for place in places:
        if (tensor := tensors.get(place.name)) is None:
            differences.append(Difference(place.name, "missing", f"is missing, the place of {place.pair.module}"))
            continue
        kind, shape = tensor.tensor_type.name, [int(size) for size in tensor.shape]
        pair = place.pair
        expected = [pair.row_blocks * MX_BLOCK, pair.rows // place.step]
        experts = pair.experts if pair.bank else many[place.name]
        expected += [experts] if pair.bank or len(shape) == 3 else []
        if kind not in _BLOCK_SIZES or shape != expected:
            found = f"expected {expected} of MXFP4 or NVFP4, the place of {pair.module}; got {shape} of {kind}"
            differences.append(Difference(place.name, "dtype" if kind not in _BLOCK_SIZES else "shape", found))
            continue
        if place.name not in scales:
            name, scales[place.name], wrong = find_scales(architecture_of(reader), tensor, tensors)
            differences += wrong
            beside = place.name.removesuffix("weight") + "scale"
            if kind == "NVFP4" and name is None and beside in tensors:
                differences.append(unknown_tensor(beside))
        parts += _parts(place, tensor, scales[place.name])
    return parts, differences


def _parts(place: _Place, tensor: Any, scales: Float64s) -> Iterator[_Part]:
    rows, pair = place.pair.rows // place.step, place.pair
    for expert in range(pair.experts) if pair.bank else [place.expert]:
        scale = float(scales[expert if len(scales) > 1 else 0])
        for span in spans(0, rows, max(1, BLOCKS // pair.row_blocks)):
            yield _Part(place, tensor, expert, span, scale)


def _compare(files: Files, written: File, pool: Workers, part: _Part) -> tuple[int, str]:
    """(half-blocks with other codes, what differs in values) of some rows; an empty sentence where nothing does."""
    place, pair = part.place, part.place.pair
    first, last = (row * place.step for row in part.rows)
    at = ((part.expert if pair.bank else 0) * pair.rows + first) * pair.row_blocks
    count = (last - first) * pair.row_blocks
    codes = files[pair.codes.path].read(pair.codes.start + at * MX_BLOCK_BYTES, count * MX_BLOCK_BYTES)
    scales = files[pair.scales.path].read(pair.scales.start + at, count)
    pool.advance(codes.nbytes + scales.nbytes)
    rows = mxfp4_values(codes.reshape(last - first, -1), scales.reshape(last - first, -1), pair.bias)
    expected = rows[place.first :: place.step]
    elements, nbytes = _BLOCK_SIZES[part.tensor.tensor_type.name]
    width = pair.row_blocks * MX_BLOCK // elements * nbytes
    start = part.tensor.data_offset + (part.expert * (pair.rows // place.step) + part.rows[0]) * width
    data = written.read(start, len(expected) * width)
    got, kept = gguf_values(data, part.tensor) * part.scale, unpack(codes.reshape(last - first, -1))
    shifted = (kept[place.first :: place.step].reshape(-1, 16) != gguf_codes(data, part.tensor)).any(axis=1).sum()
    signs = (kept[place.first :: place.step].reshape(-1, 16) ^ gguf_codes(data, part.tensor)) & 8 != 0
    wrong = (expected.reshape(-1) != got) | signs.reshape(-1)
    if elements == _NVFP4_ELEMENTS:
        wrong |= np.repeat(data.reshape(-1, nbytes)[:, :4] > E4M3_TOP, 16)
    differing = np.flatnonzero(wrong)
    if not differing.size:
        return int(shifted), ""
    row, column = divmod(int(differing[0]), expected.shape[1])
    return int(shifted), (
        f"{differing.size} values of expert {part.expert}, rows {part.rows[0]} to {part.rows[1] - 1}, differ; row "
        f"{part.rows[0] + row}, column {column}: expected {expected[row, column]}, got {got[differing[0]]}"
    )
