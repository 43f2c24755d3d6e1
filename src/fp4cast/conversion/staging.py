"""Build the destination beside DST and publish it with one rename: an interruption never leaves a loadable half.

The working directory holds `out/`, which one rename turns into DST; the lock, the plan's fingerprint, unfinished shards
and a note for each finished one; config.json, without which no engine loads a directory, until everything else is
complete and verified; and an older DST, until the new one is in place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.byte_ranges import sync_path, write_file, write_whole
from fp4cast.checkpoints.checksums import Checksum, checksum_of_bytes
from fp4cast.checkpoints.directory import CONFIG, Checkpoint
from fp4cast.checkpoints.file_system import exchange, free_bytes
from fp4cast.conversion.companions import copy_companion
from fp4cast.conversion.destination import check_destination
from fp4cast.conversion.lock import CLAIMS
from fp4cast.conversion.working_directory import (
    clear,
    enter,
    finished_shards,
    leave,
    note_of,
    notes_of_comparisons,
    plan_of,
    remove,
    state_of,
)
from fp4cast.errors import DestinationError

LOG = logging.getLogger(__name__)
FREE_MARGIN = 64 << 20
ONCE = "once "  # begins the fingerprint of work that cannot be resumed


class GuidedError(DestinationError):
    """An error that says itself what to do next; nothing is added to it."""


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

    def adopt(self, fingerprint: str, *, resume: bool = False, restart: bool = False) -> None:
        """Keep an earlier run's finished shards of the same plan, and say so; delete everything else that it left.

        Args:
            fingerprint: the plan's.
            resume: the caller expects an earlier run of the same plan, if any.
            restart: keep nothing.

        Raises:
            DestinationError: there is an earlier run of another plan, and it is not the caller's wish to lose it.
        """
        before, shards = plan_of(self.state), set(finished_shards(self.state))
        if before != fingerprint and before and not restart and (resume or (shards and not before.startswith(ONCE))):
            raise other_conversion(self.state)
        if before != fingerprint or restart:
            shards = set()
        if shards:
            LOG.warning("%s: shards kept from an earlier run: %d; --restart begins anew", self.state, len(shards))
        (self.out / CONFIG).unlink(missing_ok=True)  # first of all: what goes piece by piece must not be loadable
        notes = {note_of(self.state, shard).name for shard in shards}
        streamed = {"downloads", *notes_of_comparisons(self.state)} if shards else set()
        clear(self.state, keep=notes | streamed | {"lock", CLAIMS, "out"})
        clear(self.out, keep=shards)
        write_whole(self.state / "plan", fingerprint.encode())

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
            raise GuidedError(f"{self.state}: no part has been written; run them first (--shards i/n)")
        if not mark.exists():
            _write_first(mark, fingerprint.encode())
        if plan_of(self.state) != fingerprint:
            raise GuidedError(
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
        require_space(
            self.destination, self.out, sum(size for file, size in sizes.items() if not (self.out / file).exists())
        )

    def keep_only(self, files: Iterable[str]) -> None:
        """Delete everything in `out` but these files."""
        clear(self.out, keep=set(files))

    def forget_shards(self) -> None:
        """Make the next run write every shard again."""
        for shard in finished_shards(self.state):
            note_of(self.state, shard).unlink()

    def write_documents(
        self,
        documents: Mapping[str, bytes],
        companions: Mapping[PurePosixPath, int],
        source: Checkpoint,
        *,
        place: Callable[[PurePosixPath], PurePosixPath] = lambda name: name,
    ) -> dict[str, Checksum]:
        """Write everything beside the shards, as private as it is in the source; config.json waits outside.

        Args:
            documents: bytes by file name.
            companions: files to carry along, relative to the source, and their sizes.
            source: the checkpoint that they belong to.
            place: returns a companion's name in DST: that beside a card, where one will be written.

        Returns:
            The checksum of each, by its name in DST.
        """
        found: dict[str, Checksum] = {}
        mode = (source.path / CONFIG).stat().st_mode & 0o666 | 0o600
        for name, data in documents.items():
            write_file(self.out / (self.config if name == CONFIG else name), data, mode)
            found[name] = checksum_of_bytes(data)
        for companion, size in companions.items():
            self._folders(companion, source.path)
            target = place(companion)
            found[str(target)] = copy_companion(source.path, companion, size, self.out / target)
        return found

    def write_receipt(self, name: str, data: bytes) -> None:
        """Write the receipt, as public as the configs."""
        write_file(self.out / name, data, (self.state / CONFIG).stat().st_mode & 0o666)

    def _folders(self, companion: PurePosixPath, source: Path) -> None:
        for folder in reversed(companion.parents[:-1]):
            (self.out / folder).mkdir(mode=(source / folder).stat().st_mode & 0o777 | 0o700, exist_ok=True)

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
        try:
            self._sync(self.destination.parent)
        except OSError as error:
            raise GuidedError(
                f"{self.destination}: is complete, but its disk does not say so: {error.strerror}; run the same "
                f"command again to compare it. What was there before, if anything, is in {self.state}"
            ) from error
        remove(self.state)

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


def require_space(destination: Path, place: Path, size: int) -> None:
    """Raise a DestinationError if so many bytes, and some to spare, are not free where a place lies."""
    needed, free = FREE_MARGIN + size, free_bytes(place)
    if needed > free:
        raise DestinationError(f"{destination}: {needed / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")


def other_conversion(state: Path) -> GuidedError:
    """The error about a working directory that another plan has begun."""
    return GuidedError(
        f"{state}: holds an unfinished conversion with other options, or of a source that has changed; give the "
        "options of before, or --restart to begin anew"
    )


def _write_first(path: Path, data: bytes) -> None:
    """Write a small file that others may be writing, too: the first one stays."""
    beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}.new")
    write_file(beside, data)
    try:
        path.hardlink_to(beside)
    except FileExistsError:
        pass
    except OSError:
        beside.replace(path)  # a file system without hard links
    beside.unlink(missing_ok=True)


def _recover(destination: Path, state: Path) -> None:
    """Put back an older DST that a killed run had moved aside, also where a script has made an empty one since."""
    old = state / "old"
    if not old.exists():
        return
    if destination.is_dir() and not any(destination.iterdir()):
        destination.rmdir()
    if destination.exists():
        raise GuidedError(
            f"{old}: is what {destination} was before a run that was killed, and there is another one now; move one of "
            "them away"
        )
    old.rename(destination)


@contextmanager
def staging(
    source: Path, destination: Path, *, overwrite: bool, shared: bool = False, keep: bool = True, sync: bool = True
) -> Iterator[Staging]:
    """Lock a working directory beside DST; when something fails, it is kept if it holds a finished shard.

    Args:
        source: SRC.
        destination: DST.
        overwrite: an existing DST will be replaced.
        shared: other processes may work in it at the same time, on other shards.
        keep: leave finished shards for a next run when something fails; otherwise leave nothing.
        sync: see `Staging`.

    Raises:
        DestinationError: it cannot be made, another process works in it, or DST must not be replaced.
    """
    lock, state = enter(source, destination, shared=shared), state_of(destination)
    try:
        _recover(destination, state)
        check_destination(source, destination, overwrite=overwrite)
        yield Staging(destination, state, state / "out", sync=sync)
    except OSError as error:
        failure = DestinationError(f"{error.filename or destination}: {error.strerror or error}")
        leave(failure, destination, lock, keep=keep, guided=False)
        raise failure from error
    except BaseException as error:
        guided = isinstance(error, GuidedError)
        leave(error, destination, lock, keep=keep or guided, guided=guided)
        raise
    finally:
        lock.release()
