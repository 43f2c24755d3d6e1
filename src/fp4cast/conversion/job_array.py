"""One conversion by many processes, without cluster software: each writes some shards, a last one publishes them.

Every part makes the plan again, from the same headers and scales, and writes its shards into the same working
directory; the plan's fingerprint tells whether they agree. This is what a Slurm array runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp4cast.conversion.complete import complete_or_write, looks_complete, marked
from fp4cast.conversion.convert import prepare
from fp4cast.conversion.execute import Finished, execute, find_finished
from fp4cast.conversion.plan import ConvertOptions, Plan, check_unchanged
from fp4cast.conversion.publish import finished, publish
from fp4cast.conversion.staging import GuidedError, Staging, staging
from fp4cast.conversion.working_directory import state_of
from fp4cast.errors import UsageError
from fp4cast.parallel.engines import Engine, make_engine
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.verification.report import Report

_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """The result of one part of a job array.

    Attributes:
        source: the source directory.
        destination: the directory that `finish` will publish.
        part: the number of this part, from 1.
        parts: the number of parts.
        shards: the files that it was responsible for.
        bytes: the size of those that it wrote now.
        seconds: wall time.
        kept: how many of them an earlier run had finished.
    """

    source: str
    destination: str
    part: int
    parts: int
    shards: Sequence[str]
    bytes: int
    seconds: float
    kept: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def parse_part(text: str) -> tuple[int, int]:
    """Parse "i/n", the i-th of n parts, into (i, n).

    >>> parse_part("2/8")
    (2, 8)

    Raises:
        UsageError: the text has another form, or i is not in 1 to n.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, parts = (int(group) for group in match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"a part is written i/n with 1 <= i <= n, as in 2/8; got {text!r}")
    return part, parts


def convert_part(
    src: str | Path,
    dst: str | Path,
    part: int,
    parts: int,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008, it is frozen
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    sync: bool = True,
    progress: Progress = ignore,
) -> Part:
    """Write the i-th of n parts of a conversion's shards; other parts may run at the same time, on other machines.

    An interrupted part that runs again keeps the shards that it had finished; where `dst` is complete already, it has
    nothing to do.

    Args:
        src: as for `convert`.
        dst: the directory to make, on a file system that all parts share.
        part: the number of this part, from 1 to `parts`.
        parts: the number of parts; if it exceeds the number of shards, some parts have nothing to do.
        options: the same for all parts.
        jobs: threads; None for one a core.
        overwrite: allow an existing `dst`, which `finish`, called with it too, will replace.
        sync: see `convert`.
        progress: see `convert`.

    Raises:
        Fp4CastError: see `fp4cast.errors`; the shards of other parts are as they were.
    """
    begin = time.monotonic()
    parse_part(f"{part}/{parts}")
    destination, plan = prepare(src, dst, options, jobs=jobs, progress=progress)
    shards = plan.shards[part - 1 :: parts]
    if not overwrite and looks_complete(plan, destination):
        shards = ()  # `finish` compares what is there
    total = sum(shard.layout.size for shard in shards)
    if not shards:
        return Part(str(plan.source.checkpoint.path), str(dst), part, parts, (), 0, time.monotonic() - begin)
    with staging(plan.source.checkpoint.path, destination, overwrite=overwrite, shared=True, sync=sync) as stage:
        stage.join(plan.fingerprint)
        stage.check_space({shard.file: shard.layout.size for shard in shards})
        found = execute(
            shards,
            stage.out,
            fingerprint=plan.fingerprint,
            state=stage.state,
            engine=make_engine("local", jobs),
            sync=sync,
            progress=lambda n: progress("write", n, total),
        )
        check_unchanged(plan)
    moved = sum(shard.checksum.bytes for shard in found.values() if not shard.kept)
    kept = sum(shard.kept for shard in found.values())
    source = str(plan.source.checkpoint.path)
    return Part(source, str(dst), part, parts, list(found), moved, time.monotonic() - begin, kept)


def finish(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008, it is frozen
    *,
    jobs: int | None = None,
    engine: str = "local",
    overwrite: bool = False,
    sync: bool = True,
    verify: bool = True,
    progress: Progress = ignore,
) -> Report:
    """Publish `dst` when all parts have written their shards: write documents, verify, rename once.

    Args:
        src: as for the parts.
        dst: as for the parts.
        options: as for the parts.
        jobs: threads; None for one a core.
        engine: runs the verification; see `convert`.
        overwrite: as for the parts.
        sync: see `convert`.
        verify: compare every value before `dst` is published.
        progress: see `convert`.

    Raises:
        DestinationError: shards are missing, named in the message, or the options are not those of the parts.
        Fp4CastError: see `fp4cast.errors`.
    """
    begin = time.monotonic()
    worker = make_engine(engine, jobs)
    destination, plan = prepare(src, dst, options, jobs=jobs, progress=progress)
    look = not overwrite or marked(plan, destination) or not state_of(destination).exists()

    def write() -> Report:
        with staging(plan.source.checkpoint.path, destination, overwrite=overwrite, sync=sync) as stage:
            stage.join(plan.fingerprint, first=False)
            shards = _written(plan, stage, worker, progress)
            stage.keep_only(shards)
            check_unchanged(plan)
            return publish(
                plan, stage, shards, str(dst), engine=worker, verify=verify, overwrite=overwrite, progress=progress
            )

    report = complete_or_write(plan, destination, worker, write, look=look, overwrite=overwrite, progress=progress)
    return finished(plan, report, dst, time.monotonic() - begin)


def _written(plan: Plan, stage: Staging, engine: Engine, progress: Progress) -> dict[str, Finished]:
    """What the parts noted of their shards; every file is what was noted.

    Raises:
        DestinationError: some are not finished.
    """
    found = find_finished(
        plan.shards,
        stage.out,
        fingerprint=plan.fingerprint,
        state=stage.state,
        engine=engine,
        progress=lambda n: progress("check", n, plan.write_bytes),
    )
    missing = [f"{name} ({why})" for name, why in found.items() if isinstance(why, str)]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise GuidedError(
            f"{stage.state}: {len(missing)} of {len(plan.shards)} shards are not finished: {shown}; "
            "run their parts (--shards i/n) again, then --finish"
        )
    return {name: shard for name, shard in found.items() if isinstance(shard, Finished)}
