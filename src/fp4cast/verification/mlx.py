"""Compare a checkpoint in MLX's nvfp4 with the mxfp4 one that it was made from: every value, every other byte."""

from __future__ import annotations

import filecmp
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.checkpoints.byte_ranges import CHUNK_BYTES, Files
from fp4cast.checkpoints.directory import CONFIG, RECEIPT, Checkpoint, open_checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.index import INDEX
from fp4cast.checkpoints.json_files import read_json
from fp4cast.errors import CheckpointError, UnsupportedError
from fp4cast.families.mlx import mxfp4_modules
from fp4cast.formats import E4M3_TOP, MX_BLOCK_BYTES, mxfp4_values, nvfp4_values
from fp4cast.layouts.mlx import MLX, SERVED, mode_of
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.ranges import spans
from fp4cast.parallel.workers import Workers, workers
from fp4cast.verification.receipt import Receipt
from fp4cast.verification.report import Difference, Report
from fp4cast.verification.structure import RECEIPT_CHANGED, unlisted
from fp4cast.verification.unscaled_report import unscaled_report

_BLOCKS = 1 << 16  # compared together


@dataclass
class _Found:
    """What the comparison of a part of a tensor has found."""

    name: str
    half_blocks: int = 0
    shifted: int = 0
    wrong: list[Difference] = field(default_factory=list)


def is_mlx_nvfp4(path: str | Path) -> bool:
    """Whether a directory's config says nvfp4 as mlx-lm writes it."""
    try:
        section = read_json(Path(path) / CONFIG).get("quantization")
    except (OSError, ValueError, CheckpointError):
        return False
    entries = [section, *section.values()] if isinstance(section, dict) else []
    return any(isinstance(entry, dict) and entry.get("mode") == "nvfp4" for entry in entries)


def verify_mlx(
    src: Path,
    dst: Path,
    *,
    config: str = CONFIG,
    jobs: int | None = None,
    strict: bool = False,
    progress: AdvanceOf = ignore,
) -> Report:
    """Compare every value of two MLX checkpoints, and everything else byte for byte.

    Args:
        src: in mxfp4.
        dst: in nvfp4.
        config: the name of the destination's config file.
        jobs: threads.
        strict: see `verify`.
        progress: called with (bytes just read, bytes in all).

    Raises:
        CheckpointError: one of them cannot be read.
    """
    begin, source, written = time.monotonic(), open_checkpoint(src), open_checkpoint(dst, config)
    modules = [name for name in mxfp4_modules(source.tensors) if mode_of(source.config, name) == "mxfp4"]
    if not modules:
        raise UnsupportedError(f"{src}: holds no MLX mxfp4; expected the checkpoint that {dst} was made from")
    differences = [*_structure(source, written, set(modules)), *_documents(source, written, modules, config)]
    wrong, total = {each.name for each in differences}, source.total_size + written.total_size
    with workers(jobs, lambda n: progress(n, total)) as pool, Files() as files:
        parts = _parts(source.tensors, written.tensors, modules, wrong)
        found = list(pool.map(partial(_compare, files, pool, source.tensors, written.tensors), parts))
    values = {each.name: difference for each in reversed(found) for difference in each.wrong}
    differences += values.values()
    halves, shifted = sum(each.half_blocks for each in found), sum(each.shifted for each in found)
    bad = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "scales")} & {d.name for d in differences}
    return mlx_report(
        str(src),
        str(dst),
        cast=len(modules),
        copied=len(source.tensors) - 2 * len(modules),
        half_blocks={"verbatim": halves - shifted, "shifted": shifted, "rounded": 0},
        bytes={"read": total, "written": 0},
        inexact=len({name.rpartition(".")[0] for name in bad}),
        differences=differences,
        strict=strict,
        seconds=time.monotonic() - begin,
        verified=True,
    )


def mlx_report(source: str, destination: str, **figures: Any) -> Report:
    """The report on an MLX checkpoint; `figures` are arguments of `unscaled_report`."""
    serve = f"mlx_lm.server --model {shlex.quote(destination)}"
    return unscaled_report(source, destination, family=MLX, layout=MLX, served=SERVED, serve=serve, **figures)


def _structure(source: Checkpoint, written: Checkpoint, modules: set[str]) -> Iterator[Difference]:
    """Names, dtypes, shapes, and the headers' metadata."""
    for name, tensor in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        shape = tensor.shape
        if module in modules and leaf == "scales":
            shape = (*shape[:-1], 2 * shape[-1])
        other = written.tensors.get(name)
        if other is None:
            yield Difference(name, "missing", "is not in the destination")
        elif (other.dtype, other.shape) != (tensor.dtype, shape):
            expected, got = f"{tensor.dtype} {list(shape)}", f"{other.dtype} {list(other.shape)}"
            yield Difference(name, "shape", f"expected {expected}, got {got}")
    for name in sorted(written.tensors.keys() - source.tensors.keys()):
        yield Difference(name, "unexpected", "has no counterpart in the source")
    for file, shard in written.shards.items():
        before = source.shards.get(file)
        if before is None or dict(shard.metadata) != {"format": "pt"} | dict(before.metadata):
            yield Difference(file, "header", f"__metadata__ is {str(dict(shard.metadata))[:200]}, not the source's")


def _documents(source: Checkpoint, written: Checkpoint, modules: list[str], config: str) -> Iterator[Difference]:
    """What mlx-lm reads in the config, the index, the receipt and the files beside."""
    path, sections = written.path, ("quantization", "quantization_config")
    before, after = ({k: v for k, v in each.config.items() if k not in sections} for each in (source, written))
    if before != after:
        yield Difference(config, "config", "differs from the source's beyond the quantization")
    said = written.config.get(sections[0])
    for module in modules:
        entry = said.get(module, said) if isinstance(said, Mapping) else None
        facts = [entry.get(key) for key in ("group_size", "bits", "mode")] if isinstance(entry, Mapping) else []
        if facts != [16, 4, "nvfp4"]:
            yield Difference(config, "config", f"says {facts} of {module}, expected [16, 4, 'nvfp4']")
    if isinstance(said, Mapping) and written.config.get(sections[1], said) != said:
        yield Difference(config, "config", "quantization_config is not what quantization is")
    if (path / INDEX).exists():
        metadata = read_json(path / INDEX).get("metadata")
        if not isinstance(metadata, dict) or metadata.get("total_size") != written.total_size:
            yield Difference(INDEX, "index", f"total_size is not {written.total_size}")
    if not Receipt.read(path).intact:
        yield Difference(RECEIPT, "config", RECEIPT_CHANGED)
    companions = [str(name) for name in source.companions()]
    filecmp.clear_cache()
    for name in companions:
        if not (path / name).is_file() or not filecmp.cmp(path / name, source.path / name, shallow=False):
            yield Difference(name, "file", "differs from the source's")
    known = {*companions, *written.shards, CONFIG, INDEX, RECEIPT}
    yield from unlisted(path, known, "is in the destination alone")


def _parts(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], modules: list[str], wrong: set[str]
) -> Iterator[tuple[str, bool, int, int]]:
    """(name, whether it is cast, first, last): blocks of a module, or bytes of a tensor."""
    pairs = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "scales")}
    for module in modules:
        if not {f"{module}.weight", f"{module}.scales"} & wrong:
            for first, last in spans(0, before[f"{module}.scales"].nbytes, _BLOCKS):
                yield module, True, first, last
    for name in before.keys() & after.keys() - pairs - wrong:
        for first, last in spans(0, before[name].nbytes, CHUNK_BYTES):
            yield name, False, first, last


def _compare(
    files: Files,
    pool: Workers,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    part: tuple[str, bool, int, int],
) -> _Found:
    name, is_cast, first, last = part

    def read(tensor: Tensor, size: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = files[tensor.path].read(tensor.start + first * size, (last - first) * size)
        pool.advance(data.nbytes)
        return data

    if not is_cast:
        same = np.array_equal(read(before[name]), read(after[name]))
        return _Found(name, wrong=[] if same else [Difference(name, "bytes", "other bytes than in the source")])
    codes, scales = read(before[f"{name}.weight"], MX_BLOCK_BYTES), read(before[f"{name}.scales"])
    written, block_scales = read(after[f"{name}.weight"], MX_BLOCK_BYTES), read(after[f"{name}.scales"], 2)
    expected = mxfp4_values(codes.reshape(-1, 16), scales[:, None]).reshape(-1)
    got = nvfp4_values(written.reshape(-1, 16), block_scales.reshape(-1, 2), 1.0).reshape(-1)
    wrong = (expected != got) | (np.signbit(expected) != np.signbit(got)) | np.repeat(block_scales > E4M3_TOP, 16)
    shifted = int((codes != written).reshape(-1, 8).any(axis=1).sum())
    found = _Found(f"{name}.weight", 2 * (last - first), shifted)
    if wrong.any():
        at = int(np.argmax(wrong))
        detail = f"weight {first * 32 + at}: expected {expected[at]}, got {got[at]}"
        found.wrong.append(Difference(found.name, "values", detail))
    return found
