"""Children of one process: each does some work on a fork, meets a fault if one is armed, and says how it ended."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fp4cast.errors import Fp4CastError

CPU_SECONDS, WALL_SECONDS = 1, 60  # a child that takes longer hangs; a small conversion needs a fiftieth of a second

Tree = dict[str, str]


class Ended(NamedTuple):
    """How a child ended: "done", "refused" by an Fp4CastError, "raised" something else, "killed" or "hangs"."""

    how: str
    said: str
    seconds: float


def preloaded() -> Any:
    """faults.c, as it was preloaded."""
    library = ctypes.CDLL(None)
    library.fault_name.restype = library.fault_path.restype = ctypes.c_char_p
    library.fault_count.restype = ctypes.c_long
    for call in (library.fault_name, library.fault_path, library.fault_counts):
        call.argtypes = [ctypes.c_long]
    library.fault_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library


def tree(path: Path) -> Tree:
    """Everything below a directory: files by their digest, others by what they are; nothing if it is not there."""
    found: Tree = {}
    for each in sorted(path.rglob("*")):
        name = str(each.relative_to(path))
        if each.is_symlink() or not (each.is_file() or each.is_dir()):
            found[name] = "special"
        elif each.is_dir():
            found[name] = "directory"
        else:
            with each.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha1").hexdigest()
    return found


def _report(pipe: int, work: Callable[[], str]) -> None:
    """In a child: do the work and write how it ended."""
    try:
        how = ["done", work() or ""]
    except Fp4CastError as error:
        how = ["refused", "\n".join([str(error), *getattr(error, "__notes__", ())])]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        how = ["raised", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
    with os.fdopen(pipe, "w") as out:
        json.dump(how, out)


def in_child(work: Callable[[], Any], cpu_seconds: float = CPU_SECONDS, kill_after: float | None = None) -> Ended:
    """Do some work in a fork; `kill_after` that many seconds it is killed."""
    begin = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            _report(writing, work)
        finally:
            os._exit(0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - begin
    if os.WIFSIGNALED(status):
        number = signal.Signals(os.WTERMSIG(status))
        how = {signal.SIGKILL: "killed", signal.SIGPROF: "hangs", signal.SIGALRM: "hangs"}.get(number, "raised")
        return Ended(how, number.name, seconds)
    return Ended(*json.loads(said or '["raised", "SystemExit"]'), seconds)
