"""Compare a GGUF file with the one that it was made from, by the reader and the dequantizers of the `gguf` package.

Nothing of fp4cast decodes here: that package finds the tensors, says what a block of a type means, and lists the
metadata.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fp4cast.checkpoints.byte_ranges import CHUNK_BYTES, File
from fp4cast.checkpoints.gguf_file import is_gguf
from fp4cast.errors import UsageError
from fp4cast.extras import require
from fp4cast.formats import E4M3_TOP, E8M0_NAN, Bytes, Float64s
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.ranges import spans
from fp4cast.parallel.workers import Workers, workers
from fp4cast.verification.gguf_reader import (
    BLOCKS,
    architecture_of,
    dequantized,
    find_scales,
    gguf_codes,
    gguf_report,
    gguf_values,
    read_gguf,
    unknown_tensor,
)
from fp4cast.verification.report import Difference, HalfBlockCounts, Report

_FILE_TYPE = "general.file_type"
_BECOMES = {38: 39}  # general.file_type: mostly MXFP4, mostly NVFP4


@dataclass
class _Pair:
    """One tensor on both sides, by the package's reader."""

    source: Any
    written: Any
    scales: Float64s

    @property
    def name(self) -> str:
        return str(self.source.name)


@dataclass
class _Found:
    """What the comparison of a part of a tensor has found."""

    pair: _Pair
    half_blocks: int
    shifted: int
    wrong: int = 0
    first: str = ""


@dataclass
class _Sides:
    """Both files."""

    source: Any
    written: Any
    differences: list[Difference] = field(default_factory=list)

    def differs(self, name: str, kind: str, detail: str) -> None:
        self.differences.append(Difference(name, kind, detail))


def verify_gguf(
    src: str | Path, dst: str | Path, *, jobs: int | None = None, strict: bool = False, progress: AdvanceOf = ignore
) -> Report:
    """Compare every value of every tensor, and all metadata, of two GGUF files.

    Args:
        src: with MXFP4 tensors (type 39).
        dst: with NVFP4 tensors (type 40) in their place.
        jobs: threads.
        strict: see `verify`.
        progress: called with (bytes just read, bytes in all).

    Raises:
        CheckpointError: one of them cannot be read.
        UsageError: only one of them is a GGUF file.
        MissingExtraError: the `gguf` package is not installed.
    """
    begin, paths = time.monotonic(), (Path(src), Path(dst))
    for path in paths:
        if path.exists() and not is_gguf(path):
            raise UsageError(f"{path}: is no GGUF file; only a GGUF file can be made from one")
    sides = _Sides(*(read_gguf(path) for path in paths))
    _compare_metadata(sides)
    pairs, same = _match(sides)
    total = sum(int(tensor.n_bytes) for side in (sides.source, sides.written) for tensor in side.tensors)
    with workers(jobs, lambda n: progress(n, total)) as pool, File(paths[0]) as source, File(paths[1]) as written:
        for before, after in same:
            if not _same_bytes(source, written, before, after, pool):
                sides.differs(str(before.name), "bytes", "other bytes than in the source")
        found = list(pool.map(partial(_compare, source, written, pool), _parts(pairs)))
    counts, inexact = _judge(sides, found)
    return gguf_report(
        str(src),
        str(dst),
        cast=len(pairs),
        copied=len(same),
        half_blocks=counts,
        bytes={"read": total, "written": 0},
        inexact=inexact,
        differences=sides.differences,
        strict=strict,
        seconds=time.monotonic() - begin,
        verified=True,
    )


def _compare_metadata(sides: _Sides) -> None:
    """Every key, its type and its bytes; the type of the file becomes NVFP4 where no MXFP4 is left."""
    before, after = ({k: v for k, v in each.fields.items() if "." in k} for each in (sides.source, sides.written))
    left = any(tensor.tensor_type.name == "MXFP4" for tensor in sides.written.tensors)
    for key in before.keys() | after.keys():
        if key.startswith("GGUF.") and key != "GGUF.version":
            continue  # counts, which are those of the tensors and keys
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            sides.differs(key, "config", "is missing" if b is None else "is not in the source")
            continue
        said = a.contents() if key == _FILE_TYPE and not left else None
        kind = _BECOMES.get(said) if isinstance(said, int) else None
        if kind is not None and (b.contents(), b.types) == (kind, a.types):
            continue
        if a.types != b.types or kind is not None or _bytes(a) != _bytes(b):
            sides.differs(key, "config", f"expected {kind or 'the bytes of the source'}, got other ones")


def _bytes(entry: Any) -> bytes:
    return b"".join(part.tobytes() for part in entry.parts)


def _match(sides: _Sides) -> tuple[list[_Pair], list[tuple[Any, Any]]]:
    """(what was cast, what was carried over); what is neither is a difference."""
    written = {str(tensor.name): tensor for tensor in sides.written.tensors}
    pairs: list[_Pair] = []
    same = []
    for tensor in sides.source.tensors:
        name, other = str(tensor.name), written.pop(str(tensor.name), None)
        if other is None:
            sides.differs(name, "missing", "is missing")
        elif tensor.shape.tolist() != other.shape.tolist():
            sides.differs(name, "shape", f"expected {tensor.shape.tolist()}, got {other.shape.tolist()}")
        elif tensor.tensor_type == other.tensor_type:
            same.append((tensor, other))
        elif (tensor.tensor_type.name, other.tensor_type.name) == ("MXFP4", "NVFP4"):
            pairs.append(_Pair(tensor, other, np.ones(1)))
        else:
            sides.differs(name, "dtype", f"expected {tensor.tensor_type.name}, got {other.tensor_type.name}")
    for pair in pairs:
        scale, pair.scales, wrong = find_scales(architecture_of(sides.source), pair.source, written)
        written.pop(scale or "", None)
        sides.differences += wrong
    sides.differences += map(unknown_tensor, written)
    if not pairs:
        sides.differs(str(sides.written.data.filename), "dtype", "holds no tensor that was cast to NVFP4")
    return pairs, same


def _same_bytes(source: File, written: File, before: Any, after: Any, pool: Workers) -> bool:
    same = True
    for first, last in spans(0, int(before.n_bytes), CHUNK_BYTES):
        a = source.read(before.data_offset + first, last - first)
        same &= np.array_equal(a, written.read(after.data_offset + first, last - first))
        pool.advance(2 * (last - first))
    return bool(same)


def _parts(pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, int, int, float]]:
    """Ranges of blocks that share a tensor scale, with it."""
    for pair in pairs:
        count = int(pair.source.n_elements) // 32 // len(pair.scales)
        for i, scale in enumerate(pair.scales):
            for first, last in spans(i * count, (i + 1) * count, BLOCKS):
                yield pair, first, last, float(scale)


def _compare(source: File, written: File, pool: Workers, part: tuple[_Pair, int, int, float]) -> _Found:
    """Compare values in float64, and the signs of zeros, which ggml's tables lose.

    Where a half-block keeps its codes, it is enough that its two scales mean the same; the others are dequantized.
    """
    pair, first, last, scale = part
    before = source.read(pair.source.data_offset + first * 17, (last - first) * 17).reshape(-1, 17)
    after = written.read(pair.written.data_offset + first // 2 * 36, (last - first) // 2 * 36).reshape(-1, 36)
    pool.advance(before.nbytes + after.nbytes)
    moved = (gguf_codes(before, pair.source) != gguf_codes(after, pair.written)).any(axis=1)
    found = _Found(pair, len(moved), int(moved.sum()))
    unlike = ~_equal_scales(scale)[np.repeat(before[:, 0], 2), after[:, :4].reshape(-1)]
    doubtful = np.flatnonzero((moved | unlike).reshape(-1, 4).any(axis=1))  # blocks of 64 weights
    if doubtful.size:
        found.wrong, at, values = _differing(pair, before.reshape(-1, 34)[doubtful], after[doubtful], scale)
        if found.wrong:
            weight = first * 32 + int(doubtful[at // 64]) * 64 + at % 64
            found.first = f"weight {weight}: expected {values[0]}, got {values[1]}"
    return found


def _differing(pair: _Pair, before: Bytes, after: Bytes, scale: float) -> tuple[int, int, tuple[float, float]]:
    """(number, the first, its two values) of the weights that differ in some blocks: uint8 [n, 34] and [n, 36]."""
    expected = gguf_values(before.reshape(-1), pair.source)
    got = gguf_values(after.reshape(-1), pair.written) * scale
    signs = (gguf_codes(before, pair.source) ^ gguf_codes(after, pair.written)) & 8 != 0
    wrong = (expected != got) | ~np.isfinite(expected) | signs.reshape(-1)
    wrong |= np.repeat(before.reshape(-1, 17)[:, 0] == E8M0_NAN, 32)  # the package gives these a value
    wrong |= np.repeat(after[:, :4] > E4M3_TOP, 16)
    at = int(np.argmax(wrong))
    return int(wrong.sum()), at, (float(expected[at]), float(got[at]))


@lru_cache(maxsize=1024)
def _equal_scales(scale: float) -> npt.NDArray[np.bool_]:
    """Whether all codes mean the same under an E8M0 byte and under a UE4M3 byte with the tensor scale, [256, 256]."""
    kinds = require("gguf", "gguf").GGMLQuantizationType
    byte, codes = np.arange(256, dtype=np.uint8)[:, None], np.arange(16, dtype=np.uint8)
    one = np.concatenate([byte, np.tile(codes | codes << 4, (256, 1))], axis=1)
    other = np.concatenate([np.tile(byte, 4), np.tile(np.tile(codes[:8] | codes[8:] << 4, 4), (256, 1))], axis=1)
    expected = dequantized(one, kinds.MXFP4).reshape(256, 32)[:, :16]
    got = dequantized(other, kinds.NVFP4).reshape(256, 64)[:, :16] * scale
    same: npt.NDArray[np.bool_] = np.all(expected[:, None] == got, axis=-1)
    same &= np.all(np.isfinite(expected), axis=-1)[:, None]
    same[E8M0_NAN], same[:, E4M3_TOP + 1 :] = False, False
    return same


def _judge(sides: _Sides, found: Sequence[_Found]) -> tuple[HalfBlockCounts, int]:
    """(counts, the number of tensors that are not exact); each becomes a difference."""
    wrong: dict[str, tuple[int, str]] = {}
    for each in found:
        if each.wrong:
            count, first = wrong.get(each.pair.name, (0, each.first))
            wrong[each.pair.name] = count + each.wrong, first
    for name, (count, first) in wrong.items():
        sides.differs(name, "values", f"{count} values differ; {first}")
    shifted = sum(each.shifted for each in found)
    total = sum(each.half_blocks for each in found)
    return {"verbatim": total - shifted, "shifted": shifted, "rounded": 0}, len(wrong)
