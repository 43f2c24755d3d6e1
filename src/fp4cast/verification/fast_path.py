"""The fast path: compare raw bytes, codes with codes and scales through a table.

Where bytes do not match, `values` decodes both sides. Work is cut into units that fit into the processor's caches:
chunks of blocks, or tiles of a transposed bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import add

import numpy as np

from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import BUFFERS, Buffer, Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.tiles import Tile, Tiling
from fp4cast.checkpoints.transpose import is_transpose
from fp4cast.families.family import Pair
from fp4cast.formats import MX_BLOCK_BYTES, Activations, Bytes
from fp4cast.layouts.layout import Form
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.ranges import spans
from fp4cast.verification.compiled import Place, same_blocks, same_bytes, same_turned, step_of
from fp4cast.verification.rounding import Nearness
from fp4cast.verification.values import Blocks, Comparison, ScaleTables, compare_blocks, energy, equal, plain


@dataclass(frozen=True, slots=True)
class Converted:
    """A source pair and the NVFP4 tensors made from it.

    Attributes:
        pair: the source's codes and scales.
        form: how the destination stores it.
        codes: the destination's codes, of the right shape and dtype.
        scales: its E4M3 block scales.
        tensor_scale: its tensor scale (S or 1/S, FP32).
        input_scale: its input scale, where there is one.
        rounded: half-blocks are said to be rounded on purpose, so it is judged whether they are near.
    """

    pair: Pair
    form: Form
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    input_scale: Tensor | None
    rounded: bool = False

    @classmethod
    def of(
        cls,
        pair: Pair,
        form: Form,
        activations: Activations,
        written: Mapping[str, Tensor],
        *,
        rounded: bool = False,
    ) -> Converted:
        """A pair and its counterpart among the tensors of a destination."""
        names = form.names(pair.module)
        return cls(
            pair,
            form,
            written[names.codes],
            written[names.block_scale],
            written[names.tensor_scale],
            written[names.input_scale] if activations == "w4a4" else None,
            rounded,
        )

    @property
    def nbytes(self) -> int:
        """Bytes on both sides."""
        tensors = (self.pair.codes, self.pair.scales, self.codes, self.scales, self.tensor_scale, self.input_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def count_units(converted: Converted) -> tuple[int, int]:
    """(number of units in which a pair is compared, source bytes of each)."""
    pair, chunk = converted.pair, tiles.LIMITS.compare_blocks
    if not converted.form.transposed:
        return -(-pair.blocks // chunk), min(chunk, pair.blocks) * (MX_BLOCK_BYTES + 1)
    tiling = converted.pair.tiling
    return len(tiling), tiling.height * tiling.width * (MX_BLOCK_BYTES + 1)


def compare_units(
    converted: Converted, first: int, last: int, tensor_scale: float, files: Files, progress: Advance = ignore
) -> Comparison:
    """Compare every value of units [first, last) of a source tensor with the destination's.

    Args:
        converted: both sides.
        first: first unit, of `count_units`.
        last: one after the last.
        tensor_scale: the destination's, as a multiplier.
        files: both sides' files.
        progress: called with the number of bytes just read.
    """
    tables = ScaleTables.of(tensor_scale, converted.pair.bias)
    found = Comparison(nearness=Nearness() if converted.rounded else None)
    for unit in range(first, last):
        if converted.form.transposed:
            progress(_compare_tile(converted, converted.pair.tiling[unit], tables, files, found))
        else:
            progress(_compare_chunk(converted, unit, tables, files, found))
    return found


def _compare_chunk(converted: Converted, unit: int, tables: ScaleTables, files: Files, found: Comparison) -> int:
    """Compare blocks that lie alike on both sides; returns the bytes read."""
    pair, at, size = converted.pair, unit * tiles.LIMITS.compare_blocks, MX_BLOCK_BYTES
    end = min(at + tiles.LIMITS.compare_blocks, pair.blocks)
    read = (end - at) * (2 * size + 3)
    step, n = step_of(end - at), end - at
    _announce(files, (pair.codes, at * size, n * size), (pair.scales, at, n))
    _announce(files, (converted.codes, at * size, n * size), (converted.scales, 2 * at, 2 * n))
    while at < end:
        same, found.zeros = same_blocks(
            (
                _place(files, pair.codes, at * size),
                _place(files, pair.scales, at),
                _place(files, converted.codes, at * size),
                _place(files, converted.scales, 2 * at),
            ),
            end - at,
            tables.pairs,
            zeros=found.zeros,
        )
        found.verbatim += 2 * same
        at += same
        if at < end:
            _decode_blocks(converted, at, min(at + step, end), tables, files, found)
            at += step
    return read


def _decode_blocks(
    converted: Converted, first: int, last: int, tables: ScaleTables, files: Files, found: Comparison
) -> None:
    """Compare blocks [first, last), and decode what is not plainly equal."""
    pair, size, n = converted.pair, MX_BLOCK_BYTES, last - first
    source_codes = _read(files, pair.codes, first * size, n * size, BUFFERS.source).reshape(n, size)
    codes = _read(files, converted.codes, first * size, n * size, BUFFERS.codes).reshape(n, size)
    found.see_codes(source_codes)
    exponents = _read(files, pair.scales, first, n, BUFFERS.exponents)
    scales = _read(files, converted.scales, 2 * first, 2 * n, BUFFERS.scales).reshape(n, 2)
    if plain(scales) and equal(source_codes, codes) and np.array_equal(tables.expected(exponents), scales):
        found.verbatim += 2 * n
    else:
        compare_blocks(Blocks(partial(add, first), source_codes, exponents, codes, scales), tables, found)


def _compare_tile(converted: Converted, tile: Tile, tables: ScaleTables, files: Files, found: Comparison) -> int:
    """Compare a tile, transposed band by band; returns the bytes read."""
    pair, tiling, at = converted.pair, converted.pair.tiling, tile.top
    codes = _turned(files, converted.codes, tiling, tile, BUFFERS.codes)
    scales = _turned(files, converted.scales, tiling, tile, BUFFERS.scales)
    if tile.width == tiling.blocks:  # its rows lie one after the other
        first, blocks = _number(tiling, tile, 0), tile.rows * tile.width
        _announce(files, (pair.codes, first * MX_BLOCK_BYTES, blocks * MX_BLOCK_BYTES), (pair.scales, first, blocks))
    while at < tile.bottom:
        block = _number(tiling, tile.band(at, tile.bottom), 0)
        places = (_place(files, pair.codes, block * MX_BLOCK_BYTES), _place(files, pair.scales, block))
        made = (codes[:, at - tile.top :], scales[:, at - tile.top :])
        same, found.zeros = same_turned(places, tiling.blocks, made, tiling.band_rows, tables.pairs, zeros=found.zeros)
        found.verbatim += 2 * tile.width * same
        at += same
        if at < tile.bottom:
            band = tile.band(at, min(at + tiling.band_rows, tile.bottom))
            columns = slice(at - tile.top, band.bottom - tile.top)
            _decode_band(converted, band, codes[:, columns], scales[:, columns], tables, files, found)
            at = band.bottom
    return codes.nbytes + scales.nbytes + tile.rows * tile.width * (MX_BLOCK_BYTES + 1)


def _decode_band(
    converted: Converted, band: Tile, codes: Bytes, scales: Bytes, tables: ScaleTables, files: Files, found: Comparison
) -> None:
    """Compare some rows with columns, and decode what is not plainly equal."""
    pair, tiling = converted.pair, converted.pair.tiling
    exponents = _rows(files, pair.scales, tiling, band, BUFFERS.exponents).reshape(-1)
    source_codes = _rows(files, pair.codes, tiling, band, BUFFERS.source)
    found.see_codes(source_codes)
    expected = tables.expected(exponents).reshape(band.rows, -1)
    if plain(scales) and is_transpose(expected, scales) and is_transpose(source_codes, codes):
        found.verbatim += 2 * band.width * band.rows
        return
    blocks = Blocks(
        partial(_number, tiling, band),
        source_codes.reshape(-1, MX_BLOCK_BYTES),
        exponents,
        np.ascontiguousarray(codes.T).reshape(-1, MX_BLOCK_BYTES),
        np.ascontiguousarray(scales.T).reshape(-1, 2),
    )
    compare_blocks(blocks, tables, found)


def _number(tiling: Tiling, tile: Tile, block: int) -> int:
    """The number in the whole bank of a tile's block."""
    row, across = divmod(block, tile.width)
    place = (tile.expert, tile.top + row, tile.first + across)
    return int(np.ravel_multi_index(place, (tiling.experts, tiling.rows, tiling.blocks)))


def _place(files: Files, tensor: Tensor, start: int) -> Place:
    return Place(files[tensor.path], tensor.start + start)


def _announce(files: Files, *ranges: tuple[Tensor, int, int]) -> None:
    """Say which bytes (tensor, first, how many) are read next, a step at a time."""
    for tensor, first, nbytes in ranges:
        files[tensor.path].announce(tensor.start + first, nbytes)


def _read(files: Files, tensor: Tensor, start: int, nbytes: int, buffer: Buffer) -> Bytes:
    return files[tensor.path].read(tensor.start + start, nbytes, buffer)


def _rows(files: Files, tensor: Tensor, tiling: Tiling, tile: Tile, buffer: Buffer) -> Bytes:
    """Source bytes of a tile, one row for each output channel: uint8 [rows, bytes]."""
    size = tensor.nbytes // (tiling.experts * tiling.rows * tiling.blocks)
    start = tensor.start + _number(tiling, tile, 0) * size
    return files[tensor.path].rectangle(start, tiling.blocks * size, tile.rows, tile.width * size, buffer)


def _turned(files: Files, tensor: Tensor, tiling: Tiling, tile: Tile, buffer: Buffer) -> Bytes:
    """Destination bytes of a tile, one row for each byte along K: uint8 [bytes, rows]."""
    size = tensor.nbytes // (tiling.experts * tiling.rows * tiling.blocks)
    first = np.ravel_multi_index(
        (tile.expert, tile.first * size, tile.top), (tiling.experts, tiling.blocks * size, tiling.rows)
    )
    start = tensor.start + int(first)
    return files[tensor.path].rectangle(start, tiling.rows, tile.width * size, tile.rows, buffer)


def energy_of_units(converted: Converted, files: Files, check: Callable[[], None]) -> float:
    """Sum of the squares of all values of a source tensor: what errors are measured against."""
    pair, total, size = converted.pair, 0.0, MX_BLOCK_BYTES
    for first, last in spans(0, pair.blocks, tiles.LIMITS.compare_blocks):
        check()
        n = last - first
        codes = _read(files, pair.codes, first * size, n * size, BUFFERS.source).reshape(n, size)
        total += energy(codes, _read(files, pair.scales, first, n, BUFFERS.exponents), pair.bias)
    return total


def compare_bytes(
    a: Tensor, b: Tensor, start: int, nbytes: int, files: Files, progress: Advance = ignore
) -> int | None:
    """Position of the first byte of [start, start + nbytes) in which two tensors of one size differ, or None."""
    for first, last in spans(start, start + nbytes, tiles.LIMITS.copy_bytes):
        _announce(files, (a, first, last - first), (b, first, last - first))
        at = first + same_bytes(_place(files, a, first), _place(files, b, first), last - first)
        if at < last:
            left = _read(files, a, at, last - at, BUFFERS.source)
            right = _read(files, b, at, last - at, BUFFERS.codes)
            if not equal(left, right):
                return at + int(np.argmax(left != right))
        progress(2 * (last - first))
    return None
