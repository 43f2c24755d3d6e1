"""Execute a Plan, shard by shard, without further decisions.

A shard is written under a temporary name and renamed when it is whole; a note of its figures marks it as finished.
Any number of workers, on any number of machines, write the same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fp4cast.checkpoints.byte_ranges import Files, sync_path, write_all, write_whole
from fp4cast.conversion.recipe import CodesOf, OutputShard
from fp4cast.conversion.tasks import Piece, pieces
from fp4cast.conversion.writer import Tallies, Tally, Writer
from fp4cast.errors import DestinationError
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.workers import Workers


def execute(
    shards: Iterable[OutputShard],
    directory: Path,
    *,
    fingerprint: str,
    state: Path,
    engine: Engine,
    sync: bool = True,
    progress: Advance = ignore,
) -> Tallies:
    """Write shards of a plan into `directory`.

    Args:
        shards: what to write.
        directory: where, existing.
        fingerprint: the plan's, which marks finished shards as its own.
        state: the directory for notes of finished shards, so that a later run of the same plan skips them.
        engine: runs the work.
        sync: wait until each shard is on the disk before it counts as finished.
        progress: called with the number of bytes just written, maybe from worker threads.

    Returns:
        By module, a `Tally` of each tensor whose codes had to be read.
    """
    tallies: Tallies = {}
    for measured in engine.map(FinishShard(fingerprint, directory, state, sync), list(shards), progress):
        tallies |= measured
    return tallies


def finished(
    shards: Iterable[OutputShard], directory: Path, *, fingerprint: str, state: Path
) -> tuple[Tallies, list[str]]:
    """(tallies from earlier runs, files that no run has finished)."""
    tallies: Tallies = {}
    missing: list[str] = []
    earlier = FinishShard(fingerprint, directory, state)
    for shard in shards:
        known = earlier.known(shard)
        tallies |= known or {}
        if known is None:
            missing.append(shard.file)
    return tallies, missing


@dataclass(frozen=True)
class FinishShard:
    """Write one shard, unless an earlier run has finished it.

    Attributes:
        fingerprint: the plan's.
        directory: where the shard goes.
        state: where its note goes.
        sync: wait for the disk before the note is written.
    """

    fingerprint: str
    directory: Path
    state: Path
    sync: bool = True

    def __call__(self, shard: OutputShard, pool: Workers) -> Tallies:
        """Write the shard; returns a `Tally` of each tensor whose codes had to be read, by module."""
        if (known := self.known(shard)) is not None:
            pool.advance(shard.layout.size)
            return known
        # Each attempt has its own name: an attempt that a cluster took for dead may still be writing.
        partial = self.state / f"{shard.file}.{os.urandom(4).hex()}.partial"
        with _writing(self.directory / shard.file):
            tallies = write_shard(shard, partial, pool.advance, pool)
            if self.sync:
                with contextlib.suppress(FileNotFoundError):  # see `_publish`
                    sync_path(partial)  # before its note says that it is finished
            return self._publish(shard, partial, tallies)

    def known(self, shard: OutputShard) -> Tallies | None:
        """The tallies from an earlier run's note of a shard; None if no run finished it, or the note is damaged."""
        try:
            if (self.directory / shard.file).stat().st_size != shard.layout.size:
                return None
            note = json.loads(self._note(shard).read_bytes())
            if note["plan"] != self.fingerprint:
                return None
            tallies = {module: Tally(**tally) for module, tally in note["tallies"].items()}
            return tallies if _possible(shard, tallies) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _note(self, shard: OutputShard) -> Path:
        return self.state / f"{shard.file}.done"

    def _publish(self, shard: OutputShard, partial: Path, tallies: Tallies) -> Tallies:
        """Rename a written shard to its final name, write its note, and clear other attempts away."""
        try:
            partial.replace(self.directory / shard.file)
        except FileNotFoundError:
            if (known := self.known(shard)) is None:
                raise
            return known  # another attempt was faster, and has cleared this one away
        figures = {module: asdict(tally) for module, tally in tallies.items()}
        write_whole(self._note(shard), json.dumps({"plan": self.fingerprint, "tallies": figures}).encode())
        for left in self.state.glob(f"{glob.escape(shard.file)}.????????.partial"):
            left.unlink(missing_ok=True)
        return tallies


def _possible(shard: OutputShard, tallies: Tallies) -> bool:
    """Whether these can be the tallies of a shard: numbers, of tensors whose codes are encoded in it."""
    modules = {output.step.pair.module for output in shard.outputs if isinstance(output.step, CodesOf)}
    figures = [value for tally in tallies.values() for value in asdict(tally).values()]
    return tallies.keys() <= modules and all(isinstance(value, int | float) and value >= 0 for value in figures)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a DestinationError that names the output file."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error


def write_shard(shard: OutputShard, path: Path, progress: Advance, pool: Workers) -> Tallies:
    """Write a whole shard under a name that does not exist yet."""
    tallies: Tallies = {}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with Files() as files:
            os.ftruncate(target, shard.layout.size)
            write_all(target, 0, np.frombuffer(shard.layout.header, np.uint8))
            progress(len(shard.layout.header))

            def write(piece: Piece) -> Tallies:
                # Named here, where it occurs: a worker of another shard may be the first to raise it.
                with _writing(path), pool.one_at_a_time_if_many(len(piece)):
                    return Writer(files, target, progress).write(piece)

            # In the order of the pieces, so that sums of errors do not depend on the workers.
            for measured in pool.map(write, pieces(shard)):
                for module, tally in measured.items():
                    tallies.setdefault(module, Tally()).merge(tally)
    finally:
        os.close(target)
    return tallies
