"""Read the blocks of an NVFP4 weight in the order of the MXFP4 tensor that it becomes, a chunk or a band at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from fp4cast.casting.tight_rule import Ints
from fp4cast.casting.turn_back import TurnedBack, exponent_bytes, exponent_table, turn_back
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import BUFFERS, Buffer, Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.tiles import Tile, Tiling
from fp4cast.checkpoints.transpose import transpose
from fp4cast.conversion.outside import Outside
from fp4cast.formats import MX_BLOCK_BYTES, Bytes
from fp4cast.layouts.read_back import Weight
from fp4cast.parallel.ranges import spans


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of `rows` rows, `width` neighbours in each; valid until the next part is read.

    Attributes:
        start: the number of the first block in the MXFP4 tensor.
        rows: how many rows.
        width: how many blocks of each.
        stride: blocks from one row to the next.
        codes: reads packed codes uint8 [rows * width, 16].
        scales: reads E4M3 bytes uint8 [rows * width, 2].
    """

    start: int
    rows: int
    width: int
    stride: int
    codes: Callable[[], Bytes]
    scales: Callable[[], Bytes]

    def numbers(self, blocks: Ints) -> Ints:
        """The numbers in the MXFP4 tensor of some blocks of this part."""
        return self.start + blocks // self.width * self.stride + blocks % self.width

    def known(self, outside: Outside | None) -> Outside | None:
        """What is known of blocks of this part, by their places in it; None for nothing."""
        found = None if outside is None else outside.within(self.start, self.rows, self.width, self.stride)
        return found if found is not None and found.numbers.size else None

    def lines(self, data: Bytes) -> Iterator[tuple[int, Bytes]]:
        """(number of the first block, bytes) of each run of blocks that lie together, of bytes for all of them."""
        if self.rows == 1 or self.width == self.stride:
            yield self.start, data.reshape(-1)
        else:
            for row, line in enumerate(data.reshape(self.rows, -1)):
                yield self.start + row * self.stride, line


def count_units(weight: Weight) -> tuple[int, int]:
    """(number of units that `parts` can be asked for, blocks of each): blocks, or tiles of a transposed bank."""
    if not weight.form.transposed:
        return weight.pair.blocks, 1
    tiling = weight.pair.tiling
    return len(tiling), tiling.height * tiling.width


def parts(weight: Weight, first: int, last: int, files: Files) -> Iterator[Part]:
    """Read units [first, last) of a weight."""
    if weight.form.transposed:
        for index in range(first, last):
            yield from _bands(weight, weight.pair.tiling[index], files)
        return
    for start, end in spans(first, last, tiles.LIMITS.encode_blocks):
        yield Part(
            start,
            1,
            end - start,
            end - start,
            partial(_read, files, weight.codes, start, end, MX_BLOCK_BYTES, BUFFERS.source),
            partial(_read, files, weight.block_scales, start, end, 2, BUFFERS.exponents),
        )


def _read(files: Files, tensor: Tensor, first: int, last: int, size: int, buffer: Buffer) -> Bytes:
    return files[tensor.path].read(tensor.start + first * size, (last - first) * size, buffer).reshape(-1, size)


def _bands(weight: Weight, tile: Tile, files: Files) -> Iterator[Part]:
    """The bands of a tile; what is stored transposed is read once, when it is first asked for."""
    tiling = weight.pair.tiling
    codes = _Turned(weight.codes, MX_BLOCK_BYTES, tiling, tile, files)
    scales = _Turned(weight.block_scales, 2, tiling, tile, files)
    for top, bottom in spans(tile.top, tile.bottom, tiling.band_rows):
        yield Part(
            (tile.expert * tiling.rows + top) * tiling.blocks + tile.first,
            bottom - top,
            tile.width,
            tiling.blocks,
            partial(codes.band, top, bottom, BUFFERS.codes, BUFFERS.source),
            partial(scales.band, top, bottom, BUFFERS.scales, BUFFERS.exponents),
        )


@dataclass(slots=True)
class _Turned:
    """A tile of a tensor [E, K bytes, N], `size` bytes a block."""

    tensor: Tensor
    size: int
    tiling: Tiling
    tile: Tile
    files: Files
    data: Bytes | None = None

    def band(self, top: int, bottom: int, whole: Buffer, out: Buffer) -> Bytes:
        """Rows [top, bottom), each channel's bytes together: uint8 [rows * blocks, size]."""
        if self.data is None:
            self.data = self._read(whole)
        rows = out(bottom - top, self.tile.width * self.size)
        transpose(self.data[:, top - self.tile.top : bottom - self.tile.top], rows)
        return rows.reshape(-1, self.size)

    def _read(self, buffer: Buffer) -> Bytes:
        tile, rows = self.tile, self.tiling.rows
        line = (tile.expert * self.tiling.blocks + tile.first) * self.size
        start = self.tensor.start + line * rows + tile.top
        return self.files[self.tensor.path].rectangle(start, rows, tile.width * self.size, tile.rows, buffer)


def exponents_of(
    part: Part, tensor_scale: float, bias: int, outside: Outside | None
) -> tuple[Bytes, TurnedBack | None]:
    """(E8M0 bytes uint8 [n], what became of its blocks where their scales alone did not decide)."""
    scales, known = part.scales(), part.known(outside)
    plain = exponent_bytes(scales, exponent_table(tensor_scale, bias)) if known is None else None
    if plain is not None:
        return plain, None
    turned = turn_back(part.codes(), scales, tensor_scale, bias, known)
    return turned.exponents, turned


def read_scalar(tensor: Tensor, files: Files) -> float:
    """The value of an FP32 tensor of one element."""
    return float(np.frombuffer(files[tensor.path].read(tensor.start, 4).tobytes(), "<f4")[0])
