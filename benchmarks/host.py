"""The machine that a benchmark runs on: its facts, its page cache, its free space."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fp4cast import __version__

CHUNK_BYTES = 8 << 20


def files(*paths: Path) -> list[Path]:
    """All files below some directories, sorted."""
    return sorted(file for path in paths for file in path.rglob("*") if file.is_file())


def size(*paths: Path) -> int:
    return sum(file.stat().st_size for file in files(*paths))


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    for file in files(*paths):
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(*paths: Path) -> None:
    """Read everything once."""
    buffer = bytearray(CHUNK_BYTES)
    for file in files(*paths):
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def prepare(cold: bool, *paths: Path) -> None:
    """The same start for every timed command: nothing left to write back, the checkpoint in the page cache or not."""
    os.sync()
    if cold:
        forget(*paths)
    else:
        warm(*paths)


def need(directory: Path, nbytes: float) -> None:
    """Stop before a disk fills up."""
    free = shutil.disk_usage(directory).free
    print(f"needs {nbytes / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free", file=sys.stderr)
    if nbytes + (1 << 28) > free:
        sys.exit("that is not enough: pass another --dir, or a smaller size")


def _file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return max((len(at), kind) for at, kind in mounts if path.resolve().is_relative_to(at))[1]


def _first(path: str, start: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith(start)), "")


def machine(directory: Path) -> dict[str, Any]:
    kind = _file_system(directory)
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_first("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "file_system": kind,
        "storage": "memory" if kind in {"tmpfs", "ramfs"} else "disk",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "fp4cast": __version__,
    }


def cache_state(facts: dict[str, Any], cold: bool, nbytes: int) -> str:
    """What the page cache held; more than memory takes, read and written, cannot have stayed warm."""
    if facts["storage"] == "memory":
        return "in memory"
    return "cold" if cold else "warm" if nbytes < 0.8 * facts["memory_bytes"] else "partly warm"


def describe(facts: dict[str, Any]) -> str:
    storage = f"{facts['storage']} ({facts['file_system']})"
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.0f} GB, {storage}, {facts['date']}"
