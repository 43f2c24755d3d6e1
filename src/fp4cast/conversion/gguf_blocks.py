"""Blocks of ggml's types 39 and 40: where the codes and scales of their weights lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fp4cast.casting.tight_rule import Ints
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.gguf_file import GgufTensor
from fp4cast.formats import E8M0_BIAS, Bytes
from fp4cast.layouts import gguf as layout
from fp4cast.parallel.ranges import spans

CHUNK_BLOCKS = 1 << 16  # MXFP4 blocks that a worker holds: 1.1 MB, and as much again for what becomes of them


def halves(records: Bytes) -> Bytes:
    """The codes of blocks in the order of type 40: records uint8 [n, 17] -> uint8 [n, 16], a half-block in 8 bytes.

    Byte j of a record's 16 holds elements j and j + 16; byte j of a half-block's 8 holds elements j and j + 8.
    """
    first, second = records[:, 1:9], records[:, 9:17]
    low = (first & 0x0F) | (second << np.uint8(4))
    return np.concatenate([low, (first >> np.uint8(4)) | (second & 0xF0)], axis=1)


def super_blocks(codes: Bytes, scales: Bytes) -> Bytes:
    """Blocks of type 40, uint8 [n / 2, 36], of codes uint8 [n, 16] as `halves` has them and scales uint8 [n, 2]."""
    return np.concatenate([scales.reshape(-1, 4), codes.reshape(-1, 32)], axis=1)


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """A `BlockSource` over blocks of type 39 that follow each other in a file."""

    name: str
    file: File
    start: int
    count: int
    bias: int = E8M0_BIAS

    def exponents(self) -> Iterator[tuple[int, Bytes]]:
        """See `BlockSource`."""
        for first, last in spans(0, self.count, CHUNK_BLOCKS):
            yield first, self.records(first, last)[:, 0].copy()

    def codes(self, blocks: Ints) -> Bytes:
        """See `BlockSource`."""
        return halves(self.file.gather(self.start, blocks, layout.MXFP4_BYTES))

    def records(self, first: int, last: int) -> Bytes:
        """Blocks as they are stored: uint8 [last - first, 17]."""
        size = layout.MXFP4_BYTES
        return self.file.read(self.start + first * size, (last - first) * size).reshape(-1, size)


def blocks_of(tensor: GgufTensor, file: File, parts: int) -> list[GgufBlocks]:
    """A tensor's blocks, in equal parts."""
    count = tensor.nbytes // layout.MXFP4_BYTES // parts
    name = f"{tensor.name} ({file.path})"
    names = [name] if parts == 1 else [f"expert {i} of {name}" for i in range(parts)]
    return [
        GgufBlocks(name, file, tensor.start + i * count * layout.MXFP4_BYTES, count) for i, name in enumerate(names)
    ]
