"""The fast path of verification: the same codes, and scales that are equal by a table, on raw bytes.

Part of the independent witness: it imports nothing that casts. Where bytes do not match, `compare` decodes both sides.
Work is cut into units that lie in the processor's caches: chunks of blocks, or tiles of a transposed bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fp4cast.checkpoints.byte_ranges import File, Files, scratch
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.transpose import is_transpose
from fp4cast.families.recognise import BLOCK_BYTES, Pair
from fp4cast.formats import Bytes
from fp4cast.layouts.layout import Target
from fp4cast.parallel.ranges import spans
from fp4cast.verification.values import Blocks, Comparison, ScaleTables, compare_blocks, energy, equal

__all__ = ["Cast", "compare_bytes", "compare_units", "count_units", "energy_of_units"]

CHUNK_BLOCKS = 1 << 17  # blocks compared together: 2 MB of codes a side
CHUNK_BYTES = 1 << 20  # bytes compared together
TILE_BYTES = 16 << 20  # codes of a tile: one expert of gpt-oss
_SQUARE = 4096  # rows of a tile of an expert that is larger
BAND_ROWS = 256  # rows of a tile that are turned together
BAND_BYTES = 2 << 20  # their codes, at most

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Cast:
    """A source pair and what was made of it.

    Attributes:
        pair: the source's codes and scales.
        codes: the destination's codes, of the right shape and dtype.
        scales: its E4M3 block scales, likewise.
        tensor_scale: its tensor scale (S or 1/S, FP32).
        input_scale: its input scale, where there is one.
        reciprocal: the tensor scale is stored as 1/S.
        transposed: the destination is [E, K/2, N].
    """

    pair: Pair
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    input_scale: Tensor | None
    reciprocal: bool
    transposed: bool

    @classmethod
    def of(cls, pair: Pair, target: Target, written: Mapping[str, Tensor]) -> Cast:
        """A pair and what a target makes of it, among the tensors of a destination."""
        names = target.names(pair.module)
        return cls(
            pair,
            written[names.codes],
            written[names.block_scale],
            written[names.tensor_scale],
            written[names.input_scale] if target.activations == "w4a4" else None,
            target.reciprocal,
            target.transposed,
        )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of a transposed bank: `rows` source rows by `width` blocks, counted across, down, expert by expert."""

    pair: Pair
    rows: int
    width: int

    @classmethod
    def of(cls, pair: Pair) -> _Tiles:
        rows = min(pair.rows, max(_SQUARE, TILE_BYTES // (pair.row_blocks * BLOCK_BYTES)))
        return cls(pair, rows, max(1, min(pair.row_blocks, TILE_BYTES // (rows * BLOCK_BYTES))))

    def grid(self) -> tuple[int, int, int]:
        return self.pair.experts, -(-self.pair.rows // self.rows), -(-self.pair.row_blocks // self.width)

    def at(self, unit: int) -> tuple[int, slice, slice]:
        """(expert, its rows, its blocks)."""
        expert, down, across = (int(i) for i in np.unravel_index(unit, self.grid()))
        top, left = down * self.rows, across * self.width
        bottom, right = min(top + self.rows, self.pair.rows), min(left + self.width, self.pair.row_blocks)
        return expert, slice(top, bottom), slice(left, right)


def count_units(cast: Cast) -> tuple[int, int]:
    """(how many units a cast is compared in, bytes of the source in each)."""
    pair = cast.pair
    if not cast.transposed:
        return -(-pair.blocks // CHUNK_BLOCKS), min(CHUNK_BLOCKS, pair.blocks) * (BLOCK_BYTES + 1)
    tiles = _Tiles.of(pair)
    return int(np.prod(tiles.grid(), dtype=np.int64)), tiles.rows * tiles.width * (BLOCK_BYTES + 1)


def compare_units(
    cast: Cast, first: int, last: int, tensor_scale: float, files: Files, progress: Progress = lambda _: None
) -> Comparison:
    """Compare every value of units [first, last) of a source tensor with the destination's.

    Args:
        cast: both sides.
        first: first unit, of `count_units`.
        last: one after the last.
        tensor_scale: the destination's, a multiplier.
        files: both sides' files.
        progress: called with the number of bytes just read.
    """
    tables, found = ScaleTables.of(tensor_scale, cast.pair.bias), Comparison()
    compare = _compare_tile if cast.transposed else _compare_chunk
    for unit in range(first, last):
        progress(compare(cast, unit, tables, files, found))
    return found


def _compare_chunk(cast: Cast, unit: int, tables: ScaleTables, files: Files, found: Comparison) -> int:
    """Blocks that lie alike on both sides; returns the bytes read."""
    pair, start = cast.pair, unit * CHUNK_BLOCKS
    n = min(CHUNK_BLOCKS, pair.blocks - start)
    source_codes = _read(files, pair.codes, start * BLOCK_BYTES, n * BLOCK_BYTES, "source").reshape(n, BLOCK_BYTES)
    codes = _read(files, cast.codes, start * BLOCK_BYTES, n * BLOCK_BYTES, "codes").reshape(n, BLOCK_BYTES)
    exponents = _read(files, pair.scales, start, n, "exponents")
    scales = _read(files, cast.scales, 2 * start, 2 * n, "scales").reshape(n, 2)
    if tables.plain(scales) and equal(source_codes, codes) and np.array_equal(tables.expected(exponents), scales):
        found.verbatim += 2 * n
    else:
        compare_blocks(Blocks(lambda i: start + i, source_codes, exponents, codes, scales), tables, found)
    return source_codes.nbytes + codes.nbytes + exponents.nbytes + scales.nbytes


def _compare_tile(cast: Cast, unit: int, tables: ScaleTables, files: Files, found: Comparison) -> int:
    """A tile, turned band by band; returns the bytes read."""
    pair = cast.pair
    expert, rows, blocks = _Tiles.of(pair).at(unit)
    codes = _lines(files, cast.codes, pair, expert, rows, blocks, "codes")
    scales = _lines(files, cast.scales, pair, expert, rows, blocks, "scales")
    exponents = _band(files, pair.scales, pair, expert, rows, blocks, "exponents")
    expected = tables.expected(exponents.reshape(-1)).reshape(len(exponents), -1)
    same_scales = tables.plain(scales) and is_transpose(expected, scales)
    done = codes.nbytes + scales.nbytes + exponents.nbytes
    width = blocks.stop - blocks.start
    height = max(1, min(BAND_ROWS, BAND_BYTES // (width * BLOCK_BYTES)))
    for top, bottom in spans(rows.start, rows.stop, height):
        columns = slice(top - rows.start, bottom - rows.start)
        source_codes = _band(files, pair.codes, pair, expert, slice(top, bottom), blocks, "source")
        done += source_codes.nbytes
        if same_scales and is_transpose(source_codes, codes[:, columns]):
            found.verbatim += 2 * width * (bottom - top)
            continue
        origin = (expert * pair.rows + top) * pair.row_blocks + blocks.start
        part = Blocks(
            lambda i, origin=origin: origin + i // width * pair.row_blocks + i % width,  # type: ignore[misc]
            source_codes.reshape(-1, BLOCK_BYTES),
            exponents[columns].reshape(-1),
            np.ascontiguousarray(codes[:, columns].T).reshape(-1, BLOCK_BYTES),
            np.ascontiguousarray(scales[:, columns].T).reshape(-1, 2),
        )
        compare_blocks(part, tables, found)
    return done


def _read(files: Files, tensor: Tensor, start: int, nbytes: int, slot: str) -> Bytes:
    return files[tensor.path].read(tensor.start + start, nbytes, slot)


def _rectangle(file: File, start: int, stride: int, lines: int, nbytes: int, slot: str) -> Bytes:
    """`nbytes` of each of some lines that begin every `stride` bytes: uint8 [lines, nbytes]."""
    out = scratch(slot, lines, nbytes)
    if nbytes == stride:
        file.read_into(start, out)
        return out
    for i, line in enumerate(out):
        file.read_into(start + i * stride, line)
    return out


def _band(files: Files, tensor: Tensor, pair: Pair, expert: int, rows: slice, blocks: slice, slot: str) -> Bytes:
    """Some blocks of some rows of the source: uint8 [rows, bytes]."""
    size = tensor.nbytes // pair.blocks
    start = tensor.start + ((expert * pair.rows + rows.start) * pair.row_blocks + blocks.start) * size
    nbytes = (blocks.stop - blocks.start) * size
    return _rectangle(files[tensor.path], start, pair.row_blocks * size, rows.stop - rows.start, nbytes, slot)


def _lines(files: Files, tensor: Tensor, pair: Pair, expert: int, rows: slice, blocks: slice, slot: str) -> Bytes:
    """The same of the transposed destination: uint8 [bytes, rows]."""
    size = tensor.nbytes // pair.blocks
    first, many = (expert * pair.row_blocks + blocks.start) * size, (blocks.stop - blocks.start) * size
    start = tensor.start + first * pair.rows + rows.start
    return _rectangle(files[tensor.path], start, pair.rows, many, rows.stop - rows.start, slot)


def energy_of_units(cast: Cast, files: Files, check: Callable[[], None]) -> float:
    """Sum of the squares of all values of a source tensor: what errors are measured against."""
    pair, total = cast.pair, 0.0
    for first, last in spans(0, pair.blocks, CHUNK_BLOCKS):
        check()
        n = last - first
        codes = _read(files, pair.codes, first * BLOCK_BYTES, n * BLOCK_BYTES, "source").reshape(n, BLOCK_BYTES)
        total += energy(codes, _read(files, pair.scales, first, n, "exponents"), pair.bias)
    return total


def compare_bytes(
    a: Tensor, b: Tensor, start: int, nbytes: int, files: Files, progress: Progress = lambda _: None
) -> int | None:
    """Position of the first byte of [start, start + nbytes) in which two tensors of one size differ, or None."""
    for first, last in spans(start, start + nbytes, CHUNK_BYTES):
        left, right = _read(files, a, first, last - first, "source"), _read(files, b, first, last - first, "codes")
        if not equal(left, right):
            return first + int(np.argmax(left != right))
        progress(2 * (last - first))
    return None
