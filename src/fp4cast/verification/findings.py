"""The findings of comparisons that were made before the whole was there, by what was compared."""

from __future__ import annotations

from fp4cast.checkpoints.header import Tensor
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.fp8_blocks import Fp8Comparison, Fp8Weight
from fp4cast.verification.shard_check import ShardFindings, ShardWork, StoredScales, check_shard
from fp4cast.verification.values import Comparison


class Findings:
    """What was found so far."""

    def __init__(self) -> None:
        self._converted: dict[str, tuple[Converted, Comparison | None, StoredScales]] = {}
        self._copies: dict[str, tuple[tuple[Tensor, Tensor], int | None]] = {}
        self._fp8: dict[str, tuple[Fp8Weight, Fp8Comparison]] = {}

    def add(self, work: ShardWork, findings: ShardFindings) -> None:
        """Add the findings of some work."""
        for each, comparison, scales in zip(work.converted, findings.comparisons, findings.scales, strict=True):
            self._converted[each.codes.name] = each, comparison, scales
        for copy, at in zip(work.copies, findings.copies, strict=True):
            self._copies[copy[1].name] = copy, at
        for weight, measured in zip(work.fp8, findings.fp8, strict=True):
            self._fp8[weight.module] = weight, measured

    def of(self, todo: list[ShardWork], engine: Engine, progress: Advance) -> list[ShardFindings]:
        """The findings of some work, in its order; what was never compared, just so, is compared now."""
        rest = [left for work in todo if (left := self._without(work)).converted or left.copies or left.fp8]
        found = engine.map(check_shard, rest, progress, nbytes=lambda work: work.nbytes)
        for left, findings in zip(rest, found, strict=True):
            self.add(left, findings)
        return [
            ShardFindings(
                [self._converted[each.codes.name][1] for each in work.converted],
                [self._converted[each.codes.name][2] for each in work.converted],
                [self._copies[copy[1].name][1] for copy in work.copies],
                [self._fp8[weight.module][1] for weight in work.fp8],
            )
            for work in todo
        ]

    def _without(self, work: ShardWork) -> ShardWork:
        """The part of some work that has no findings: names, types, places and what is expected must be the same."""
        known, copied, measured = self._converted, self._copies, self._fp8
        return ShardWork(
            [each for each in work.converted if known.get(each.codes.name, (None,))[0] != each],
            [copy for copy in work.copies if copied.get(copy[1].name, (None,))[0] != copy],
            [weight for weight in work.fp8 if measured.get(weight.module, (None,))[0] != weight],
        )
