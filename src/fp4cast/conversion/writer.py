"""Write the pieces of a shard: bytes copied inside the kernel, scales looked up, codes transposed or shifted.

No step holds more than a tile of one tensor. A worker's memory is bounded by two tiles and one batch of `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import add
from typing import Any

import numpy as np

from fp4cast.casting.nearest import Encoded, block_scale_bytes, encode
from fp4cast.casting.tight_rule import Ints
from fp4cast.casting.turn_back import turn_back
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import BUFFERS, Buffer, Files, copy_range, write_all
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.tiles import Tile, Tiling
from fp4cast.checkpoints.transpose import transpose
from fp4cast.conversion.fp8_blocks import Fp8Of, fp8_codes, fp8_noise, fp8_scales
from fp4cast.conversion.nvfp4_blocks import exponents_of, parts
from fp4cast.conversion.recipe import BlockScalesOf, CodesOf, Constant, CopyOf, FromModel, OriginalOf
from fp4cast.conversion.tasks import Piece, Task
from fp4cast.conversion.together import groups, is_small, write_together
from fp4cast.formats import E2M1, MX_BLOCK_BYTES, Bytes
from fp4cast.parallel.progress import Advance
from fp4cast.parallel.ranges import spans

_NIBBLE_ENERGY = E2M1.values**2
_BYTE_ENERGY = np.array([_NIBBLE_ENERGY[b & 15] + _NIBBLE_ENERGY[b >> 4] for b in range(256)])


@dataclass
class Tally:
    """Counts of one tensor's changed half-blocks, and the error measured while writing.

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
        """Add some blocks: packed codes uint8 [n, 16] with exponents k int [n]."""
        energy = float((_BYTE_ENERGY[codes].sum(axis=-1) * 4.0 ** k.astype(np.float64)).sum())
        self.merge(Tally(encoded.shifted, encoded.rounded, encoded.squared_error, encoded.max_error, energy))

    def merge(self, other: Tally) -> None:
        """Add another worker's counts."""
        self.shifted += other.shifted
        self.rounded += other.rounded
        self.squared_error += other.squared_error
        self.max_error = max(self.max_error, other.max_error)
        self.energy += other.energy


Tallies = dict[str, Tally]
Computed = CodesOf | BlockScalesOf


@dataclass
class Writer:
    """Writes one piece.

    Attributes:
        files: the source's shards.
        target: descriptor of the file to write.
        progress: called with the number of bytes just written; may raise to stop.
        tallies: by module, of the tensors whose codes had to be read.
    """

    files: Files
    target: int
    progress: Advance
    tallies: Tallies = field(default_factory=dict)

    def write(self, piece: Piece) -> Tallies:
        """Write a piece's tasks; returns `tallies`."""
        for small, run in groupby(piece, is_small):
            if small:
                for group in groups(list(run)):
                    self.progress(write_together(group, self.files, self.target))
            else:
                self._alone(run)
        return self.tallies

    def _alone(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            match task.step:
                case CopyOf(path, start):
                    first, nbytes = task.first, task.last - task.first
                    copy_range(self.files[path], start + first, self.target, task.offset + first, nbytes, self.progress)
                case Constant(data):
                    self._put(task.offset, np.frombuffer(data, np.uint8))
                case FromModel() as step:
                    for expert in range(task.first, task.last):
                        self._put(task.offset + expert * step.nbytes, step.make(expert))
                case OriginalOf() as step:
                    self._original(task, step)
                case Fp8Of() as step:
                    self._fp8(task, step)
                case CodesOf() | BlockScalesOf() as step if step.transposed:
                    self._transposed(task, step)
                case BlockScalesOf() as step:
                    self._scales(task, step)
                case CodesOf() as step:
                    self._codes(task, step)

    def _original(self, task: Task, step: OriginalOf) -> None:
        """E8M0 bytes or codes of an MXFP4 tensor; block scales are read only where they decide, and so are codes."""
        size = 1 if step.scales else MX_BLOCK_BYTES
        for part in parts(step.weight, task.first, task.last, self.files):
            if step.scales:
                data, _ = exponents_of(part, step.tensor_scale, step.pair.bias, step.outside)
            elif step.changed:
                known = part.known(step.outside)
                turned = turn_back(part.codes(), part.scales(), step.tensor_scale, step.pair.bias, known)
                self.tallies.setdefault(step.pair.module, Tally()).shifted += turned.changed
                data = turned.codes
            else:
                data = part.codes()
            for first, line in part.lines(data):
                self._put(task.offset + first * size, line)

    def _fp8(self, task: Task, step: Fp8Of) -> None:
        """Codes or scales of a weight in FP8, stripe by stripe; the codes' error is measured."""
        for stripe in range(task.first, task.last):
            weights = step.read(stripe, self.files)
            scales = fp8_scales(weights)
            data = scales.astype("<f4").view(np.uint8)
            if not step.scales:
                data = fp8_codes(weights, scales)
                error, largest, energy = fp8_noise(weights, data, scales)
                tally = self.tallies.setdefault(step.module, Tally())
                tally.merge(Tally(squared_error=error, max_error=largest, energy=energy))
            self._put(task.offset + stripe * step.stripe_bytes, data)

    def _put(self, offset: int, data: Bytes) -> None:
        write_all(self.target, offset, data)
        self.progress(data.nbytes)

    def _scales(self, task: Task, step: BlockScalesOf) -> None:
        """E4M3 bytes of a pair's blocks, in their order."""
        for first, last in spans(task.first, task.last, tiles.LIMITS.scale_blocks):
            exponents = self._read(step.pair.scales, first, last - first, BUFFERS.exponents)
            self._put(task.offset + 2 * first, self._block_scales(step, exponents, partial(add, first)))

    def _codes(self, task: Task, step: CodesOf) -> None:
        """Packed codes of a pair with shifted or rounded half-blocks, in the order of its blocks."""
        size = MX_BLOCK_BYTES
        for first, last in spans(task.first, task.last, tiles.LIMITS.encode_blocks):
            codes = self._read(step.pair.codes, first * size, (last - first) * size, BUFFERS.source)
            exponents = self._read(step.pair.scales, first, last - first, BUFFERS.exponents)
            self._put(task.offset + first * size, self._encode(step, codes, exponents))

    def _transposed(self, task: Task, step: Computed) -> None:
        """Tiles of a bank: [rows, blocks] becomes [bytes of the blocks, rows], band by band."""
        size = MX_BLOCK_BYTES if isinstance(step, CodesOf) else 2
        tiling = step.pair.tiling
        for index in range(task.first, task.last):
            tile = tiling[index]
            self._announce(step, tiling, tile)
            turned = BUFFERS.tile(tile.width * size, tile.rows)
            for top, bottom in spans(tile.top, tile.bottom, tiling.band_rows):
                band = self._band(step, tiling, tile.band(top, bottom))
                columns = slice(top - tile.top, bottom - tile.top)
                transpose(band.reshape(bottom - top, tile.width * size), turned[:, columns])
            self._put_turned(task.offset + turned_offset(tiling, tile, size), tiling, turned)

    def _announce(self, step: Computed, tiling: Tiling, tile: Tile) -> None:
        """Say that a tile is read next, band by band; where its rows are apart, each is read by itself."""
        tensor, size = (step.pair.codes, MX_BLOCK_BYTES) if isinstance(step, CodesOf) else (step.pair.scales, 1)
        if tile.width == tiling.blocks:
            start = tensor.start + int(block_number(tiling, tile, 0)) * size
            self.files[tensor.path].announce(start, tile.rows * tile.width * size)

    def _put_turned(self, offset: int, tiling: Tiling, turned: Bytes) -> None:
        if turned.shape[1] == tiling.rows:
            self._put(offset, turned)
            return
        for i, line in enumerate(turned):
            self._put(offset + i * tiling.rows, line)

    def _band(self, step: Computed, tiling: Tiling, band: Tile) -> Bytes:
        """The codes or the block scales of a band, in the order of its blocks."""
        pair = step.pair
        if isinstance(step, BlockScalesOf):
            exponents = self._rows(pair.scales, tiling, band, 1, BUFFERS.exponents)
            return self._block_scales(step, exponents, partial(block_number, tiling, band))
        codes = self._rows(pair.codes, tiling, band, MX_BLOCK_BYTES, BUFFERS.source)
        if not step.encoded:
            return codes
        return self._encode(step, codes, self._rows(pair.scales, tiling, band, 1, BUFFERS.exponents))

    def _rows(self, tensor: Tensor, tiling: Tiling, band: Tile, size: int, buffer: Buffer) -> Bytes:
        """Source bytes of a band, `size` a block: uint8 [rows * blocks * size]."""
        start = tensor.start + int(block_number(tiling, band, 0)) * size
        out = self.files[tensor.path].rectangle(start, tiling.blocks * size, band.rows, band.width * size, buffer)
        return out.reshape(-1)

    def _read(self, tensor: Tensor, start: int, nbytes: int, buffer: Buffer) -> Bytes:
        return self.files[tensor.path].read(tensor.start + start, nbytes, buffer)

    def _block_scales(self, step: BlockScalesOf, exponents: Bytes, places: Callable[[Ints], Ints]) -> Bytes:
        """E4M3 bytes [2n] of some blocks; codes are read, at their places, only outside of the window."""
        codes = step.pair.codes

        def read(blocks: Ints) -> Bytes:
            return self.files[codes.path].gather(codes.start, places(blocks), MX_BLOCK_BYTES)

        return block_scale_bytes(exponents, step.scaling, step.pair.bias, read)

    def _encode(self, step: CodesOf, codes: Bytes, exponents: Bytes) -> Bytes:
        blocks, bias = codes.reshape(-1, MX_BLOCK_BYTES), step.pair.bias
        tally, out = self.tallies.setdefault(step.pair.module, Tally()), np.empty_like(blocks)
        for first, last in spans(0, len(blocks), tiles.LIMITS.encode_blocks):
            encoded = encode(blocks[first:last], exponents[first:last], step.scaling, bias)
            tally.add(encoded, blocks[first:last], exponents[first:last].astype(np.int64) - bias)
            out[first:last] = encoded.codes
        return out.reshape(-1)


def block_number(tiling: Tiling, tile: Tile, block: Any) -> Any:
    """The number in the whole bank of a tile's block, or of each of an array of blocks."""
    row, across = tile.top + block // tile.width, tile.first + block % tile.width
    return (tile.expert * tiling.rows + row) * tiling.blocks + across


def turned_offset(tiling: Tiling, tile: Tile, size: int) -> int:
    """Where a tile begins in the transposed bank [E, K/32 blocks * size, N]; its lines are N bytes apart."""
    return (tile.expert * tiling.blocks + tile.first) * size * tiling.rows + tile.top
