"""The working directory beside DST: whose it is, who may work in it, and how it goes away.

It is called `.DST.fp4cast`. Nobody but its owner may enter it, so that nothing can be planted in it meanwhile; one that
is a link, or another user's, or holds foreign files, is refused.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from fp4cast.checkpoints.byte_ranges import require_posix
from fp4cast.checkpoints.directory import CONFIG
from fp4cast.conversion.lock import CLAIMS, Lock
from fp4cast.errors import DestinationError

LOG = logging.getLogger(__name__)
_CONTENTS = {"lock", CLAIMS, "plan", "out", "old", "downloads", CONFIG}
_ENDINGS = (".done", ".compared", ".partial", ".new")  # all that may be left where a run was killed while it cleared up
_ATTEMPTS = 5  # to enter, while others that are done remove theirs


def state_of(destination: Path) -> Path:
    """The working directory of a destination."""
    return destination.parent / f".{destination.name}.fp4cast"


def plan_of(state: Path) -> str:
    """The fingerprint of the plan that runs there have followed; empty if none has begun."""
    mark = state / "plan"
    return mark.read_text(errors="replace") if mark.is_file() else ""


def downloads_of(destination: Path) -> Path:
    """Where shards of a source on the Hub lie while they are needed."""
    return state_of(destination) / "downloads"


def note_of(state: Path, file: str) -> Path:
    """The note that marks a shard as finished."""
    return state / f"{file}.done"


def enter(source: Path, destination: Path, *, shared: bool) -> Lock:
    """Make the working directory, if need be, and take its lock.

    Args:
        source: SRC, whose permissions DST inherits: a private model stays private.
        destination: DST.
        shared: other processes may work in it at the same time.

    Returns:
        The lock, to be released.

    Raises:
        DestinationError: it cannot be made or used, or another process works in it.
        PlatformError: the system has no such locks.
    """
    state = state_of(destination)
    require_posix(state)
    mode = source.stat().st_mode & 0o777 | 0o700
    try:
        sweep(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            _check_ours(state)
            state.mkdir(mode=0o700, exist_ok=True)
            try:
                (state / "out").mkdir(mode=mode, exist_ok=True)
                return Lock.take(state, shared)
            except FileNotFoundError:
                continue  # another process has just removed it
            except DestinationError as error:
                raise DestinationError(f"{destination}: {error}") from None
    except OSError as error:
        raise DestinationError(f"{state}: cannot be made: {error.strerror}") from error
    raise DestinationError(f"{destination}: another fp4cast is writing it ({state})")


def _check_ours(state: Path) -> None:
    """Refuse a working directory that somebody else has made: a link, another user's, or a folder of other files.

    Raises:
        DestinationError: it is one of these.
    """
    for path in (state, *(state / name for name in ("out", "old", "downloads", CLAIMS, "plan", "lock"))):
        try:
            status = path.lstat()  # once: another process may be removing it
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(status.st_mode):
            raise DestinationError(f"{path}: is a link, not a working directory; remove the link")
        if status.st_uid != os.geteuid():
            raise DestinationError(f"{path}: belongs to another user; remove it, or name another destination")
        if not (stat.S_ISREG if path.name in ("plan", "lock") else stat.S_ISDIR)(status.st_mode):
            raise DestinationError(f"{path}: is in the way of a working directory; remove it")
    names = _names(state)
    foreign = {name for name in names - _CONTENTS if not name.endswith(_ENDINGS)}
    if not names & {"plan", "lock"} and not any(name.endswith(_ENDINGS) for name in names):
        foreign |= names - {"out"} | _names(state / "out")  # a run takes the lock before it writes
    if foreign:
        raise DestinationError(f"{state}: holds files that fp4cast did not write: {', '.join(sorted(foreign)[:5])}")


def _names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return set()


def clear(directory: Path, keep: set[str]) -> None:
    """Delete everything in a directory but these files; links are removed, not followed."""
    for path in directory.iterdir():
        if path.name not in keep:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove(state: Path) -> None:
    """Remove a working directory that is no longer needed; what cannot be removed is said.

    It is renamed first, so that nobody enters what is being removed.
    """
    gone = state.with_name(f"{state.name}.{os.urandom(4).hex()}")
    try:
        state.rename(gone)
        (gone / "out" / CONFIG).unlink(missing_ok=True)  # first: what goes piece by piece must not be loadable
        shutil.rmtree(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        left = gone if os.path.lexists(gone) else state
        LOG.warning("%s: could not be removed (%s); `%s` does", left, error.strerror, _removal(left))


def sweep(destination: Path) -> None:
    """Remove what processes that were killed while they removed their working directories have left."""
    state = state_of(destination)
    if state.parent.is_dir():
        for path in state.parent.iterdir():
            with suppress(FileNotFoundError):  # two may do it
                ours = re.fullmatch(re.escape(state.name) + r"\.[0-9a-f]{8}", path.name)
                status = path.lstat()
                if ours and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)


def finished_shards(state: Path) -> list[str]:
    """The names of the shards that a run has finished."""
    return [note.name.removesuffix(".done") for note in state.glob("*.done")]


def notes_of_comparisons(state: Path) -> set[str]:
    """The names of the notes of what was compared while its source was there."""
    return {note.name for note in state.glob("*.compared")}


def drop_unfinished(state: Path) -> None:
    """Delete what was being written when a run stopped: large, and of no use. Never an error of its own."""
    for ending in (".partial", ".new"):
        for path in state.glob(f"*{ending}"):
            with suppress(OSError):
                path.unlink()


def leave(error: BaseException, destination: Path, lock: Lock, *, keep: bool, guided: bool) -> None:
    """Leave finished shards, and say where they are; leave nothing else, unless others are at work.

    Args:
        error: what ended the run; what is left is added to it.
        destination: DST.
        lock: the run's.
        keep: whether finished shards stay.
        guided: the error says itself what to do next.
    """
    try:
        _leave(error, destination, lock, keep=keep, guided=guided)
    except OSError as failure:  # a disk that has gone, maybe
        error.add_note(f"{state_of(destination)}: could not be looked at ({failure.strerror}); work may be left there.")


def _leave(error: BaseException, destination: Path, lock: Lock, *, keep: bool, guided: bool) -> None:
    state = state_of(destination)
    if (old := state / "old").exists():
        if not destination.exists():
            error.add_note(f"What {destination} was is in {old}; the next run puts it back.")
    elif finished_shards(state) and keep:
        if lock.alone():
            drop_unfinished(state)
        if not guided:
            error.add_note(f"Nothing incomplete was published. {describe(state)}")
    elif lock.alone():
        remove(state)
        if isinstance(error, KeyboardInterrupt):
            error.add_note("No shard was finished; nothing is left; the same command begins anew.")


def describe(state: Path) -> str:
    """What a run that stopped has left, how to go on, and how to delete it; never an error of its own."""
    size, names = 0, finished_shards(state)
    for name in names:
        with suppress(OSError):  # other parts may be at work
            size += (state / "out" / name).lstat().st_size
    what = "1 finished shard" if len(names) == 1 else f"{len(names)} finished shards"
    return (
        f"{what} ({size / 1e9:.2f} GB) in {state}: the same command (without --restart) goes on from there; "
        f"to delete that: {_removal(state)}"
    )


def _removal(path: Path) -> str:
    return f"rm -r {shlex.quote(str(path))}"
