"""Cut a bank of experts into tiles that fit into memory, and set the size of each piece of work.

Conversion and verification share how a bank is cut, and a test shows that tiles cover each block exactly once, whatever
the sizes. Where a tile lies in a file each of them finds out by itself, so that a wrong place cannot hide from both.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp4cast.formats import MX_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that bound what is in memory, or in a processor's cache, at a time. No output byte depends on them.

    Attributes:
        write_bytes: what a worker writes before it takes the next piece: enough to make its start-up cost negligible.
        compare_bytes: what a worker compares before it takes the next piece, on each side.
        tile_bytes: codes of a tile of a bank: a whole expert, for gpt-oss.
        tile_rows: rows of a tile of a larger expert: reads and writes of a page or more.
        band_rows: rows that are transposed together: their columns fill whole cache lines, and they stay in L2.
        band_bytes: bytes of their codes, at most.
        scan_bytes: scales that the search for a tensor scale reads together and turns into int64 indices.
        scale_blocks: blocks whose scales are computed together.
        encode_blocks: blocks whose half-blocks may all have to be rounded together: some 20 MB.
        compare_blocks: blocks that are compared together: 2 MB of codes on each side.
        copy_bytes: bytes of a copied tensor that are compared together.
    """

    write_bytes: int = 32 << 20
    compare_bytes: int = 16 << 20
    tile_bytes: int = 16 << 20
    tile_rows: int = 4096
    band_rows: int = 256
    band_bytes: int = 2 << 20
    scan_bytes: int = 1 << 20
    scale_blocks: int = 1 << 16
    encode_blocks: int = 1 << 15
    compare_blocks: int = 1 << 17
    copy_bytes: int = 1 << 20


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [top, bottom) and blocks [first, last) of one expert."""

    expert: int
    top: int
    bottom: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """The number of blocks in each row."""
        return self.last - self.first

    def band(self, top: int, bottom: int) -> Tile:
        """Rows [top, bottom) of it, as a tile."""
        return Tile(self.expert, top, bottom, self.first, self.last)


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of a bank [E, N, K/32 blocks]: whole experts where they fit, else rectangles of them.

    Tiles are numbered across, then down, then expert by expert.

    Attributes:
        experts: E.
        rows: N, the output channels.
        blocks: K / 32, the MX blocks of a row.
        height: rows of a tile.
        width: blocks of a tile's row.
        band_rows: rows of a tile that are transposed together.
    """

    experts: int
    rows: int
    blocks: int
    height: int
    width: int
    band_rows: int

    @classmethod
    def of(cls, experts: int, rows: int, blocks: int) -> Tiling:
        """The tiles of a bank under `LIMITS`."""
        limits = LIMITS
        height = min(rows, max(limits.tile_rows, limits.tile_bytes // (blocks * MX_BLOCK_BYTES)))
        width = max(1, min(blocks, limits.tile_bytes // (height * MX_BLOCK_BYTES)))
        band_rows = max(1, min(limits.band_rows, limits.band_bytes // (width * MX_BLOCK_BYTES)))
        return cls(experts, rows, blocks, height, width, band_rows)

    @property
    def _down(self) -> int:
        return -(-self.rows // self.height)

    @property
    def _across(self) -> int:
        return -(-self.blocks // self.width)

    def __len__(self) -> int:
        return self.experts * self._down * self._across

    def __getitem__(self, index: int) -> Tile:
        rest, across = divmod(index, self._across)
        expert, down = divmod(rest, self._down)
        top, first = down * self.height, across * self.width
        return Tile(expert, top, min(top + self.height, self.rows), first, min(first + self.width, self.blocks))
