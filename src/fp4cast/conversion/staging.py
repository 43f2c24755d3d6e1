"""Build the destination beside DST and publish it with one rename: an interruption never leaves a loadable half.

Beside DST stands `.DST.fp4cast`: in it `out/`, which becomes DST by one rename, and next to that the lock, the plan's
fingerprint, unfinished shards, a note for each finished one, and config.json, without which no engine loads a
directory, until everything else is complete and verified. An older DST waits there, too, until the new one stands.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.byte_ranges import write_whole
from fp4cast.checkpoints.directory import CONFIG
from fp4cast.errors import DestinationError, Fp4CastError

__all__ = ["Staging", "check_destination", "real_path", "staging"]

FREE_MARGIN = 64 << 20


@dataclass(frozen=True)
class Staging:
    """A locked working directory for one destination.

    Attributes:
        destination: DST, without links.
        state: `.DST.fp4cast`, where `run` keeps what is unfinished.
        out: what will become DST.
        config: where config.json waits, relative to `out`.
    """

    destination: Path
    state: Path
    out: Path
    config: str = f"../{CONFIG}"

    def adopt(self, fingerprint: str, *, resume: bool) -> None:
        """Keep the finished shards of an earlier run of the same plan; drop everything else that it left.

        Raises:
            DestinationError: `resume`, and what is there belongs to another plan.
        """
        mark = self.state / "plan"
        before = mark.read_text() if mark.exists() else ""
        if resume and before and before != fingerprint:
            raise DestinationError(
                f"{self.state}: holds an unfinished conversion with other options, or of a source that has changed; "
                "run without --resume to start afresh"
            )
        notes = {note.name for note in self.state.glob("*.done")} if resume and before else set()
        _clear(self.state, keep=notes | {"lock", "out"})
        _clear(self.out, keep={note.removesuffix(".done") for note in notes})
        write_whole(mark, fingerprint.encode())

    def join(self, fingerprint: str, *, first: bool = True) -> None:
        """Agree with other parts of the same plan, which may be at work at this moment; what they have made is kept.

        Args:
            fingerprint: the plan's.
            first: whether this may be the first of them.

        Raises:
            DestinationError: what is there belongs to another plan.
        """
        mark = self.state / "plan"
        if not mark.exists() and not first:
            raise DestinationError(f"{self.state}: no part has been written; run them first (--shards i/n)")
        if not mark.exists():
            _write_first(mark, fingerprint.encode())
        if mark.read_text() != fingerprint:
            raise DestinationError(
                f"{self.state}: holds parts of a conversion with other options, or of a source that has changed; give "
                "all parts the same options, or delete that directory to start afresh"
            )

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Refuse to begin what cannot end.

        Args:
            sizes: bytes of every file that is to be written; those that are there already need nothing more.

        Raises:
            DestinationError: fewer are free.
        """
        needed = FREE_MARGIN + sum(size for file, size in sizes.items() if not (self.out / file).exists())
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DestinationError(
                f"{self.destination}: {needed / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free"
            )

    def keep_only(self, files: Iterable[str]) -> None:
        """Drop from `out` whatever else an earlier run has left."""
        _clear(self.out, keep=set(files))

    def forget_shards(self) -> None:
        """Have every shard written again by the next run."""
        for note in self.state.glob("*.done"):
            note.unlink()

    def write_documents(
        self, documents: Mapping[str, bytes], companions: Iterable[PurePosixPath], source: Path
    ) -> None:
        """Write everything beside the shards; config.json waits outside.

        Args:
            documents: bytes by file name.
            companions: files to carry along, relative to the source.
            source: its directory.
        """
        for name, data in documents.items():
            (self.out / (self.config if name == CONFIG else name)).write_bytes(data)
        for companion in companions:
            (self.out / companion).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / companion, self.out / companion)

    def publish(self, *, overwrite: bool) -> None:
        """Publish DST: config.json moves in, an older DST steps aside, one rename, and nothing else is left."""
        (self.state / CONFIG).replace(self.out / CONFIG)
        old = self.state / "old"
        if self.destination.exists() and overwrite:
            self.destination.rename(old)
        elif self.destination.exists():
            self.destination.rmdir()  # fails where somebody has put something into it meanwhile
        try:
            self.out.rename(self.destination)
        except OSError:
            if old.exists():
                old.rename(self.destination)
            raise
        shutil.rmtree(self.state, ignore_errors=True)


def _clear(directory: Path, keep: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in keep:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _write_first(path: Path, data: bytes) -> None:
    """Write a small file that others may be writing, too: the first one stays."""
    beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}.new")
    beside.write_bytes(data)
    try:
        path.hardlink_to(beside)
    except FileExistsError:
        pass
    except OSError:
        beside.replace(path)  # a file system without hard links
    beside.unlink(missing_ok=True)


def real_path(path: str | Path) -> Path:
    """A path without links, whose last part need not exist.

    Raises:
        DestinationError: links in a circle, or a name that no file system takes.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"{str(path)[:200]}: is no usable path: {error}") from error


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that would mix with the source or cost the user something.

    It is asked twice: before any work, so that nobody waits for a refusal, and again under the lock of `staging`.

    Raises:
        DestinationError: with what is there and what to pass.
    """
    try:
        objection = _objection(source.resolve(), destination, overwrite)
    except OSError as error:
        objection = f"cannot be looked at: {error.strerror}"
    if objection:
        raise DestinationError(f"{destination}: {objection}")


def _objection(source: Path, destination: Path, overwrite: bool) -> str:
    if source == destination or source in destination.parents or destination in source.parents:
        return f"must lie apart from the source {source}"
    if not destination.exists():
        return ""
    if not destination.is_dir():
        return "exists and is no directory"
    if destination.is_mount():
        return "is a mount point, which cannot be replaced; name a directory inside it"
    if any(destination.iterdir()) and not overwrite:
        return "exists and is not empty; pass --overwrite to replace it"
    return ""


def _lock(destination: Path, state: Path, shared: bool) -> int:
    """A descriptor that holds the lock; the lock's file is still the one that others would open."""
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        ours = os.fstat(lock).st_ino == (state / "lock").stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        ours = True  # a file system without locks: many clusters' have none
    if not ours:
        os.close(lock)
        raise DestinationError(f"{destination}: another fp4cast is writing it ({state})")
    return lock


def _recover(destination: Path, state: Path) -> None:
    """Put back an older DST that a killed run had moved aside."""
    old = state / "old"
    if old.exists() and not destination.exists():
        old.rename(destination)


@contextmanager
def staging(
    source: Path, destination: Path, *, overwrite: bool, shared: bool = False, keep: bool = True
) -> Iterator[Staging]:
    """Lock a working directory beside DST; it is kept when something fails, for --resume.

    Args:
        source: SRC.
        destination: DST.
        overwrite: an existing DST will be replaced.
        shared: others may work in it at the same time, on other shards.
        keep: what is finished can be resumed; otherwise nothing is left when something fails.

    Raises:
        DestinationError: it cannot be made, another process works in it, or DST must not be replaced.
    """
    state = destination.parent / f".{destination.name}.fp4cast"
    try:
        (state / "out").mkdir(parents=True, exist_ok=True)
        lock = _lock(destination, state, shared)
    except OSError as error:
        raise DestinationError(f"{state}: cannot be made: {error.strerror}") from error
    try:
        _recover(destination, state)
        check_destination(source, destination, overwrite=overwrite)
        yield Staging(destination, state, state / "out")
    except Fp4CastError as error:
        _leave(error, state, keep)
        raise
    except OSError as error:
        failure = DestinationError(f"{error.filename or destination}: {error.strerror or error}")
        _leave(failure, state, keep)
        raise failure from error
    finally:
        os.close(lock)


def _leave(error: Fp4CastError, state: Path, keep: bool) -> None:
    if not keep:
        shutil.rmtree(state, ignore_errors=True)
    elif any(state.glob("*.done")):
        error.add_note(
            f"What is finished lies in {state}: --resume goes on from there "
            "(a part of several: the same command again); or delete it."
        )
    else:
        error.add_note(f"Nothing is finished; {state} may be deleted.")
