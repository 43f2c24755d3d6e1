"""What the faults meet: small conversions of every kind, and what lies at the destination before them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import INDEX, open_checkpoint
from fp4cast.conversion import staging
from fp4cast.conversion.job_array import convert_part, finish
from fp4cast.conversion.plan import ConvertOptions

OLDER = {"layout": "compressed-tensors"}  # an older DST differs from the new one in all its documents


def nothing() -> None:
    """The program as it is."""


def no_exchange() -> None:
    """As on a file system that cannot exchange two directories."""
    staging.exchange = lambda *_: False


class _Backwards:
    """Stands for os.scandir."""

    forwards = os.scandir

    def __init__(self, *args: Any) -> None:
        with self.forwards(*args) as entries:
            self._entries = list(entries)

    def __enter__(self) -> _Backwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> _Backwards:
        return self

    def __next__(self) -> os.DirEntry[str]:
        if not self._entries:
            raise StopIteration
        return self._entries.pop()

    def close(self) -> None:
        """Nothing is open."""


def listed_backwards() -> None:
    """Directories are listed in the opposite order; every file system has its own."""
    names = os.listdir
    os.scandir = _Backwards
    os.listdir = lambda *args: names(*args)[::-1]


@dataclass(frozen=True)
class Scenario:
    """One conversion.

    Attributes:
        source: a kind of miniature, "single" or "large".
        options: of `fp4cast.convert`.
        before: what prepares the destination; it may end its process.
        tweak: what is different about the system.
        parts: the parts of a job array; 0 for none.
    """

    source: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Scenario, Path, Path], None] | None = None
    tweak: Callable[[], None] = nothing
    parts: int = 0

    @property
    def replaces(self) -> bool:
        """Whether an older DST is to be replaced."""
        return bool(self.options.get("overwrite"))

    def run(self, source: Path, destination: Path, **extra: Any) -> None:
        """Convert."""
        self.tweak()
        options = {"jobs": 1} | self.options | extra
        if not self.parts:
            fp4cast.convert(source, destination, **options)
            return
        for part in range(1, self.parts + 1):
            convert_part(source, destination, part, self.parts, ConvertOptions(), jobs=1)
        finish(source, destination, ConvertOptions(), jobs=1)

    def again(self, source: Path, destination: Path) -> None:
        """What one does after a failure."""
        self.run(source, destination, **({} if self.parts else {"resume": True}))


def _older(_: Scenario, source: Path, destination: Path) -> None:
    """Another conversion lies at DST."""
    fp4cast.convert(source, destination, jobs=1, **OLDER)


def _interrupted(scenario: Scenario, source: Path, destination: Path) -> None:
    """Killed in the second shard."""
    done = [0]

    def progress(phase: str, nbytes: int, total: int) -> None:
        done[0] += nbytes * (phase == "write")
        if done[0] > 0.75 * total > 0:
            os._exit(0)

    scenario.run(source, destination, progress=progress, resume=False)


def _killed_before_publishing(scenario: Scenario, source: Path, destination: Path) -> None:
    """Killed when `out` was complete; where no exchange exists, the older DST has been moved aside."""
    if scenario.replaces:
        _older(scenario, source, destination)
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path.name == "out":
            os._exit(0)
        return rename(path, to)

    Path.rename = killed  # type: ignore[method-assign]
    scenario.run(source, destination, resume=False)


RESUME, REPLACE = {"resume": True}, {"overwrite": True}
SCENARIOS = {
    "fresh": Scenario(),
    "one file": Scenario("single"),
    "transposed": Scenario("gpt-oss"),
    "compressed-tensors": Scenario(options={"layout": "compressed-tensors"}),
    "no verify": Scenario(options={"verify": False}),
    "no sync": Scenario(options={"sync": False}),
    "two threads": Scenario("moe", {"jobs": 2}),
    "overwrite": Scenario(options=REPLACE, before=_older),
    "overwrite, no exchange": Scenario(options=REPLACE, before=_older, tweak=no_exchange),
    "overwrite, listed backwards": Scenario(options=REPLACE, before=_older, tweak=listed_backwards),
    "resume": Scenario(options=RESUME, before=_interrupted),
    "no resume": Scenario(before=_interrupted),
    "resume, was complete": Scenario(options=RESUME, before=_killed_before_publishing),
    "resume, older aside": Scenario(
        options=RESUME | REPLACE, before=_killed_before_publishing, tweak=no_exchange
    ),
    "listed backwards": Scenario(tweak=listed_backwards),
    "job array": Scenario(parts=2),
}  # fmt: skip

# For kills at random times.
LARGE = {
    "large": Scenario("large", {"jobs": 2}),
    "large, overwrite": Scenario("large", {"jobs": 2} | REPLACE, _older),
}


def make_source(kind: str, path: Path, megabytes: int) -> Path:
    """A source of one of the kinds that `Scenario` names."""
    if kind == "single":
        return _single(path)
    if kind == "large":
        return _large(path, megabytes)
    return mini.make(kind, path)


def _single(path: Path) -> Path:
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {
        "lm.up_proj.weight_packed": ("U8", codes.reshape(8, -1)),
        "lm.up_proj.weight_scale": ("U8", scales),
        "lm.norm.weight": ("BF16", np.ones(8, np.uint16)),
    }
    mini.write_checkpoint(path, {"model.safetensors": tensors}, {})
    (path / INDEX).unlink()
    return path


def _large(path: Path, megabytes: int) -> Path:
    """A mixture of experts whose matrices are repeated downwards until it has that size."""
    small = open_checkpoint(mini.make("moe", path.with_name("moe for large")))
    tensors = {name: (tensor, tensor.path.read_bytes()) for name, tensor in small.tensors.items()}
    times = max(1, megabytes * 1_000_000 // sum(tensor.nbytes for tensor, _ in tensors.values()))
    files: dict[str, dict[str, Any]] = {}
    for name, (tensor, data) in tensors.items():
        flat = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.start)
        rows = flat.view(np.uint16 if tensor.dtype == "BF16" else np.uint8).reshape(tensor.shape)
        whole = np.tile(rows, (times, 1)) if rows.ndim == 2 else rows
        files.setdefault(tensor.path.name, {})[name] = (tensor.dtype, whole)
    mini.write_checkpoint(path, files, small.config)
    return path
