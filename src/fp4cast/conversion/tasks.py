"""A shard's work in pieces that workers do in any order: one large tensor is many pieces, many small ones are one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4cast.conversion.recipe import Codes, Constant, Copy, Made, Output, OutputShard, Scales
from fp4cast.families.recognise import BLOCK_BYTES, Pair
from fp4cast.parallel.ranges import grouped, spans

__all__ = ["Computed", "Copied", "Known", "Piece", "Supplied", "Tile", "Tiling", "pieces"]

PIECE_BYTES = 32 << 20  # what a piece writes, about: enough to forget what starting it costs
TILE_BYTES = 16 << 20  # codes of one tile of a transposed bank: a whole expert, for gpt-oss
_SQUARE = 4096  # rows of a tile of an expert that is larger: reads and writes of a page or more


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that lie together in a source shard and in the new one."""

    offset: int
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Known:
    """Bytes known beforehand."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """How many."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Computed:
    """Part of a tensor that is computed: its blocks [first, last), or its tiles where it is transposed.

    Attributes:
        offset: where the whole tensor begins in the new file.
        step: what it is made of.
        first: first block or tile.
        last: one after the last.
        nbytes: about how many are written.
    """

    offset: int
    step: Codes | Scales
    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Supplied:
    """One part of a tensor that is in memory."""

    offset: int
    step: Made
    part: int

    @property
    def nbytes(self) -> int:
        """Of this part."""
        return self.step.nbytes


Task = Copied | Known | Computed | Supplied
Piece = Sequence[Task]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [top, bottom) of blocks [first, last) of one expert."""

    expert: int
    top: int
    bottom: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of a bank that is transposed: whole experts where they fit, squares otherwise."""

    pair: Pair
    height: int
    width: int

    @classmethod
    def of(cls, pair: Pair) -> Tiling:
        """The tiles of a pair."""
        height = min(pair.rows, max(_SQUARE, TILE_BYTES // (pair.row_blocks * BLOCK_BYTES)))
        width = max(1, min(pair.row_blocks, TILE_BYTES // (height * BLOCK_BYTES)))
        return cls(pair, height, width)

    @property
    def _down(self) -> int:
        return -(-self.pair.rows // self.height)

    @property
    def _across(self) -> int:
        return -(-self.pair.row_blocks // self.width)

    def __len__(self) -> int:
        return self.pair.experts * self._down * self._across

    def __getitem__(self, index: int) -> Tile:
        rest, across = divmod(index, self._across)
        expert, down = divmod(rest, self._down)
        top, first = down * self.height, across * self.width
        bottom, last = min(top + self.height, self.pair.rows), min(first + self.width, self.pair.row_blocks)
        return Tile(expert, top, bottom, first, last)


def _follows(before: Output, after: Output) -> bool:
    """Whether two outputs, neighbours in the new file, are one run of bytes: known, or together in a source shard."""
    match before.step, after.step:
        case Copy(a), Copy(b):
            return a.path == b.path and a.start + a.nbytes == b.start
        case Constant(), Constant():
            return True
    return False


def _runs(outputs: Sequence[Output]) -> Iterator[Sequence[Output]]:
    """Neighbours that are one run of bytes, together."""
    first = 0
    for i in range(1, len(outputs) + 1):
        if i == len(outputs) or not _follows(outputs[i - 1], outputs[i]):
            yield outputs[first:i]
            first = i


def _computed(offset: int, step: Codes | Scales) -> Iterator[Computed]:
    size = BLOCK_BYTES if isinstance(step, Codes) else 2  # bytes that a block becomes
    if not step.transposed:
        for first, last in spans(0, step.pair.blocks, PIECE_BYTES // size):
            yield Computed(offset, step, first, last, (last - first) * size)
        return
    tiling = Tiling.of(step.pair)
    tile_bytes = tiling.height * tiling.width * size
    for first, last in spans(0, len(tiling), PIECE_BYTES // tile_bytes):
        yield Computed(offset, step, first, last, (last - first) * tile_bytes)


def _tasks(shard: OutputShard) -> Iterator[Task]:
    for run in _runs(shard.outputs):
        offset = shard.layout.offsets[run[0].name]
        match run[0].step:
            case Copy(tensor):
                nbytes = sum(output.step.tensor.nbytes for output in run if isinstance(output.step, Copy))
                for first, last in spans(0, nbytes, PIECE_BYTES):
                    yield Copied(offset + first, tensor.path, tensor.start + first, last - first)
            case Constant():
                yield Known(offset, b"".join(output.step.data for output in run if isinstance(output.step, Constant)))
            case Made() as made:
                for part in range(made.parts):
                    yield Supplied(offset + part * made.nbytes, made, part)
            case Codes() | Scales() as step:
                yield from _computed(offset, step)


def pieces(shard: OutputShard) -> Iterator[Piece]:
    """The work of a shard but for its header; the pieces depend on nothing but the shard."""
    return grouped(((task, task.nbytes) for task in _tasks(shard)), PIECE_BYTES)
