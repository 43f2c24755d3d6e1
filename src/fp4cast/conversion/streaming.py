"""Convert a model on the Hub shard by shard: each is downloaded, converted, compared, and deleted.

The plan is made from headers and scales, which range requests bring. Downloads go ahead while a shard is converted;
they lie in the working directory beside DST, where a later run takes them up.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fp4cast.checkpoints.directory import Checkpoint, Stamps
from fp4cast.checkpoints.file_system import free_bytes
from fp4cast.checkpoints.header import read_header
from fp4cast.conversion.compared import Notes
from fp4cast.conversion.complete import as_noted, check_resumption, may_be_complete
from fp4cast.conversion.destination import check_place, real_path
from fp4cast.conversion.direction import find_direction
from fp4cast.conversion.execute import Finished, execute, find_finished, tallies_of
from fp4cast.conversion.plan import ConvertOptions, Plan, plan_conversion
from fp4cast.conversion.publish import finished, publish
from fp4cast.conversion.schedule import Group, Schedule, Turn
from fp4cast.conversion.staging import FREE_MARGIN, Staging, staging
from fp4cast.conversion.working_directory import downloads_of
from fp4cast.errors import CheckpointError, Fp4CastError, UsageError
from fp4cast.hub.download import Downloads, download_small
from fp4cast.hub.opened import CONNECTIONS, open_repository
from fp4cast.hub.ranges import RemoteFiles
from fp4cast.hub.repository import Repository, look_up
from fp4cast.parallel.engines import Engine, make_engine
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.verification.opened import open_both
from fp4cast.verification.report import Report
from fp4cast.verification.verify import judge

AHEAD = 2  # shards that are downloaded beside the one that is converted


def convert_streamed(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008, it is frozen
    *,
    jobs: int | None = None,
    engine: str = "local",
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    sync: bool = True,
    ahead: int = AHEAD,
    progress: Progress = ignore,
) -> Report:
    """Convert a model on the Hub without a place for all of it; arguments as in `convert`.

    Beside DST there are at most `ahead` + 1 shards of the source, or as many as hold the two parts of one tensor.

    Args:
        src: a Hugging Face model id.
        dst: the directory to make.
        options: what decides its bytes.
        jobs: see `convert`.
        engine: "local"; others have no shards to work on.
        resume: see `convert`.
        restart: see `convert`.
        overwrite: see `convert`.
        verify: compare every value while its source is there.
        sync: see `convert`.
        ahead: shards to download in advance, where the disk has room for them.
        progress: see `convert`.

    Raises:
        Fp4CastError: see `fp4cast.errors`; `dst` is as it was before.
    """
    begin, worker = time.monotonic(), make_engine(engine, jobs)
    if engine != "local":
        raise UsageError("--stream works on this machine alone; leave out --engine")
    if find_direction(options.to) != "nvfp4":
        raise UsageError("--stream goes from MXFP4 to NVFP4 alone; leave it out for --to mxfp4")
    check_resumption(resume=resume, restart=restart)
    repository, destination = _look_up(src), real_path(dst)
    options = replace(options, source_id=options.source_id or str(repository))
    with tempfile.TemporaryDirectory(prefix="fp4cast-") as scratch, RemoteFiles(repository) as files:
        small = Path(scratch) / "model"
        with _called(small, str(repository)):
            check_place(small.parent, destination)
            download_small(repository, small)
            plan = _plan(files, small, downloads_of(destination), options, jobs, progress)
            look = may_be_complete(plan, destination, resume=resume, restart=restart, overwrite=overwrite)
            done = as_noted(plan, destination, jobs, overwrite=overwrite, progress=progress) if look else None
            if done is None:
                with staging(small, destination, overwrite=overwrite, sync=sync) as stage:
                    stage.adopt(plan.fingerprint, resume=resume, restart=restart)
                    run = _Run(plan, stage, repository, worker, verify, sync, ahead, progress)
                    done = run.publish(str(dst), run.shards(), overwrite=overwrite)
            return replace(finished(plan, done, dst, time.monotonic() - begin), source=str(repository))


def _look_up(src: str | Path) -> Repository:
    repository = look_up(src)
    if repository is not None:
        return repository
    if Path(src).exists():
        raise UsageError(f"{src}: lies on this machine; --stream is for a model on the Hub. Leave it out.")
    raise CheckpointError(f"{src}: is no model id, or the Hub cannot be reached; --stream needs it")


def _plan(
    files: RemoteFiles, small: Path, shards: Path, options: ConvertOptions, jobs: int | None, progress: Progress
) -> Plan:
    """The plan of a conversion whose shards will come to lie in `shards`."""
    checkpoint = open_repository(files, small, shards)
    return plan_conversion(
        checkpoint,
        _stamps(files.repository, checkpoint),
        options,
        jobs=max(jobs or 0, CONNECTIONS),
        progress=lambda n, total: progress("scan", n, total),
        reader=files,
    )


def _stamps(repository: Repository, checkpoint: Checkpoint) -> Stamps:
    """What tells the shards from others: their contents' digests, so that an edited model card changes nothing."""
    found = ((file, repository.files[file]) for file in checkpoint.shards)
    return tuple((file, stored.size, int(stored.sha256 or repository.commit, 16)) for file, stored in found)


@contextmanager
def _called(directory: Path, name: str) -> Iterator[None]:
    """Call a directory by the model's name in the messages of errors."""
    try:
        yield
    except Fp4CastError as error:
        error.args = (str(error).replace(str(directory), name),)
        raise


@dataclass
class _Run:
    """One streamed conversion, from its plan to its destination.

    Attributes:
        plan: the plan.
        stage: the working directory.
        repository: the source.
        engine: runs the work.
        verify: compare every shard.
        sync: wait for the disk.
        ahead: shards to download in advance.
        progress: see `convert`.
        notes: the findings of all comparisons.
        finished: the shards that are written.
    """

    plan: Plan
    stage: Staging
    repository: Repository
    engine: Engine
    verify: bool
    sync: bool
    ahead: int
    progress: Progress
    notes: Notes = field(init=False)
    finished: dict[str, Finished] = field(init=False)

    def shards(self) -> dict[str, Finished]:
        """Write and compare all shards, but for those that an earlier run has finished."""
        found = find_finished(
            self.plan.shards,
            self.stage.out,
            fingerprint=self.plan.fingerprint,
            state=self.stage.state,
            engine=self.engine,
            progress=lambda n: self.progress("check", n, self.plan.write_bytes),
        )
        self.finished = {file: shard for file, shard in found.items() if isinstance(shard, Finished)}
        self.notes = Notes(self.stage.state, self.plan.fingerprint)
        compared = self.notes.load(self.plan, self.finished) if self.verify else None
        schedule = Schedule.of(self.plan, self.finished, compared)
        self._check_space(schedule)
        total = sum(schedule.sizes[file] for file in schedule.order)
        downloads = downloads_of(self.stage.destination)
        with Downloads(self.repository, downloads, lambda n: self.progress("download", n, total)) as coming:
            coming.clear(schedule.order)
            for number, turn in enumerate(schedule.turns):
                self._start(coming, schedule, number)
                self._do(coming, turn)
                for file in [file for file in turn.needs if schedule.last[file] == number]:
                    coming.let_go(file)
        return {shard.file: self.finished[shard.file] for shard in self.plan.shards}

    def _check_space(self, schedule: Schedule) -> None:
        downloads = downloads_of(self.stage.destination)
        there = sum((downloads / file).stat().st_size for file in schedule.order if (downloads / file).exists())
        self.stage.check_space(self.plan.sizes | {"downloads": max(0, schedule.most_held - there)})

    def _start(self, coming: Downloads, schedule: Schedule, number: int) -> None:
        """Begin the downloads that a turn needs, and those after it for which there is room."""
        for file in sorted(schedule.turns[number].needs):
            coming.start(file)
        for file in schedule.order:
            if len(coming.held) > self.ahead:
                return
            if file not in coming.held and schedule.last[file] >= number:
                if schedule.sizes[file] > self._free(coming):
                    return
                coming.start(file)

    def _free(self, coming: Downloads) -> float:
        """Bytes of the disk that nothing is meant for."""
        waiting = sum(shard.layout.size for shard in self.plan.shards if shard.file not in self.finished)
        return free_bytes(self.stage.out) - FREE_MARGIN - waiting - coming.on_the_way

    def _do(self, coming: Downloads, turn: Turn) -> None:
        """Write a shard and compare what can be compared then."""
        for file in sorted(turn.needs):
            coming.wait(file)
            self._same(file)
        if turn.write:
            self.finished |= execute(
                [turn.shard],
                self.stage.out,
                fingerprint=self.plan.fingerprint,
                state=self.stage.state,
                engine=self.engine,
                sync=self.sync,
                progress=lambda n: self.progress("write", n, self.plan.write_bytes),
            )
        for group in turn.checks:
            self._compare(group)

    def _same(self, file: str) -> None:
        """Raise unless a downloaded shard has the header from which the plan was made."""
        planned = self.plan.source.checkpoint.shards[file]
        found = read_header(planned.path)
        if found.digest != planned.digest:
            raise CheckpointError(f"{self.repository}/{file}: its header is not the one that was planned from")

    def _compare(self, group: Group) -> None:
        rounded = [name for name, tally in tallies_of(self.finished.values()).items() if tally.rounded]
        total = self.plan.compare_bytes
        self.notes.compare(
            self.plan,
            self.stage.out,
            group,
            self.finished,
            rounded,
            self.engine,
            lambda n: self.progress("verify", n, total),
        )

    def publish(self, destination: str, shards: dict[str, Finished], *, overwrite: bool) -> Report:
        """Judge the findings, and publish DST."""
        return publish(
            self.plan,
            self.stage,
            shards,
            destination,
            engine=self.engine,
            verify=self.verify,
            overwrite=overwrite,
            progress=self.progress,
            look=self._judge,
        )

    def _judge(self) -> Report:
        begin = time.monotonic()
        opened = open_both(self.plan.source.checkpoint, self.stage.out, self.stage.config)
        return judge(opened, self.notes.findings, strict=True, begin=begin)
