"""A FUSE file system that shows a directory, and is slow, lacks calls or fails as it is told to.

It speaks the kernel's protocol itself (linux/fuse.h, fuse(4)), so that it needs no library:

    python fuse_server.py DIRECTORY MOUNTPOINT '{"latency": 0.008}'

It says "ready" when it is mounted, then answers each line of its input, a JSON object of settings to change, with
what it has counted since the line before; it ends with its input. `Settings` lists what can be set.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from fuse_state import Nodes, Settings

HEADER, ANSWER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTR, STATFS = struct.Struct("<6Q10I"), struct.Struct("<5Q4I24x")
INIT_OUT, DIRENT = struct.Struct("<IIIIHHIIHH32x"), struct.Struct("<QQII")
SETATTR, READ_WRITE = struct.Struct("<IIQQQQQQIIIIIIII"), struct.Struct("<QQI")
NAMES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 9: "MKDIR", 10: "UNLINK", 11: "RMDIR",
    12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS", 18: "RELEASE", 20: "FSYNC",
    25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 30: "FSYNCDIR", 31: "GETLK", 32: "SETLK",
    33: "SETLKW", 35: "CREATE", 36: "INTERRUPT", 38: "DESTROY", 42: "BATCH_FORGET", 43: "FALLOCATE", 45: "RENAME2",
    46: "LSEEK", 47: "COPY_FILE_RANGE",
}  # fmt: skip
SILENT = {"FORGET", "BATCH_FORGET", "INTERRUPT"}
ASYNC_READ, POSIX_LOCKS, BIG_WRITES, FLOCK_LOCKS, PARALLEL_DIROPS, MAX_PAGES = 1, 2, 1 << 5, 1 << 10, 1 << 18, 1 << 22
FATTR_MODE, FATTR_SIZE, FATTR_TIMES, FATTR_FH = 1, 8, 16 | 32, 1 << 6
DIRECT_IO, KEEP_CACHE = 1, 2  # FOPEN_*
MAX_BYTES = 128 << 10  # of one read or write
THREADS = 32


def attributes(status: os.stat_result) -> bytes:
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return ATTR.pack(
        status.st_ino, status.st_size, status.st_blocks, *(t // 10**9 for t in times), *(t % 10**9 for t in times),
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, 4096, 0,
    )  # fmt: skip


class Server:
    """Answers the requests of one mount; each handler takes (node, body) and returns the answer's bytes."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.nodes, self.settings = Nodes(root), settings
        self.counts: Counter[str] = Counter()
        self._met, self._waiting, self._listings, self._lock = 0, 0, {}, threading.Lock()
        self.heads = threading.Semaphore(settings.heads) if settings.heads else nullcontext()

    def answer(self, name: str, node: int, body: memoryview) -> bytes:
        with self._lock:
            self.counts[name] += 1
        self.fail(name, node)
        handler = getattr(self, name.lower(), None)
        if handler is None:
            raise OSError(errno.ENOSYS, name)
        return handler(node, body)

    def fail(self, name: str, node: int) -> None:
        """Raise the error that is set for this request."""
        wanted = self.settings.errors.get(name)
        if wanted and self.settings.only in str(self.nodes.path(node)):
            with self._lock:
                self._met += 1
                if self._met <= self.settings.after:
                    return
            raise OSError(getattr(errno, wanted), name)

    def change(self, values: dict[str, object]) -> dict[str, int]:
        """Change settings; what was counted before."""
        with self._lock:
            for name, value in values.items():
                setattr(self.settings, name, value)
            self._met, counts = 0, dict(self.counts)
            self.counts.clear()
        return counts

    def _child(self, node: int, name: memoryview | bytes) -> Path:
        return self.nodes.path(node) / os.fsdecode(bytes(name).split(b"\0")[0])

    def _entry(self, path: Path) -> bytes:
        # Names and attributes are asked for each time: others may change the directory beside this mount.
        return struct.pack("<QQQQII", self.nodes.number(path), 0, 0, 0, 0, 0) + attributes(path.lstat())

    def init(self, _node: int, body: memoryview) -> bytes:
        _, _, ahead = struct.unpack_from("<III", body)
        flags = ASYNC_READ | BIG_WRITES | PARALLEL_DIROPS | MAX_PAGES
        flags |= (POSIX_LOCKS | FLOCK_LOCKS) if self.settings.locks else 0
        return INIT_OUT.pack(7, 31, ahead, flags, THREADS, THREADS, MAX_BYTES, 1, MAX_BYTES // 4096, 0)

    def lookup(self, node: int, body: memoryview) -> bytes:
        return self._entry(self._child(node, body))

    def getattr(self, node: int, body: memoryview) -> bytes:
        flags, _, fh = struct.unpack_from("<IIQ", body)
        status = os.fstat(fh) if flags & 1 else self.nodes.path(node).lstat()
        return struct.pack("<QII", 0, 0, 0) + attributes(status)

    def setattr(self, node: int, body: memoryview) -> bytes:
        valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, *_ = SETATTR.unpack_from(body)
        target = fh if valid & FATTR_FH else self.nodes.path(node)
        if valid & FATTR_MODE:
            self.fail("SETATTR mode", node)
            os.chmod(target, stat.S_IMODE(mode))  # noqa: PTH101, it may be a descriptor
        if valid & FATTR_SIZE:
            os.truncate(target, size)
        if valid & FATTR_TIMES:
            self.fail("SETATTR times", node)
            os.utime(target, ns=(atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns))
        return struct.pack("<QII", 0, 0, 0) + attributes(os.stat(target))  # noqa: PTH116

    def mkdir(self, node: int, body: memoryview) -> bytes:
        path = self._child(node, body[8:])
        path.mkdir(mode=struct.unpack_from("<I", body)[0])
        return self._entry(path)

    def unlink(self, node: int, body: memoryview) -> bytes:
        path = self._child(node, body)
        path.rmdir() if path.is_dir() else path.unlink()
        self.nodes.drop(path)
        return b""

    rmdir = unlink

    def rename(self, node: int, body: memoryview) -> bytes:
        before, after = bytes(body[8:]).split(b"\0")[:2]
        old, new = self._child(node, before), self._child(struct.unpack_from("<Q", body)[0], after)
        old.rename(new)
        self.nodes.move(old, new)
        return b""

    def _opened(self, path: Path, flags: int, mode: int = 0) -> bytes:
        how = (DIRECT_IO if self.settings.direct else 0) | (KEEP_CACHE if self.settings.keep else 0)
        return struct.pack("<QII", os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode), how, 0)

    def open(self, node: int, body: memoryview) -> bytes:
        return self._opened(self.nodes.path(node), struct.unpack_from("<I", body)[0])

    def create(self, node: int, body: memoryview) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        opened = self._opened(path, flags | os.O_CREAT, stat.S_IMODE(mode))
        return self._entry(path) + opened

    def _size(self, name: str, size: int) -> int:
        return size // 2 if name in self.settings.short and size > 4096 else size

    def read(self, node: int, body: memoryview) -> bytes:
        fh, offset, size = READ_WRITE.unpack_from(body)
        if self.settings.ends >= 0 and self.nodes.path(node).suffix == ".safetensors":
            self.settings.ends -= 1
            if self.settings.ends < 0:
                self.settings.ends = 0
                return b""
        with self._lock:
            self._waiting += 1
            self.counts["reads at a time"] = max(self.counts["reads at a time"], self._waiting)
        if self.settings.latency:
            with self.heads:
                time.sleep(self.settings.latency)
        data = os.pread(fh, self._size("READ", size), offset)
        with self._lock:
            self._waiting -= 1
            self.counts["bytes read"] += len(data)
        return data

    def write(self, _node: int, body: memoryview) -> bytes:
        fh, offset, size = READ_WRITE.unpack_from(body)
        done = os.pwrite(fh, body[40 : 40 + self._size("WRITE", size)], offset)
        with self._lock:
            self.counts["bytes written"] += done
        return struct.pack("<II", done, 0)

    def release(self, _node: int, body: memoryview) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def flush(self, _node: int, _body: memoryview) -> bytes:
        return b""

    fsyncdir = flush

    def fsync(self, _node: int, body: memoryview) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def opendir(self, node: int, _body: memoryview) -> bytes:
        with os.scandir(self.nodes.path(node)) as found, self._lock:
            fh = len(self._listings) + 1
            self._listings[fh] = [(os.fsencode(e.name), e.inode(), 4 if e.is_dir() else 8) for e in found]
        return struct.pack("<QII", fh, 0, 0)

    def readdir(self, _node: int, body: memoryview) -> bytes:
        fh, offset, size = READ_WRITE.unpack_from(body)
        out = b""
        for i, (name, inode, kind) in enumerate(self._listings[fh][offset:], offset + 1):
            entry = DIRENT.pack(inode, i, len(name), kind) + name + b"\0" * (-len(name) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def releasedir(self, _node: int, body: memoryview) -> bytes:
        self._listings[struct.unpack_from("<Q", body)[0]] = []
        return b""

    def statfs(self, node: int, _body: memoryview) -> bytes:
        if not self.settings.size:
            return bytes(STATFS.size)
        s = os.statvfs(self.nodes.path(node))
        return STATFS.pack(s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, 255, s.f_frsize, 0)


def serve(server: Server, fuse: int) -> None:
    """Read requests and write answers until the file system is no longer mounted."""
    request = memoryview(bytearray(2 * MAX_BYTES))
    while True:
        try:
            size = os.readv(fuse, [request])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue  # it was interrupted before it was read
            return
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        name, code, data = NAMES.get(opcode, str(opcode)), 0, b""
        try:
            data = server.answer(name, node, request[HEADER.size : size]) if name not in SILENT else b""
        except OSError as error:
            code = -(error.errno or errno.EIO)
        except Exception:
            traceback.print_exc()
            code = -errno.EIO
        if name not in SILENT:
            try:
                os.writev(fuse, [ANSWER.pack(ANSWER.size + len(data), code, unique), data])
            except OSError:
                continue  # who asked has gone


def main(root: str, mountpoint: str, settings: str) -> None:
    os.umask(0)  # the kernel has applied the caller's
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_BYTES}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fp4cast", os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(6), options.encode()):
        sys.exit(f"mount is not allowed here: {os.strerror(ctypes.get_errno())}")
    server = Server(Path(root), Settings(**json.loads(settings)))
    for _ in range(THREADS):
        threading.Thread(target=serve, args=(server, fuse), daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(server.change(json.loads(line))), flush=True)
    os._exit(0)  # threads wait in the kernel


if __name__ == "__main__":
    main(*sys.argv[1:])
