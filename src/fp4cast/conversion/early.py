"""Compare each shard as soon as it is written, while its pages and the source's are in memory.

The verifier reads the written file, and judges the whole in the end: it opens both sides by itself and asks for the
findings of all that it would compare; what has none is compared then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from fp4cast.checkpoints.header import Tensor
from fp4cast.conversion.compare_shard import Compared, CompareShard
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.recipe import OutputShard
from fp4cast.conversion.staging import Staging
from fp4cast.families.family import Pair
from fp4cast.layouts.layout import Selection
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance, AdvanceOf
from fp4cast.verification.findings import Findings
from fp4cast.verification.opened import open_both
from fp4cast.verification.report import Report
from fp4cast.verification.verify import judge


class Early:
    """The comparison of a conversion that is being written; see `execute.Follow`.

    Args:
        plan: its plan.
        stage: its working directory.
        engine: compares in the end what was not compared before.
        progress: called with (bytes just read, total bytes).
    """

    def __init__(self, plan: Plan, stage: Staging, engine: Engine, progress: AdvanceOf) -> None:
        self._plan, self._stage, self._engine = plan, stage, engine
        total = plan.compare_bytes
        self.advance: Advance = lambda nbytes: progress(nbytes, total)
        self._parts, self._findings = _parts(plan), Findings()

    @classmethod
    def of(cls, plan: Plan, stage: Staging, engine: Engine, progress: AdvanceOf) -> Early | None:
        """None on the way back, whose sides are compared by the NVFP4 shards."""
        return cls(plan, stage, engine, progress) if plan.back is None else None

    def task(self, shard: OutputShard) -> CompareShard:
        """Compare what a shard holds."""
        target = self._plan.target
        return CompareShard(self._stage.out, shard.file, target.form, target.activations, self._parts[shard.file])

    def take(self, result: Compared) -> None:
        """Take what was found."""
        for work, findings in result:
            self._findings.add(work, findings)

    def judge(self) -> Report:
        """Judge the whole destination."""
        begin = time.monotonic()
        opened = open_both(self._plan.source.checkpoint.path, self._stage.out, self._stage.config)
        return judge(opened, lambda todo: self._findings.of(todo, self._engine, self.advance), strict=True, begin=begin)


def _parts(plan: Plan) -> Mapping[str, Selection]:
    """What of the source is compared with each shard: what has its codes, or itself, there."""
    place = {output.name: shard.file for shard in plan.shards for output in shard.outputs}
    cast: dict[str, list[Pair]] = {shard.file: [] for shard in plan.shards}
    untouched: dict[str, list[Tensor]] = {shard.file: [] for shard in plan.shards}
    fp8: dict[str, dict[str, Tensor]] = {shard.file: {} for shard in plan.shards}
    for pair in plan.selection.cast:
        cast[place[plan.target.names(pair.module).codes]].append(pair)
    for tensor in plan.selection.untouched:
        untouched[place[tensor.name]].append(tensor)
    for module, tensor in plan.selection.fp8.items():
        fp8[place[tensor.name]][module] = tensor
    return {file: Selection(cast[file], frozenset(), untouched[file], fp8=fp8[file]) for file in cast}
