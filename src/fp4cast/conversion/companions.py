"""Copy what belongs to a checkpoint and is no weight: tokenizer, licence, the source's card."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.byte_ranges import File, copy_range, created
from fp4cast.checkpoints.checksums import Checksum, checksum_of_path
from fp4cast.checkpoints.directory import resolve_link
from fp4cast.conversion.execute import writing
from fp4cast.errors import CheckpointError


def copy_companion(source: Path, companion: PurePosixPath, size: int, target: Path) -> Checksum:
    """Copy a companion inside the kernel; it must still be the file that was planned."""
    path = resolve_link(source, source / companion)
    with File(path, follow=False) as file:
        status = os.fstat(file.fd)
        if status.st_size != size:
            raise CheckpointError(f"{path}: changed meanwhile: expected {size} bytes, got {status.st_size}")
        with writing(target), created(target, status.st_mode & 0o777 | 0o600) as copy:
            copy_range(file, 0, copy, 0, size)
    return checksum_of_path(target)
