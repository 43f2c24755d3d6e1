"""Build the destination beside DST and publish it with one rename: an interruption never leaves a loadable half.

The working directory is `.DST.fp4cast`, beside DST. It holds `out/`, which one rename turns into DST; the lock, the
plan's fingerprint, unfinished shards and a note for each finished one; config.json, without which no engine loads a
directory, until everything else is complete and verified; and an older DST, until the new one is in place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.byte_ranges import exchange, sync_path, write_whole
from fp4cast.checkpoints.directory import CONFIG
from fp4cast.conversion.destination import check_destination
from fp4cast.errors import DestinationError, Fp4CastError

FREE_MARGIN = 64 << 20


@dataclass(frozen=True)
class Staging:
    """A locked working directory for one destination.

    Attributes:
        destination: DST, without links.
        state: `.DST.fp4cast`, which holds unfinished work.
        out: what will become DST.
        config: where config.json waits, relative to `out`.
        sync: wait for the disk before anything counts as finished, is published, or is deleted.
    """

    destination: Path
    state: Path
    out: Path
    config: str = f"../{CONFIG}"
    sync: bool = True

    def adopt(self, fingerprint: str, *, resume: bool) -> None:
        """With `resume`, keep an earlier run's finished shards of the same plan; delete everything else that it left.

        Raises:
            DestinationError: `resume`, and the earlier run belongs to another plan.
        """
        mark = self.state / "plan"
        before = mark.read_text(errors="replace") if mark.exists() else ""
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
        """Join other parts of the same plan, which may be at work now; their shards are kept.

        Args:
            fingerprint: the plan's.
            first: whether this may be the first of them.

        Raises:
            DestinationError: the directory belongs to another plan, or no part has been written (unless `first`).
        """
        mark = self.state / "plan"
        if not mark.exists() and not first:
            raise DestinationError(f"{self.state}: no part has been written; run them first (--shards i/n)")
        if not mark.exists():
            _write_first(mark, fingerprint.encode())
        if mark.read_text(errors="replace") != fingerprint:
            raise DestinationError(
                f"{self.state}: holds parts of a conversion with other options, or of a source that has changed; give "
                "all parts the same options, or delete that directory to start afresh"
            )

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Raise if the disk is too full for the work.

        Args:
            sizes: bytes of every file to write; files that exist already need no more.

        Raises:
            DestinationError: too few bytes are free.
        """
        needed = FREE_MARGIN + sum(size for file, size in sizes.items() if not (self.out / file).exists())
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DestinationError(
                f"{self.destination}: {needed / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free"
            )

    def keep_only(self, files: Iterable[str]) -> None:
        """Delete everything in `out` but these files."""
        _clear(self.out, keep=set(files))

    def forget_shards(self) -> None:
        """Make the next run write every shard again."""
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

    def publish(self, source: Path, *, overwrite: bool) -> None:
        """Publish DST: move config.json in, put `out` in DST's place in one step, and delete the rest."""
        (self.state / CONFIG).replace(self.out / CONFIG)
        self._sync(*self.out.rglob("*"), self.out)
        if self.destination.exists() and overwrite:
            check_destination(source, self.destination, overwrite=True)  # an hour later, maybe
            self._replace()
        else:
            if self.destination.exists():
                self.destination.rmdir()  # fails where somebody has put something into it meanwhile
            self.out.rename(self.destination)
        self._sync(self.destination.parent)
        shutil.rmtree(self.state, ignore_errors=True)

    def _sync(self, *paths: Path) -> None:
        """Wait until these are on the disk; a power cut afterwards loses nothing of them."""
        for path in paths if self.sync else ():
            sync_path(path)

    def _replace(self) -> None:
        """Exchange `out` and the older DST; where the system cannot, move that aside first, and back on an error."""
        if exchange(self.out, self.destination):
            return
        old = self.state / "old"
        self.destination.rename(old)
        try:
            self.out.rename(self.destination)
        except OSError:
            old.rename(self.destination)
            raise


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


def _lock(destination: Path, state: Path, shared: bool) -> int:
    """Take the lock and return its descriptor; its file is still the one that others would open."""
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        ours = os.fstat(lock).st_ino == (state / "lock").stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        ours = True  # a file system without locks, as on many clusters
    if not ours:
        os.close(lock)
        raise DestinationError(f"{destination}: another fp4cast is writing it ({state})")
    return lock


_CONTENTS = {"lock", "plan", "out", "old", CONFIG}


def _check_ours(state: Path) -> None:
    """Refuse a working directory that somebody else has made: a link, another user's, or a folder of other files.

    Raises:
        DestinationError: it is one of these.
    """
    for path in (state, state / "out", state / "old", state / "plan", state / "lock"):
        if path.is_symlink():
            raise DestinationError(f"{path}: is a link to {path.readlink()}, not a working directory; remove the link")
        if path.exists() and path.stat().st_uid != os.geteuid():
            raise DestinationError(f"{path}: belongs to another user; remove it, or name another destination")
        if path.exists() and not (path.is_file() if path.name in ("plan", "lock") else path.is_dir()):
            raise DestinationError(f"{path}: is in the way of a working directory; remove it")
    names = {path.name for path in state.iterdir()} if state.exists() else set()
    if names and not names & _CONTENTS:
        raise DestinationError(f"{state}: holds files that fp4cast did not write: {', '.join(sorted(names)[:5])}")


def _recover(destination: Path, state: Path) -> None:
    """Put back an older DST that a killed run had moved aside."""
    old = state / "old"
    if old.exists() and not destination.exists():
        old.rename(destination)


@contextmanager
def staging(
    source: Path, destination: Path, *, overwrite: bool, shared: bool = False, keep: bool = True, sync: bool = True
) -> Iterator[Staging]:
    """Lock a working directory beside DST; it is kept when something fails, for --resume.

    Args:
        source: SRC.
        destination: DST.
        overwrite: an existing DST will be replaced.
        shared: other processes may work in it at the same time, on other shards.
        keep: leave finished shards for --resume when something fails; otherwise leave nothing.
        sync: see `Staging`.

    Raises:
        DestinationError: it cannot be made, another process works in it, or DST must not be replaced.
    """
    state = destination.parent / f".{destination.name}.fp4cast"
    try:
        _check_ours(state)
        (state / "out").mkdir(parents=True, exist_ok=True)
        lock = _lock(destination, state, shared)
    except OSError as error:
        raise DestinationError(f"{state}: cannot be made: {error.strerror}") from error
    try:
        _recover(destination, state)
        check_destination(source, destination, overwrite=overwrite)
        yield Staging(destination, state, state / "out", sync=sync)
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
            f"The finished shards are in {state}: continue with --resume "
            "(a part: run it again), or delete that directory."
        )
    else:
        error.add_note(f"Nothing is finished; {state} may be deleted.")
