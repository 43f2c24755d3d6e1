"""Execute a Plan, shard by shard, without further decisions.

A shard is written under a temporary name and renamed when it is whole; a note of its figures and its checksum marks it
as finished. Any number of workers, on any number of machines, write the same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fp4cast.checkpoints.byte_ranges import File, Files, sync_path, write_all, write_whole
from fp4cast.checkpoints.checksums import Checksum, checksum, checksum_of_path
from fp4cast.conversion.fp8_blocks import Fp8Of
from fp4cast.conversion.recipe import CodesOf, OriginalOf, OutputShard
from fp4cast.conversion.tasks import Piece, pieces
from fp4cast.conversion.working_directory import note_of
from fp4cast.conversion.writer import Tallies, Tally, Writer
from fp4cast.errors import DestinationError, Fp4CastError
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.workers import Workers
from fp4cast.verification.receipt import is_sealed, sealed

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What is known of a finished shard.

    Attributes:
        tallies: by module, a `Tally` of each tensor whose codes had to be read.
        checksum: of the file, taken when it was written.
        kept: an earlier run had finished it.
        damage: why what an earlier run had finished was written again; empty if nothing was.
    """

    tallies: Tallies
    checksum: Checksum
    kept: bool = False
    damage: str = ""


class Follow(Protocol):
    """What is done with each shard as soon as it is finished, by those who wrote it."""

    def task(self, shard: OutputShard) -> Callable[[Finished, Workers], Any]:
        """What to do with a shard; it and its result can be pickled, and it reports its bytes to `Workers.second`."""

    def take(self, result: Any) -> None:
        """Take the result of a task."""

    def advance(self, nbytes: int) -> None:
        """Count bytes that a task has just done."""


class DamageError(Exception):
    """What lies there is not what was written."""


def tallies_of(shards: Iterable[Finished]) -> Tallies:
    """The tallies of all shards, by module."""
    return {module: tally for shard in shards for module, tally in shard.tallies.items()}


def execute(
    shards: Iterable[OutputShard],
    directory: Path,
    *,
    fingerprint: str,
    state: Path,
    engine: Engine,
    sync: bool = True,
    progress: Advance = ignore,
    follow: Follow | None = None,
) -> dict[str, Finished]:
    """Write shards of a plan into `directory`.

    Args:
        shards: what to write.
        directory: where, existing.
        fingerprint: the plan's, which marks finished shards as its own.
        state: the directory for notes of finished shards, so that a later run of the same plan skips them.
        engine: runs the work.
        sync: wait until each shard is on the disk before it counts as finished.
        progress: called with the number of bytes just written, maybe from worker threads.
        follow: what is done with each finished shard.

    Returns:
        What is known of each shard, by its file's name.
    """
    todo = [_Item(shard, None if follow is None else follow.task(shard)) for shard in shards]
    work = _FinishAndFollow(FinishShard(fingerprint, directory, state, sync))
    second = ignore if follow is None else follow.advance
    found: dict[str, Finished] = {}
    for item, (finished, result) in zip(todo, engine.map(work, todo, progress, second, nbytes=_size), strict=True):
        shard = item.shard
        if follow is not None:
            follow.take(result)
        if finished.damage:
            LOG.warning("%s; it was written again", finished.damage)
        LOG.info("%s: %s, %d bytes", shard.file, "kept" if finished.kept else "written", shard.layout.size)
        found[shard.file] = finished
    return found


def find_finished(
    shards: Iterable[OutputShard],
    directory: Path,
    *,
    fingerprint: str,
    state: Path,
    engine: Engine,
    progress: Advance = ignore,
) -> dict[str, Finished | str]:
    """What is known of each shard, by its file's name; a sentence for one that is not finished. Nothing is written."""
    todo, work = list(shards), FindShard(FinishShard(fingerprint, directory, state))
    found = engine.map(work, todo, progress, nbytes=lambda shard: shard.layout.size)
    return dict(zip([shard.file for shard in todo], found, strict=True))


@dataclass(frozen=True)
class _Item:
    """A shard, and what is done with it when it is finished."""

    shard: OutputShard
    then: Callable[[Finished, Workers], Any] | None


def _size(item: _Item) -> int:
    return item.shard.layout.size


@dataclass(frozen=True)
class _FinishAndFollow:
    """Finish a shard, and do what follows."""

    finish: FinishShard

    def __call__(self, item: _Item, pool: Workers) -> tuple[Finished, Any]:
        """What is known of the shard, and the result of what follows."""
        finished = self.finish(item.shard, pool)
        return finished, None if item.then is None else item.then(finished, pool.second)


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

    def __call__(self, shard: OutputShard, pool: Workers) -> Finished:
        """Write the shard, if need be."""
        damage = ""
        try:
            if (known := self.known(shard, pool)) is not None:
                pool.advance(shard.layout.size)
                return known
        except DamageError as error:
            damage = str(error)
        # Each attempt has its own name: an attempt that a cluster took for dead may still be writing.
        partial = self.state / f"{shard.file}.{os.urandom(4).hex()}.partial"
        with writing(self.directory / shard.file):
            tallies = write_shard(shard, partial, pool.advance, pool)
            with contextlib.suppress(FileNotFoundError):  # see `_publish`
                if self.sync:
                    sync_path(partial)  # before its note says that it is finished
            return self._publish(shard, partial, tallies, pool, damage)

    def known(self, shard: OutputShard, pool: Workers) -> Finished | None:
        """What an earlier run noted of a shard that it finished; None if no run of this plan did.

        Raises:
            DamageError: the note, or the file that it speaks of, is not as it was written.
        """
        path = note_of(self.state, shard.file)
        try:
            note = json.loads(path.read_bytes())
            tallies = {module: Tally(**tally) for module, tally in note["tallies"].items()}
            noted, plan = Checksum(*note["checksum"]), note["plan"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DamageError(f"{path}: is damaged") from None
        if not is_sealed(note) or not _possible(shard, tallies):
            raise DamageError(f"{path}: is damaged")
        if plan != self.fingerprint:
            return None
        self._check(self.directory / shard.file, noted, pool)
        return Finished(tallies, noted, kept=True)

    def _check(self, path: Path, noted: Checksum, pool: Workers) -> None:
        """Raise if a finished shard is not, byte for byte, what was written."""
        try:
            with File(path, follow=False) as file:
                regular = stat.S_ISREG(os.fstat(file.fd).st_mode)
                actual = checksum(file, pool.map, lambda _: pool.check()) if regular else None
        except Fp4CastError as error:
            raise DamageError(str(error)) from error
        if actual != noted:
            raise DamageError(f"{path}: expected {noted}, got {actual or 'no regular file'}")

    def _publish(self, shard: OutputShard, partial: Path, tallies: Tallies, pool: Workers, damage: str) -> Finished:
        """Rename a written shard to its final name, write its note, and clear other attempts away."""
        try:
            noted = checksum_of_path(partial, pool.map, lambda _: pool.check())
            partial.replace(self.directory / shard.file)
        except (FileNotFoundError, Fp4CastError):
            if partial.exists() or (known := self.known(shard, pool)) is None:
                raise
            return known  # another attempt was faster, and has cleared this one away
        note = {
            "plan": self.fingerprint,
            "checksum": noted,
            "tallies": {module: asdict(tally) for module, tally in tallies.items()},
        }
        write_whole(note_of(self.state, shard.file), json.dumps(sealed(note)).encode())
        for left in self.state.glob(f"{glob.escape(shard.file)}.????????.partial"):
            left.unlink(missing_ok=True)
        return Finished(tallies, noted, damage=damage)


@dataclass(frozen=True)
class FindShard:
    """Say what is known of a shard, and write nothing."""

    earlier: FinishShard

    def __call__(self, shard: OutputShard, pool: Workers) -> Finished | str:
        """What is known, or a sentence that says why the shard is not finished."""
        try:
            return self.earlier.known(shard, pool) or "no part has written it"
        except DamageError as error:
            return str(error)
        finally:
            pool.advance(shard.layout.size)


def _possible(shard: OutputShard, tallies: Tallies) -> bool:
    """Whether these can be the tallies of a shard: numbers, of tensors whose codes are made in it."""
    modules = {output.step.pair.module for output in shard.outputs if isinstance(output.step, CodesOf | OriginalOf)}
    modules |= {output.step.module for output in shard.outputs if isinstance(output.step, Fp8Of)}
    figures = [value for tally in tallies.values() for value in asdict(tally).values()]
    return tallies.keys() <= modules and all(isinstance(value, int | float) and value >= 0 for value in figures)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a DestinationError that names the output file."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error


def write_shard(shard: OutputShard, path: Path, progress: Advance, pool: Workers) -> Tallies:
    """Write a whole shard under a name that does not exist yet, as private as the source's."""
    tallies: Tallies = {}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, shard.mode)
    try:
        with Files() as files:
            os.ftruncate(target, shard.layout.size)
            write_all(target, 0, np.frombuffer(shard.layout.header, np.uint8))
            progress(len(shard.layout.header))

            def write(piece: Piece) -> Tallies:
                # Named here, where it occurs: a worker of another shard may be the first to raise it.
                with writing(path), pool.one_at_a_time_if_many(len(piece)):
                    return Writer(files, target, progress).write(piece)

            # In the order of the pieces, so that sums of errors do not depend on the workers.
            for measured in pool.map(write, pieces(shard)):
                for module, tally in measured.items():
                    tallies.setdefault(module, Tally()).merge(tally)
    finally:
        os.close(target)
    return tallies
