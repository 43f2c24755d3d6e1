"""Compare a shard that has just been written: a task as data, for any engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import read_header
from fp4cast.conversion.execute import Finished
from fp4cast.formats import Activations
from fp4cast.layouts.layout import Form, Selection
from fp4cast.parallel.workers import Workers
from fp4cast.verification.shard_check import ShardFindings, ShardWork, check_shard
from fp4cast.verification.work import compare_work

Compared = list[tuple[ShardWork, ShardFindings]]


@dataclass(frozen=True)
class CompareShard:
    """Compare what a shard holds with its source, as far as both parts of a tensor lie in it.

    Attributes:
        out: the directory of the destination's shards.
        file: the shard's name.
        form: how it stores a weight.
        activations: "w4a16" or "w4a4".
        part: what of the source is compared with it.
    """

    out: Path
    file: str
    form: Form
    activations: Activations
    part: Selection

    def __call__(self, finished: Finished, pool: Workers) -> Compared:
        """What was compared, and what was found."""
        written = read_header(self.out / self.file)
        destination = Checkpoint(self.out, {}, {self.file: written})
        rounded = [module for module, tally in finished.tallies.items() if tally.rounded]
        todo = compare_work(destination, self.form, self.activations, self.part, rounded)
        return [(work, check_shard(work, pool)) for work in todo]
