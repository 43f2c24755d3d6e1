"""In which order a conversion needs the source's shards, and when it needs each for the last time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fp4cast.conversion.fp8_blocks import Fp8Of
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.recipe import BlockScalesOf, CodesOf, CopyOf, OutputShard

Group = frozenset[str]  # the shards that hold both parts of some pairs, or one shard; the same names on both sides


@dataclass(frozen=True)
class Turn:
    """What is done with one shard of the destination.

    Attributes:
        shard: the shard.
        write: it is not finished.
        checks: the groups that can be compared once it is written.
        needs: the names of the source's shards that this takes.
    """

    shard: OutputShard
    write: bool
    checks: tuple[Group, ...]
    needs: frozenset[str]


@dataclass(frozen=True)
class Schedule:
    """All turns, in their order.

    Attributes:
        turns: those that have something to do.
        sizes: bytes of the source's shards.
    """

    turns: Sequence[Turn]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan, finished: Collection[str], compared: Collection[Group] | None) -> Schedule:
        """The schedule of a plan.

        Args:
            plan: the plan.
            finished: shards of the destination that are written.
            compared: groups that have been compared; None if none shall be.
        """
        files = [shard.file for shard in plan.shards]
        ready: dict[str, list[Group]] = {file: [] for file in files}
        if compared is not None:
            place = {file: number for number, file in enumerate(files)}
            for group in sorted(groups(plan), key=sorted):
                if group not in compared:
                    ready[max(group, key=place.__getitem__)].append(group)
        turns = [_turn(shard, shard.file not in finished, ready[shard.file]) for shard in plan.shards]
        sizes = {file: shard.size for file, shard in plan.source.checkpoint.shards.items()}
        return cls([turn for turn in turns if turn.write or turn.checks], sizes)

    @cached_property
    def order(self) -> list[str]:
        """The source's shards in the order in which they are needed."""
        return list(dict.fromkeys(file for turn in self.turns for file in sorted(turn.needs)))

    @cached_property
    def last(self) -> dict[str, int]:
        """The number of the turn after which a shard of the source is not needed any more."""
        return {file: number for number, turn in enumerate(self.turns) for file in turn.needs}

    @property
    def most_held(self) -> int:
        """Bytes of the source's shards that must be there together, at most."""
        first: dict[str, int] = {}
        for number, turn in enumerate(self.turns):
            for file in turn.needs:
                first.setdefault(file, number)
        return max(
            (
                sum(self.sizes[file] for file in self.order if first[file] <= number <= self.last[file])
                for number in range(len(self.turns))
            ),
            default=0,
        )


def groups(plan: Plan) -> set[Group]:
    """Every shard, and the shards of every pair whose codes lie in one and whose scales in another."""
    pairs = {frozenset((pair.codes.path.name, pair.scales.path.name)) for pair in plan.selection.cast}
    return pairs | {frozenset((shard.file,)) for shard in plan.shards}


def _turn(shard: OutputShard, write: bool, checks: Sequence[Group]) -> Turn:
    needs = frozenset(_sources(shard)) if write else frozenset()
    return Turn(shard, write, tuple(checks), needs.union(*checks))


def _sources(shard: OutputShard) -> Iterator[str]:
    """The names of the source's shards that a shard is made of."""
    for output in shard.outputs:
        match output.step:
            case CopyOf(path):
                yield path.name
            case CodesOf(pair) | BlockScalesOf(pair):
                yield pair.codes.path.name
                yield pair.scales.path.name
            case Fp8Of(weight=weight):
                yield weight.path.name
