"""Read many small ranges of files: those that are neighbours in one call to the kernel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fp4cast.checkpoints.byte_ranges import File, Files
from fp4cast.errors import CheckpointError

Range = tuple[Path, int, memoryview]  # a file, the first byte to read, and where the bytes go
_MOST = 1024  # buffers of one call: IOV_MAX of Linux and macOS


def read_ranges(files: Files, ranges: Sequence[Range]) -> None:
    """Fill every buffer; ranges that follow each other in a file and in the list are one call.

    Raises:
        CheckpointError: a file cannot be read, or ends before a range does.
    """
    first = 0
    while first < len(ranges):
        path, start, view = ranges[first]
        last, end = first + 1, start + len(view)
        most = min(len(ranges), first + _MOST)
        while last < most and ranges[last][1] == end and (ranges[last][0] is path or ranges[last][0] == path):
            end += len(ranges[last][2])
            last += 1
        _fill(files[path], start, [view for _, _, view in ranges[first:last]])
        first = last


def _fill(file: File, start: int, views: Sequence[memoryview]) -> None:
    try:
        got = os.preadv(file.fd, views, start)
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}") from error
    for view in views:
        if got < len(view):  # the kernel has stopped early, or the file ends, which this would say
            file.read_into(start + got, np.frombuffer(view[got:], np.uint8))
        got, start = max(0, got - len(view)), start + len(view)
