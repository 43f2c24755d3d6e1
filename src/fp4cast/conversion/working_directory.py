"""The working directory beside DST: whose it is, who may work in it, and how it goes away.

It is called `.DST.fp4cast`. Nobody but its owner may enter it, so that nothing can be planted in it meanwhile; one that
is a link, or another user's, or holds foreign files, is refused.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shlex
import shutil
from pathlib import Path

from fp4cast.checkpoints.directory import CONFIG
from fp4cast.errors import DestinationError

LOG = logging.getLogger(__name__)
_CONTENTS = {"lock", "plan", "out", "old", CONFIG}
_ENDINGS = (".done", ".partial", ".new")  # all that may be left where a run was killed while it cleared up
_ATTEMPTS = 5  # to enter, while others that are done remove theirs


def state_of(destination: Path) -> Path:
    """The working directory of a destination."""
    return destination.parent / f".{destination.name}.fp4cast"


def enter(source: Path, destination: Path, *, shared: bool) -> int:
    """Make the working directory, if need be, and take its lock.

    Args:
        source: SRC, whose permissions DST inherits: a private model stays private.
        destination: DST.
        shared: other processes may work in it at the same time.

    Returns:
        The lock's descriptor.

    Raises:
        DestinationError: it cannot be made or used, or another process works in it.
    """
    state = state_of(destination)
    mode = source.stat().st_mode & 0o777 | 0o700
    try:
        sweep(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            _check_ours(state)
            state.mkdir(mode=0o700, exist_ok=True)
            try:
                (state / "out").mkdir(mode=mode, exist_ok=True)
                if (lock := _lock(state, shared)) is not None:
                    return lock
            except FileNotFoundError:
                continue  # another process has just removed it
            break
    except OSError as error:
        raise DestinationError(f"{state}: cannot be made: {error.strerror}") from error
    raise DestinationError(f"{destination}: another fp4cast is writing it ({state})")


def _lock(state: Path, shared: bool) -> int | None:
    """The descriptor of the lock; None if another process has it.

    Raises:
        FileNotFoundError: the directory has been removed meanwhile.
    """
    path = state / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):  # still the one that others would open
            return lock
    except BlockingIOError:
        os.close(lock)
        return None
    except FileNotFoundError:
        os.close(lock)
        raise
    except OSError:
        return lock  # a file system without locks, as on many clusters
    os.close(lock)
    raise FileNotFoundError(path)


def alone(lock: int, shared: bool) -> bool:
    """Whether no other process works there; none can begin to from now on."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not shared  # a file system without locks
    return True


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
    if names and not names & _CONTENTS and not any(name.endswith(_ENDINGS) for name in names):
        raise DestinationError(f"{state}: holds files that fp4cast did not write: {', '.join(sorted(names)[:5])}")


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
        left = gone if gone.exists() else state
        LOG.warning("%s: could not be removed (%s); `%s` does", left, error.strerror, _removal(left))


def sweep(destination: Path) -> None:
    """Remove what processes that were killed while they removed their working directories have left."""
    state = state_of(destination)
    if state.parent.is_dir():
        for path in state.parent.iterdir():
            ours = re.fullmatch(re.escape(state.name) + r"\.[0-9a-f]{8}", path.name)
            if ours and not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)


def describe(state: Path) -> str:
    """What a run that stopped has left, how to go on, and how to delete it."""
    finished = sum(1 for _ in state.glob("*.done"))
    size = sum(path.lstat().st_size for path in state.rglob("*") if path.is_file())
    return (
        f"{finished} finished shards ({size / 1e9:.2f} GB) are in {state}: run the same command again to go on with "
        f"them, or delete them: {_removal(state)}"
    )


def _removal(path: Path) -> str:
    return f"rm -r {shlex.quote(str(path))}"
