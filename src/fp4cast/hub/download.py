"""Download files of a repository into a directory: several at a time, each checked, none longer than it is needed."""

from __future__ import annotations

import hashlib
import inspect
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import OTHER_FORMATS
from fp4cast.checkpoints.file_system import free_bytes
from fp4cast.errors import CheckpointError, DestinationError
from fp4cast.hub.client import client_utils, explaining, patiently
from fp4cast.hub.repository import Repository
from fp4cast.parallel.progress import Advance

_LOOK_SECONDS = 0.2  # between two checks for Ctrl-C
_PATIENCE_SECONDS = 2.0  # for downloads that are given up; their threads end with the process in any case
_UNREACHABLE = "the Hub cannot be reached any more. The same command goes on where this one has stopped."
_CACHE = Path(".cache") / "huggingface"  # where the client keeps notes and unfinished files


class Given(Exception):  # noqa: N818
    """Raised in a download that nobody waits for any more."""


def download_small(repository: Repository, directory: Path) -> Path:
    """Download everything but the weights: config, index, tokenizer, licence.

    Args:
        repository: the model.
        directory: is made.

    Raises:
        CheckpointError: something cannot be had.
        DestinationError: there is no room for it.
    """
    from huggingface_hub import snapshot_download

    directory.mkdir()
    needed = sum(stored.size for file, stored in repository.files.items() if not file.endswith(".safetensors"))
    if needed > (free := free_bytes(directory)):
        raise DestinationError(
            f"{directory}: {needed / 1e9:.2f} GB are needed there for the files beside the weights of {repository}, "
            f"{free / 1e9:.2f} GB are free; name another place with TMPDIR"
        )
    with explaining(str(repository)), _quietly():
        snapshot_download(
            repository.name,
            revision=repository.commit,
            local_dir=directory,
            ignore_patterns=[*OTHER_FORMATS, "*.safetensors"],
        )
    return directory


class Downloads:
    """Files of a repository on their way to a directory, each in a thread of its own, which ends with the process.

    Attributes:
        repository: the model.
        directory: where they go.
        held: the files that are there or on their way, and their sizes.
    """

    def __init__(self, repository: Repository, directory: Path, progress: Advance) -> None:
        self.repository, self.directory = repository, directory
        self.held: dict[str, int] = {}
        self._progress = progress
        self._ended = threading.Event()
        self._files: dict[str, Future[None]] = {}
        self._threads: list[threading.Thread] = []
        # What the client's storage keeps of large files would need their space a second time.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        directory.mkdir(exist_ok=True)
        for left in (directory / _CACHE).rglob("*.incomplete"):
            left.unlink()  # of a run that was killed; the client does not go on with it

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def on_the_way(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(size for file, size in self.held.items() if not self._files[file].done())

    def clear(self, needed: Collection[str]) -> None:
        """Delete what an earlier run has left and nobody needs any more."""
        for path in self.directory.glob("*.safetensors"):
            if path.name not in needed:
                path.unlink()

    def start(self, file: str) -> None:
        """Begin to download a file, unless that has begun."""
        if file in self.held:
            return
        self.held[file] = self.repository.files[file].size
        future: Future[None] = Future()
        self._files[file] = future
        thread = threading.Thread(target=self._run, args=(file, future), daemon=True, name=f"download {file}")
        self._threads.append(thread)
        thread.start()

    def wait(self, file: str) -> None:
        """Wait until a file is there, whole and checked.

        Raises:
            CheckpointError: it cannot be had.
            DestinationError: it cannot be written.
        """
        future = self._files[file]
        while not wait([future], timeout=_LOOK_SECONDS).done:
            pass
        future.result()

    def let_go(self, file: str) -> None:
        """Delete a file that is not needed any more."""
        (self.directory / file).unlink(missing_ok=True)
        del self.held[file], self._files[file]

    def _run(self, file: str, future: Future[None]) -> None:
        try:
            self._download(file)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _download(self, file: str) -> None:
        path, name = self.directory / file, f"{self.repository}/{file}"
        for attempt in ("first", "second"):
            try:
                with explaining(name, _UNREACHABLE):
                    patiently(name, partial(self._fetch, file))
            except OSError as error:
                if error.errno is not None:
                    raise DestinationError(f"{path}: cannot be downloaded: {error.strerror}") from error
                raise CheckpointError(f"{name}: cannot be downloaded: {error}") from error
            if not (wrong := self._wrong(file)):
                return
            path.unlink()
            if attempt == "second":
                raise CheckpointError(f"{name}: {wrong}. It was damaged on its way twice, or has changed on the Hub.")

    def _fetch(self, file: str) -> None:
        """Let the client download a file; it tries again by itself where a connection breaks."""
        from huggingface_hub import hf_hub_download

        downloads = self

        class Bar(client_utils().tqdm):  # type: ignore[misc]
            """Hands the bytes on in place of drawing them, and ends a download that nobody waits for."""

            def __init__(self, *args: Any, **named: Any) -> None:
                super().__init__(*args, **(named | {"disable": True}))

            def update(self, n: float | None = 1) -> None:
                if downloads._ended.is_set():
                    raise Given
                downloads._progress(int(n or 0))

        supported = "tqdm_class" in inspect.signature(hf_hub_download).parameters
        more: Mapping[str, Any] = {"tqdm_class": Bar} if supported else {}
        hf_hub_download(self.repository.name, file, revision=self.repository.commit, local_dir=self.directory, **more)
        if not supported:
            self._progress(self.repository.files[file].size)

    def _wrong(self, file: str) -> str:
        """What is wrong with a downloaded file, in words; empty if nothing is."""
        stored = self.repository.files[file]
        with (self.directory / file).open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != stored.size:
                return f"expected {stored.size} bytes, got {size}"
            digest = hashlib.file_digest(opened, "sha256").hexdigest() if stored.sha256 else ""
        return "" if digest == stored.sha256 else f"expected contents of SHA-256 {stored.sha256}, got {digest}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Let the client draw no progress bars meanwhile."""
    utils = client_utils()
    before = utils.are_progress_bars_disabled()
    if not before:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()
