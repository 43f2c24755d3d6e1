"""What file systems can do or say, and some cannot: whether they are far, how much room they have, exchange paths."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
from pathlib import Path

# Of the file systems that are on no block device of their own, those that are on this machine all the same.
_LOCAL = {"bcachefs", "btrfs", "overlay", "ramfs", "tmpfs", "zfs"}


def is_remote(device: int) -> bool:
    """Whether files of a device come over a network or from another process, as far as Linux tells.

    Source of the fields: Linux, proc_pid_mountinfo(5).
    """
    if os.major(device):
        return False  # a disk
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split() for line in lines)
    return any(fields[2] == name and fields[fields.index("-") + 1] not in _LOCAL for fields in mounts)


def free_bytes(place: Path) -> float:
    """Bytes that are free where a path lies; infinite where the file system does not say, as on some object stores."""
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            raise
        return math.inf
    return usage.free if usage.total else math.inf


def exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot.

    Source of the constants: Linux, renameat2(2).
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False  # no Linux, or a C library before glibc 2.28
    at_cwd, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), ctypes.c_uint(flag)) == 0)
