"""Executes a Plan, shard by shard, without a decision of its own.

A shard is written beside its final name and renamed when it is whole. Codes that keep their order are copied inside
the kernel; no step holds more than a tile of one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fp4cast.errors import DestinationError
from fp4cast.exact import Ints, halve, outside_window, scale_table
from fp4cast.files import CHUNK_BYTES, Files, copy_range, write_all
from fp4cast.formats import E2M1, Bytes
from fp4cast.nearest import Encoded, encode
from fp4cast.plan import Codes, Constant, Copy, Output, OutputShard, Plan, Scales
from fp4cast.shards import Tensor
from fp4cast.sources import BLOCK_BYTES, Pair
from fp4cast.staging import write_whole
from fp4cast.workers import workers

__all__ = ["Tally", "run"]

ENCODE_BLOCKS = 1 << 15  # blocks whose half-blocks may all have to be rounded together: some 20 MB
TILE_BYTES = 16 << 20  # codes of one tile of a transposed bank: a whole expert, for gpt-oss
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


Tallies = dict[str, Tally]


def run(
    plan: Plan,
    directory: Path,
    *,
    state: Path,
    jobs: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Tallies:
    """Write every shard of a plan into `directory`.

    Args:
        plan: what to write.
        directory: where, existing.
        state: where finished shards leave a note, so that a later run of the same plan skips them.
        jobs: shards written at the same time.
        progress: called from the workers with the number of bytes just written.

    Returns:
        By module, what was done to the tensors whose codes had to be looked at.
    """
    with workers(jobs) as pool:

        def report(nbytes: int) -> None:
            pool.check()
            progress(nbytes)

        tasks = [pool.submit(_finish_shard, shard, directory, state, report) for shard in plan.shards]
        # In the order of completion, so that the first error stops the rest.
        for task in as_completed(tasks):
            task.result()
    return {module: tally for task in tasks for module, tally in task.result().items()}


def _finish_shard(shard: OutputShard, directory: Path, state: Path, progress: Callable[[int], None]) -> Tallies:
    """Write one shard, or find that an earlier run did."""
    path, note = directory / shard.file, state / f"{shard.file}.done"
    partial = state / f"{shard.file}.partial"
    try:
        if path.exists() and path.stat().st_size == shard.layout.size and (known := _read_note(note)) is not None:
            progress(shard.layout.size)
            return known
        tallies = _write_shard(shard, partial, progress)
        partial.replace(path)
        write_whole(note, json.dumps({module: asdict(tally) for module, tally in tallies.items()}).encode())
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error
    return tallies


def _read_note(note: Path) -> Tallies | None:
    """What an earlier run noted of a shard that it finished; None where it did not, or where the note is damaged."""
    try:
        return {module: Tally(**tally) for module, tally in json.loads(note.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write_shard(shard: OutputShard, path: Path, progress: Callable[[int], None]) -> Tallies:
    tallies: Tallies = {}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        with Files() as files:
            os.ftruncate(target, shard.layout.size)
            write_all(target, 0, np.frombuffer(shard.layout.header, np.uint8))
            progress(len(shard.layout.header))
            writer = _Writer(files, target, progress, tallies)
            for offset, outputs in _merged(shard):
                writer.write(offset, outputs)
    finally:
        os.close(target)
    return tallies


def _follows(before: Output, after: Output) -> bool:
    """Whether two outputs, neighbours in the new file, are copies of neighbours in the old one."""
    if not isinstance(before.step, Copy) or not isinstance(after.step, Copy):
        return False
    a, b = before.step.tensor, after.step.tensor
    return a.path == b.path and a.start + a.nbytes == b.start


def _merged(shard: OutputShard) -> Iterator[tuple[int, Sequence[Output]]]:
    """(offset, outputs) with runs of neighbouring copies together."""
    group: list[Output] = []
    for output in shard.outputs:
        if group and not _follows(group[-1], output):
            yield shard.layout.offsets[group[0].name], group
            group = []
        group.append(output)
    if group:
        yield shard.layout.offsets[group[0].name], group


@dataclass
class _Writer:
    """Writes the outputs of one shard."""

    files: Files
    target: int
    progress: Callable[[int], None]
    tallies: Tallies

    def write(self, offset: int, outputs: Sequence[Output]) -> None:
        """Write one output, or a run of copies, at its offset."""
        match outputs[0].step:
            case Copy(first):
                nbytes = sum(output.step.tensor.nbytes for output in outputs if isinstance(output.step, Copy))
                copy_range(self.files[first.path], first.start, self.target, offset, nbytes, self.progress)
            case Constant(data):
                self._put(offset, np.frombuffer(data, np.uint8))
            case Scales() as step:
                for at, scales in self._transposed_scales(step) if step.transposed else self._scales(step):
                    self._put(offset + at, scales)
            case Codes() as step:
                for at, codes in self._transposed_codes(step) if step.transposed else self._codes(step):
                    self._put(offset + at, codes)

    def _put(self, offset: int, data: Bytes) -> None:
        write_all(self.target, offset, data)
        self.progress(data.nbytes)

    def _scales(self, step: Scales) -> Iterator[tuple[int, Bytes]]:
        """(offset, E4M3 bytes) of a pair in the order of its blocks."""
        scales = step.pair.scales
        many = CHUNK_BYTES if step.scaling.verbatim else ENCODE_BLOCKS
        for start in range(0, scales.nbytes, many):
            chunk = self.files[scales.path].read(scales.start + start, min(many, scales.nbytes - start))
            yield 2 * start, self._block_scales(step, chunk, start)

    def _block_scales(self, step: Scales, exponents: Bytes, start: int) -> Bytes:
        """E4M3 bytes [2n] of consecutive blocks from block `start` on; codes are read only outside of the window."""
        m, bias = step.scaling.m, step.pair.bias
        table = scale_table(m if m is not None else 0, bias)
        out = halve(exponents, table)
        if step.scaling.verbatim:
            return out
        outside = outside_window(exponents.astype(np.int64) - bias, m)
        codes = step.pair.codes
        blocks = self.files[codes.path].gather(codes.start, outside + start, BLOCK_BYTES)
        out.reshape(-1, 2)[outside] = encode(blocks, exponents[outside], step.scaling, bias).block_scales
        return out

    def _codes(self, step: Codes) -> Iterator[tuple[int, Bytes]]:
        """(offset, packed codes) of a pair with shifted or rounded half-blocks, in the order of its blocks."""
        pair, many = step.pair, ENCODE_BLOCKS
        for start in range(0, pair.blocks, many):
            n = min(many, pair.blocks - start)
            codes = self.files[pair.codes.path].read(pair.codes.start + start * BLOCK_BYTES, n * BLOCK_BYTES)
            exponents = self.files[pair.scales.path].read(pair.scales.start + start, n)
            yield start * BLOCK_BYTES, self._encode(step, codes.reshape(-1, BLOCK_BYTES), exponents)

    def _encode(self, step: Codes, codes: Bytes, exponents: Bytes) -> Bytes:
        tally, out = self.tallies.setdefault(step.pair.module, Tally()), np.empty_like(codes)
        for i in range(0, len(codes), ENCODE_BLOCKS):
            part = slice(i, i + ENCODE_BLOCKS)
            encoded = encode(codes[part], exponents[part], step.scaling, step.pair.bias)
            tally.add(encoded, codes[part], exponents[part].astype(np.int64) - step.pair.bias)
            out[part] = encoded.codes
        return out

    def _transposed_scales(self, step: Scales) -> Iterator[tuple[int, Bytes]]:
        """(offset, E4M3 bytes [K/16, N]) of each expert of a bank."""
        pair = step.pair
        size = pair.rows * pair.row_blocks
        for expert in range(pair.experts):
            exponents = self.files[pair.scales.path].read(pair.scales.start + expert * size, size)
            many = size if step.scaling.verbatim else ENCODE_BLOCKS
            parts = [self._block_scales(step, exponents[i : i + many], expert * size + i) for i in range(0, size, many)]
            scales = np.concatenate(parts)
            yield 2 * expert * size, np.ascontiguousarray(scales.reshape(pair.rows, -1).T)

    def _transposed_codes(self, step: Codes) -> Iterator[tuple[int, Bytes]]:
        """(offset, packed codes [K/2 of a tile, N]) of a bank, tile by tile."""
        pair = step.pair
        width = max(1, min(pair.row_blocks, TILE_BYTES // (pair.rows * BLOCK_BYTES)))
        for expert in range(pair.experts):
            for first in range(0, pair.row_blocks, width):
                last = min(first + width, pair.row_blocks)
                tile = self._tile(pair, pair.codes, BLOCK_BYTES, expert, first, last)
                if not step.scaling.verbatim:
                    exponents = self._tile(pair, pair.scales, 1, expert, first, last)
                    tile = self._encode(step, tile.reshape(-1, BLOCK_BYTES), exponents.reshape(-1))
                yield (
                    (expert * pair.row_blocks + first) * BLOCK_BYTES * pair.rows,
                    transpose(tile.reshape(pair.rows, -1)),
                )

    def _tile(self, pair: Pair, tensor: Tensor, size: int, expert: int, first: int, last: int) -> Bytes:
        """Blocks [first, last) of every row of an expert, `size` bytes each: uint8 [N, (last - first) * size]."""
        file, row = self.files[tensor.path], pair.row_blocks * size
        start = tensor.start + expert * pair.rows * row
        if last - first == pair.row_blocks:
            return file.read(start, pair.rows * row).reshape(pair.rows, row)
        tile = np.empty((pair.rows, (last - first) * size), np.uint8)
        for i in range(pair.rows):
            file.read_into(start + i * row + first * size, tile[i])
        return tile


def transpose(matrix: Bytes, edge: int = 512) -> Bytes:
    """A contiguous transpose of uint8 [N, M], in squares that stay in the cache."""
    out = np.empty(matrix.shape[::-1], np.uint8)
    for i in range(0, matrix.shape[0], edge):
        for j in range(0, matrix.shape[1], edge):
            out[j : j + edge, i : i + edge] = matrix[i : i + edge, j : j + edge].T
    return out
