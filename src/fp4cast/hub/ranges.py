"""Ranges of the bytes of files on the Hub: each read once, several at a time, tried again where a connection breaks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from fp4cast.checkpoints.readable import Readable
from fp4cast.errors import CheckpointError
from fp4cast.formats import Bytes
from fp4cast.hub.client import Passing, client_utils, explaining, patiently
from fp4cast.hub.repository import Repository

WINDOW_BYTES = 8 << 20  # of one request, at most
_HELD_BYTES = WINDOW_BYTES  # of earlier requests, that a thread keeps until it announces other ranges
_EXPIRED = frozenset({401, 403, 404, 410})  # statuses of the storage for an address that has ended


class RemoteFiles:
    """The files of a repository, by paths whose names are theirs; threads may share it.

    Attributes:
        repository: the model.
        downloaded: bytes of contents that were received so far.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.downloaded = 0
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}  # in the Hub's storage, by file
        self._mine = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._mine = threading.local()

    def __getitem__(self, path: Path) -> RemoteFile:
        return RemoteFile(self, path.name)

    def prefetch(self, ranges: Iterable[tuple[Path, int, int]]) -> None:
        """See `ReadableFiles`: neighbours are then read together."""
        joined: dict[str, list[tuple[int, int]]] = {}
        for path, start, nbytes in sorted(ranges):
            spans = joined.setdefault(path.name, [])
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], start + nbytes)
            else:
                spans.append((start, start + nbytes))
        self._mine.announced, self._mine.windows = joined, []

    def whole(self, file: str) -> bytes:
        """All bytes of a small file."""
        return self._fetch(file, 0, self.repository.files[file].size)

    def read(self, file: str, start: int, nbytes: int) -> bytearray:
        """Bytes [start, start + nbytes) of a file.

        Raises:
            CheckpointError: they cannot be had, or the file is no longer the one that was looked up.
        """
        out, end = bytearray(), start + nbytes
        while start < end:
            first, data = self._window(file, start, end)
            out += data[start - first : end - first]
            start = min(end, first + len(data))
        return out

    def _window(self, file: str, start: int, end: int) -> tuple[int, bytes]:
        """(first byte, bytes) of what holds the byte `start`, of which bytes up to `end` are needed."""
        windows: list[tuple[str, int, bytes]] = self._mine.__dict__.setdefault("windows", [])
        for name, first, data in windows:
            if name == file and first <= start < first + len(data):
                return first, data
        announced = self._mine.__dict__.get("announced", {}).get(file, ())
        last = next((last for first, last in announced if first <= start < last), end)
        data = self._fetch(file, start, min(max(end, last) - start, WINDOW_BYTES))
        windows.append((file, start, data))
        while sum(len(data) for _, _, data in windows[:-1]) > _HELD_BYTES:
            del windows[0]
        return start, data

    def _fetch(self, file: str, start: int, nbytes: int) -> bytes:
        """Bytes of a file from the Hub, tried again where that may help."""
        if not nbytes:
            return b""
        what = f"{self.repository}/{file}, bytes {start} to {start + nbytes - 1}"
        with explaining(what):
            return patiently(what, lambda: self._ask(file, start, nbytes))

    def _ask(self, file: str, start: int, nbytes: int) -> bytes:
        """One request, to the storage where the Hub has sent an earlier one."""
        with self._lock:
            address = self._addresses.get(file)
        headers = {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}
        if address is None:  # the storage's addresses are signed, and it must not see the token
            headers = {**client_utils().build_hf_headers(), **headers}
        with _answer(address or self.repository.url(file), headers) as (answer, parts):
            status = answer.status_code
            if address is not None and status in _EXPIRED:
                with self._lock:
                    self._addresses.pop(file, None)
                raise Passing(f"the address of {file} has expired")
            if status >= 400:
                getattr(answer, "read", bytes)()  # its words, for the error
                client_utils().hf_raise_for_status(answer)
            self._check(file, answer, start, nbytes)
            if answer.history:
                with self._lock:
                    self._addresses[file] = str(answer.url)
            return self._body(parts, nbytes)

    def _check(self, file: str, answer: Any, start: int, nbytes: int) -> None:
        """Raise unless this is the range that was asked for, of the file that was looked up."""
        stored = self.repository.files[file]
        whole = answer.status_code == 200 and start == 0 and nbytes == stored.size
        said = str(answer.headers.get("Content-Range", "none"))
        expected = f"bytes {start}-{start + nbytes - 1}/{stored.size}"
        if not whole and said != expected:
            raise CheckpointError(
                f"{self.repository}/{file}: expected {expected}, got {said} (status {answer.status_code}): the file "
                "has changed on the Hub, or a proxy serves no ranges. Run the command again."
            )
        tags = [str(each.headers.get("X-Linked-Etag", "")).strip('"') for each in (*answer.history, answer)]
        other = [tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag) and tag != stored.sha256]
        if stored.sha256 and other:
            raise CheckpointError(
                f"{self.repository}/{file}: expected contents of SHA-256 {stored.sha256}, the Hub has {other[0]} now: "
                "the file has changed. Run the command again."
            )

    def _body(self, parts: Callable[[], Iterator[bytes]], nbytes: int) -> bytes:
        out = bytearray()
        for part in parts():
            out += part
            with self._lock:
                self.downloaded += len(part)
            if len(out) > nbytes:
                break
        if len(out) != nbytes:
            raise Passing(f"the connection ended after {len(out)} of {nbytes} bytes")
        return bytes(out)


class RemoteFile(Readable):
    """One of them."""

    gap = 4096  # a request costs more than the bytes between two records

    def __init__(self, files: RemoteFiles, name: str) -> None:
        self.files, self.name = files, name

    def read(self, start: int, nbytes: int) -> Bytes:
        """See `Readable`."""
        return np.frombuffer(self.files.read(self.name, start, nbytes), np.uint8)


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Callable[[], Iterator[bytes]]]]:
    """(answer, what yields its body) by the client that huggingface_hub uses, with its settings and proxies."""
    from huggingface_hub import constants

    session: Any = client_utils().get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # httpx; of requests it is a flag
        with session.stream("GET", url, headers=headers, timeout=timeout) as answer:
            yield answer, answer.iter_bytes
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as answer:
            yield answer, lambda: answer.iter_content(1 << 16)
