"""What of a checkpoint a copy of it does not have, although people might look for it there."""

from __future__ import annotations

import os
from pathlib import Path

from fp4cast.checkpoints.directory import OTHER_DIRECTORIES, OTHER_SUFFIXES, SKIPPED_DIRECTORIES, Checkpoint

_WEIGHTS = {*OTHER_SUFFIXES, ".safetensors"}


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Weights in other formats or in no index, and folders that are links: relative paths, folders with a slash.

    Hidden files and leftovers of tools are not listed.
    """
    found = []
    for folder, folders, files in os.walk(checkpoint.path):
        here = Path(folder).relative_to(checkpoint.path)
        seen = [name for name in folders if not name.startswith(".")]
        links = {name for name in seen if (checkpoint.path / here / name).is_symlink()}
        found += [f"{(here / name).as_posix()}/" for name in seen if name in links or name in OTHER_DIRECTORIES]
        folders[:] = [name for name in seen if name not in SKIPPED_DIRECTORIES]
        weights = ((here / name).as_posix() for name in files if Path(name).suffix in _WEIGHTS)
        found += [name for name in weights if name not in checkpoint.shards]
    return sorted(found)
