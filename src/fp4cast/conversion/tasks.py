"""Cut a shard's work into pieces for workers: a large tensor is many pieces, many small tensors are one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fp4cast.checkpoints import tiles
from fp4cast.conversion.fp8_blocks import Fp8Of
from fp4cast.conversion.recipe import (
    BlockScalesOf,
    CodesOf,
    Constant,
    CopyOf,
    FromModel,
    OriginalOf,
    Output,
    OutputShard,
    Step,
)
from fp4cast.formats import MX_BLOCK_BYTES
from fp4cast.parallel.ranges import grouped, spans


@dataclass(frozen=True, slots=True)
class Task:
    """A range [first, last) of a step's output.

    Attributes:
        offset: where the step's whole output begins in the new file.
        step: what makes the bytes.
        first: the first byte of a copy, expert of a model's weight, stripe of one in FP8, tile of a transposed bank,
            or block of other codes and scales; 0 for a constant, which is whole.
        last: one after the last.
        nbytes: about how many bytes are written.
    """

    offset: int
    step: Step
    first: int
    last: int
    nbytes: int


Piece = Sequence[Task]


def pieces(shard: OutputShard) -> Iterator[Piece]:
    """A shard's work except its header, in pieces that depend on the shard alone."""
    return grouped(((task, task.nbytes) for task in _tasks(shard)), tiles.LIMITS.write_bytes)


def _tasks(shard: OutputShard) -> Iterator[Task]:
    for offset, step in _joined(shard):
        units, size = _units(step)
        if units * size <= tiles.LIMITS.write_bytes:
            yield Task(offset, step, 0, units, units * size)
            continue
        for first, last in spans(0, units, tiles.LIMITS.write_bytes // size):
            yield Task(offset, step, first, last, (last - first) * size)


def _units(step: Step) -> tuple[int, int]:
    """(number of units that a step can be cut into, bytes of each)."""
    match step:
        case CopyOf():
            return step.nbytes, 1
        case Constant():
            return 1, len(step.data)
        case FromModel():
            return step.experts, step.nbytes
        case Fp8Of():
            return step.stripes, step.stripe_bytes
        case CodesOf() | BlockScalesOf() | OriginalOf():
            size = _block_bytes(step)
            if not step.transposed:
                return step.pair.blocks, size
            tiling = step.pair.tiling
            return len(tiling), tiling.height * tiling.width * size


def _block_bytes(step: CodesOf | BlockScalesOf | OriginalOf) -> int:
    """Bytes that a block becomes."""
    match step:
        case BlockScalesOf():
            return 2
        case OriginalOf(scales=True):
            return 1
    return MX_BLOCK_BYTES


def _joined(shard: OutputShard) -> Iterator[tuple[int, Step]]:
    """(offset, step) of the outputs; source neighbours are joined into one step, and so are constants."""
    run: list[Output] = []
    for output in shard.outputs:
        if run and not _follows(run[-1].step, output.step):
            yield shard.layout.offsets[run[0].name], _join(run)
            run = []
        run.append(output)
    if run:
        yield shard.layout.offsets[run[0].name], _join(run)


def _follows(before: Step, after: Step) -> bool:
    """Whether two steps, neighbours in the new file, are one run of bytes."""
    match before, after:
        case CopyOf(), CopyOf():
            return before.path == after.path and before.start + before.nbytes == after.start
        case Constant(), Constant():
            return True
    return False


def _join(run: Sequence[Output]) -> Step:
    first = run[0].step
    if len(run) == 1:
        return first
    if isinstance(first, CopyOf):
        total = sum(output.step.nbytes for output in run if isinstance(output.step, CopyOf))
        return CopyOf(first.path, first.start, total)
    return Constant(b"".join(output.step.data for output in run if isinstance(output.step, Constant)))
