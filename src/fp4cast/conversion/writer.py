"""Writes the pieces of a shard: bytes copied inside the kernel, scales looked up, codes turned or shifted.

No step holds more than a tile of one tensor. A worker's memory is bounded by two tiles and one batch of `encode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fp4cast.casting.nearest import Encoded, block_scale_bytes, encode
from fp4cast.casting.tight_rule import Ints
from fp4cast.checkpoints.byte_ranges import Files, copy_range, scratch, write_all
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.transpose import transpose
from fp4cast.conversion.recipe import Codes, Scales
from fp4cast.conversion.tasks import Computed, Copied, Known, Piece, Supplied, Tile, Tiling
from fp4cast.families.recognise import BLOCK_BYTES
from fp4cast.formats import E2M1, Bytes
from fp4cast.parallel.ranges import spans

__all__ = ["Tallies", "Tally", "Writer"]

CHUNK_BLOCKS = 1 << 16  # blocks whose scales are looked up together
ENCODE_BLOCKS = 1 << 15  # blocks whose half-blocks may all have to be rounded together: some 20 MB
BAND_ROWS = 256  # rows turned together: their columns fill whole cache lines, and the band stays in the L2 cache
BAND_BYTES = 2 << 20  # of codes, at most
_NIBBLE_ENERGY = E2M1.values**2
_BYTE_ENERGY = np.array([_NIBBLE_ENERGY[b & 15] + _NIBBLE_ENERGY[b >> 4] for b in range(256)])


@dataclass
class Tally:
    """What was done to one tensor's half-blocks, and the error measured while doing it.

    Attributes:
        shifted: half-blocks written with shifted codes; exact.
        rounded: half-blocks that could not be written exactly.
        squared_error: sum over all weights.
        max_error: largest absolute error of a weight.
        energy: sum of the squares of all source values, for the SNR.
    """

    shifted: int = 0
    rounded: int = 0
    squared_error: float = 0.0
    max_error: float = 0.0
    energy: float = 0.0

    def add(self, encoded: Encoded, codes: Bytes, k: Ints) -> None:
        """Count some blocks: packed codes uint8 [n, 16] with exponents k int [n]."""
        self.shifted += encoded.shifted
        self.rounded += encoded.rounded
        self.squared_error += encoded.squared_error
        self.max_error = max(self.max_error, encoded.max_error)
        self.energy += float((_BYTE_ENERGY[codes].sum(axis=-1) * 4.0 ** k.astype(np.float64)).sum())

    def merge(self, other: Tally) -> None:
        """Add what another worker counted."""
        self.shifted += other.shifted
        self.rounded += other.rounded
        self.squared_error += other.squared_error
        self.max_error = max(self.max_error, other.max_error)
        self.energy += other.energy


Tallies = dict[str, Tally]


@dataclass
class Writer:
    """Writes one piece.

    Attributes:
        files: the source's shards.
        target: descriptor of the file to write.
        progress: called with the number of bytes just written; may raise to stop.
        tallies: by module, what was done to the tensors whose codes had to be looked at.
    """

    files: Files
    target: int
    progress: Callable[[int], None]
    tallies: Tallies = field(default_factory=dict)

    def write(self, piece: Piece) -> Tallies:
        """Write a piece's tasks; returns `tallies`."""
        for task in piece:
            match task:
                case Copied(offset, path, start, nbytes):
                    copy_range(self.files[path], start, self.target, offset, nbytes, self.progress)
                case Known(offset, data):
                    self._put(offset, np.frombuffer(data, np.uint8))
                case Supplied(offset, step, part):
                    self._put(offset, step.make(part))
                case Computed(step=step) if step.transposed:
                    self._transposed(task)
                case Computed(step=Scales()):
                    self._scales(task)
                case Computed():
                    self._codes(task)
        return self.tallies

    def _put(self, offset: int, data: Bytes) -> None:
        write_all(self.target, offset, data)
        self.progress(data.nbytes)

    def _scales(self, task: Computed) -> None:
        """E4M3 bytes of a pair's blocks, in their order."""
        for first, last in spans(task.first, task.last, CHUNK_BLOCKS):
            exponents = self._read(task.step.pair.scales, first, last - first, "scales")
            scales = self._block_scales(task.step, exponents, lambda odd, first=first: odd + first)  # type: ignore[misc]
            self._put(task.offset + 2 * first, scales)

    def _codes(self, task: Computed) -> None:
        """Packed codes of a pair with shifted or rounded half-blocks, in the order of its blocks."""
        pair = task.step.pair
        for first, last in spans(task.first, task.last, ENCODE_BLOCKS):
            codes = self._read(pair.codes, first * BLOCK_BYTES, (last - first) * BLOCK_BYTES, "codes")
            exponents = self._read(pair.scales, first, last - first, "scales")
            self._put(task.offset + first * BLOCK_BYTES, self._encode(task.step, codes, exponents))

    def _transposed(self, task: Computed) -> None:
        """Tiles of a bank: [rows, blocks] becomes [bytes of the blocks, rows], band by band."""
        step = task.step
        size = BLOCK_BYTES if isinstance(step, Codes) else 2
        tiling = Tiling.of(step.pair)
        for index in range(task.first, task.last):
            tile = tiling[index]
            rows, lines = tile.bottom - tile.top, (tile.last - tile.first) * size
            turned = scratch("tile", lines, rows)
            for top, bottom in spans(tile.top, tile.bottom, _band_rows(tile)):
                band = self._band(step, Tile(tile.expert, top, bottom, tile.first, tile.last))
                transpose(band.reshape(bottom - top, lines), turned[:, top - tile.top : bottom - tile.top])
            self._put_turned(task, tile, size, turned)

    def _put_turned(self, task: Computed, tile: Tile, size: int, turned: Bytes) -> None:
        pair = task.step.pair
        offset = task.offset + (tile.expert * pair.row_blocks + tile.first) * size * pair.rows
        if turned.shape[1] == pair.rows:
            self._put(offset, turned)
            return
        for i, line in enumerate(turned):
            self._put(offset + i * pair.rows + tile.top, line)

    def _band(self, step: Codes | Scales, band: Tile) -> Bytes:
        """The codes or the block scales of a band, in the order of its blocks."""
        pair = step.pair
        if isinstance(step, Codes):
            codes = self._rows(pair.codes, step, band, BLOCK_BYTES, "codes")
            if step.scaling.verbatim:
                return codes
            return self._encode(step, codes, self._rows(pair.scales, step, band, 1, "scales"))
        exponents = self._rows(pair.scales, step, band, 1, "scales")
        width, origin = band.last - band.first, (band.expert * pair.rows + band.top) * pair.row_blocks + band.first
        return self._block_scales(step, exponents, lambda odd: origin + odd // width * pair.row_blocks + odd % width)

    def _rows(self, tensor: Tensor, step: Codes | Scales, band: Tile, size: int, slot: str) -> Bytes:
        """Source bytes of a band, `size` a block: uint8 [rows * blocks * size]."""
        pair, width = step.pair, band.last - band.first
        first_row, rows = band.expert * pair.rows + band.top, band.bottom - band.top
        if width == pair.row_blocks:
            return self._read(tensor, first_row * width * size, rows * width * size, slot)
        out = scratch(slot, rows, width * size)
        for i, row in enumerate(out):
            at = ((first_row + i) * pair.row_blocks + band.first) * size
            self.files[tensor.path].read_into(tensor.start + at, row)
        return out.reshape(-1)

    def _read(self, tensor: Tensor, start: int, nbytes: int, slot: str) -> Bytes:
        return self.files[tensor.path].read(tensor.start + start, nbytes, slot)

    def _block_scales(self, step: Codes | Scales, exponents: Bytes, position: Callable[[Ints], Ints]) -> Bytes:
        """E4M3 bytes [2n] of some blocks; codes are read, at their position, only outside of the window."""
        codes = step.pair.codes

        def read(blocks: Ints) -> Bytes:
            return self.files[codes.path].gather(codes.start, position(blocks), BLOCK_BYTES)

        return block_scale_bytes(exponents, step.scaling, step.pair.bias, read)

    def _encode(self, step: Codes | Scales, codes: Bytes, exponents: Bytes) -> Bytes:
        blocks, bias = codes.reshape(-1, BLOCK_BYTES), step.pair.bias
        tally, out = self.tallies.setdefault(step.pair.module, Tally()), np.empty_like(blocks)
        for first, last in spans(0, len(blocks), ENCODE_BLOCKS):
            encoded = encode(blocks[first:last], exponents[first:last], step.scaling, bias)
            tally.add(encoded, blocks[first:last], exponents[first:last].astype(np.int64) - bias)
            out[first:last] = encoded.codes
        return out.reshape(-1)


def _band_rows(tile: Tile) -> int:
    return max(1, min(BAND_ROWS, BAND_BYTES // ((tile.last - tile.first) * BLOCK_BYTES)))
