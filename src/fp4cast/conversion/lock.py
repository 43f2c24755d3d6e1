"""Who works in a working directory: by the file system's locks, or where it has none, by claims.

A claim is a file that says which process works there. Each writes its own before it looks at the others', so of two
that come at the same time at most one stays. A claim outlives a killed process: on the machine that it ran on it is
then known to be void; on another one, people must say so.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fp4cast.checkpoints.byte_ranges import write_whole
from fp4cast.errors import DestinationError

CLAIMS = "claims"


@dataclass
class Lock:
    """The right to work in a working directory.

    Attributes:
        state: the working directory.
        descriptor: of its lock file.
        claim: the claim, where the file system has no locks.
    """

    state: Path
    descriptor: int
    claim: Path | None = None

    @classmethod
    def take(cls, state: Path, shared: bool) -> Lock:
        """Take the lock of a working directory.

        Raises:
            DestinationError: another process has it.
            FileNotFoundError: the directory has been removed meanwhile.
        """
        path = state / "lock"
        lock = cls(state, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))
        try:
            if not lock._locked(shared):
                lock._claim(shared)
            lock._check_current(path)
        except BaseException:
            lock.release()
            raise
        return lock

    def alone(self) -> bool:
        """Whether no other process works there; none can begin to from now on."""
        try:
            if not self._locked(shared=False):
                self._claim(shared=False)
        except (DestinationError, OSError):
            return False
        return True

    def release(self) -> None:
        """Let others work there."""
        os.closerange(
            self.descriptor, self.descriptor + 1
        )  # an error of a disk that has gone is not this one's to tell
        if self.claim is not None:
            with suppress(OSError):
                self.claim.unlink()

    def _check_current(self, path: Path) -> None:
        """Raise a FileNotFoundError if the lock is no longer the one that others would open."""
        if not os.path.samestat(os.fstat(self.descriptor), path.stat()):
            raise FileNotFoundError(path)

    def _locked(self, shared: bool) -> bool:
        """Lock the file; False on a file system without locks, as on many clusters.

        Raises:
            DestinationError: another process has locked it.
        """
        import fcntl  # Windows has none, and imports this module, too

        if self.claim is not None:
            return False
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DestinationError(f"another fp4cast is writing it ({self.state})") from None
        except OSError:
            return False
        return True

    def _claim(self, shared: bool) -> None:
        """Claim the directory, or change the claim.

        Raises:
            DestinationError: another process has a claim that excludes this one.
        """
        claims = self.state / CLAIMS
        claims.mkdir(mode=0o700, exist_ok=True)
        self.claim = self.claim or claims / os.urandom(8).hex()
        write_whole(self.claim, json.dumps(Claim.of_this_process(shared)._asdict()).encode())
        for path in claims.iterdir():
            if path != self.claim and path.suffix != ".new":
                with suppress(FileNotFoundError):  # released meanwhile
                    Claim.read(path).check(path, shared)


class Claim(NamedTuple):
    """What a claim says of its process.

    Attributes:
        host: the name of its machine, for people.
        place: where its number means that process.
        pid: its number.
        began: see `_began`.
        shared: others may work there, too, if they say so as well.
    """

    host: str
    place: str
    pid: int
    began: str
    shared: bool

    @classmethod
    def of_this_process(cls, shared: bool) -> Claim:
        """The claim of this process."""
        return cls(platform.node(), _place(), os.getpid(), _began(os.getpid()), shared)

    @classmethod
    def read(cls, path: Path) -> Claim:
        """Read another's claim; one that is damaged is that of an unknown process."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            return cls("an unknown machine", "", 0, "", shared=False)

    def check(self, path: Path, shared: bool) -> None:
        """Raise a DestinationError if it excludes ours; remove it if its process has ended."""
        here = self.place == _place()
        if here and _began(self.pid) not in (self.began, "unknown"):
            path.unlink(missing_ok=True)
        elif here and not (shared and self.shared):
            raise DestinationError(f"another fp4cast is writing it ({path.parent.parent})")
        elif not (shared and self.shared):
            raise DestinationError(
                f"another fp4cast is writing it, process {self.pid} on {self.host}, or was killed there. This file "
                f"system has no locks that could tell: if none runs there, delete {path}"
            )


def _place() -> str:
    """Where numbers of processes mean the same: a machine, since it was started, and a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return platform.node()


def _began(pid: int) -> str:
    """What tells a process from later ones of the same number; empty where there is none.

    Source of the field: Linux, proc_pid_stat(5), 22: the time when it started.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)  # no Linux; nothing is sent
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "unknown"
