"""Write small tensors together: neighbours in one read and one write, and the scales of many in one lookup.

A tensor of a few kilobytes costs calls, not bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fp4cast.casting.tight_rule import halve, scale_table
from fp4cast.checkpoints.byte_ranges import BUFFERS, Files, write_all
from fp4cast.checkpoints.neighbours import Range, read_ranges
from fp4cast.conversion.recipe import BlockScalesOf, CopyOf
from fp4cast.conversion.tasks import Task
from fp4cast.formats import Bytes
from fp4cast.parallel.ranges import grouped

SMALL_BYTES = 32 << 10  # of a task that is written with others
TOGETHER_BYTES, MOST = 1 << 20, 512  # of tasks that are written together, and tasks


def is_small(task: Task) -> bool:
    """Whether a task can be written together with others: a copy, or scales that follow from exponents alone."""
    step = task.step
    if task.nbytes > SMALL_BYTES:
        return False
    if isinstance(step, BlockScalesOf):
        return step.scaling.verbatim and step.scaling.m is not None and not step.transposed
    return isinstance(step, CopyOf)


def groups(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Cut small tasks, neighbours in the new file, into groups to write together."""
    return grouped(((task, task.nbytes) for task in tasks), TOGETHER_BYTES, MOST)


def write_together(group: Sequence[Task], files: Files, target: int) -> int:
    """Write small tasks that follow each other in the new file; returns their bytes.

    Args:
        group: the tasks, all `is_small`.
        files: the source's.
        target: descriptor of the new file.
    """
    scaled = [task for task in group if isinstance(task.step, BlockScalesOf)]
    out = BUFFERS.tile(sum(task.nbytes for task in group))
    exponents = BUFFERS.exponents(sum(task.last - task.first for task in scaled))
    into, aside = out.data.cast("B"), exponents.data.cast("B")
    ranges: list[Range] = []
    places: list[tuple[int, int]] = []  # in `out` and in `exponents`, where the scales of a task begin
    at = beside = 0
    for task in group:
        step, size = task.step, task.last - task.first
        if isinstance(step, CopyOf):
            ranges.append((step.path, step.start + task.first, into[at : at + size]))
        elif isinstance(step, BlockScalesOf):
            scales = step.pair.scales
            ranges.append((scales.path, scales.start + task.first, aside[beside : beside + size]))
            places.append((at, beside))
            beside += size
        at += task.nbytes
    read_ranges(files, ranges)
    encoded = _block_scales(scaled, exponents)
    for task, (at, beside) in zip(scaled, places, strict=True):
        out[at : at + task.nbytes] = encoded[2 * beside : 2 * beside + task.nbytes]
    write_all(target, group[0].offset + group[0].first * _width(group[0]), out)
    return out.nbytes


def _width(task: Task) -> int:
    """The bytes that a unit of a small task becomes."""
    return 2 if isinstance(task.step, BlockScalesOf) else 1


def _block_scales(tasks: Sequence[Task], exponents: Bytes) -> Bytes:
    """The E4M3 bytes of both half-blocks of all blocks of some tasks: uint8 [n] -> uint8 [2n]."""
    number: dict[tuple[int, int], int] = {}
    steps = [task.step for task in tasks if isinstance(task.step, BlockScalesOf)]
    which = [number.setdefault((step.scaling.m or 0, step.pair.bias), len(number)) for step in steps]
    tables = [scale_table(*key) for key in number]
    if len(tables) == 1:
        return halve(exponents, tables[0])
    rows = np.repeat(which, [task.last - task.first for task in tasks])
    return np.repeat(np.stack(tables)[rows, exponents], 2) if tables else exponents
