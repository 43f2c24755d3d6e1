"""Compare a destination piece by piece, while the source's shards come and go; judge it as a whole in the end.

A finding is filed under a digest of what was compared: both tensors with their names, types and places. The judgement
opens both sides by itself and asks for the findings of all that it would compare; one that is missing is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor, read_header
from fp4cast.errors import VerificationError
from fp4cast.layouts.layout import Selection, Target
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.fp8_blocks import Fp8Comparison, Fp8Weight, fp8_differences
from fp4cast.verification.rounding import Nearness
from fp4cast.verification.shard_check import ShardFindings, ShardWork, StoredScales, check_shard
from fp4cast.verification.values import Comparison
from fp4cast.verification.work import compare_work

Finding = dict[str, Any]


def key_of(compared: Converted | tuple[Tensor, Tensor] | Fp8Weight) -> str:
    """The name of a finding: a digest of what is compared with what."""
    return hashlib.blake2b(repr(compared).encode(), digest_size=16).hexdigest()


class Piecewise:
    """The findings so far.

    Attributes:
        found: by their keys, as JSON objects.
    """

    def __init__(self) -> None:
        self.found: dict[str, Finding] = {}

    def compare(
        self,
        target: Target,
        selection: Selection,
        written: Iterable[Path],
        *,
        rounded: Collection[str],
        engine: Engine,
        progress: Advance,
    ) -> dict[str, Finding]:
        """Compare all that lies within some shards of a destination and has not been compared.

        Args:
            target: how the destination is stored.
            selection: what may lie within these shards; the source's tensors lie on this machine.
            written: the shards of the destination.
            rounded: modules with half-blocks that were rounded on purpose.
            engine: runs the comparison.
            progress: called with the number of bytes just read.

        Returns:
            The new findings.

        Raises:
            VerificationError: something differs.
        """
        shards = {path.name: read_header(path) for path in written}
        path = next(iter(shards.values())).path.parent
        destination = Checkpoint(path, {}, shards)
        work = [
            self._new(each) for each in compare_work(destination, target.form, target.activations, selection, rounded)
        ]
        work = [each for each in work if each.converted or each.copies or each.fp8]
        new: dict[str, Finding] = {}
        for each, findings in zip(work, engine.map(check_shard, work, progress), strict=True):
            new |= _as_json(each, findings)
        self.found |= new
        return new

    def _new(self, work: ShardWork) -> ShardWork:
        return ShardWork(
            [converted for converted in work.converted if key_of(converted) not in self.found],
            [copy for copy in work.copies if key_of(copy) not in self.found],
            [weight for weight in work.fp8 if key_of(weight) not in self.found],
        )

    def __call__(self, todo: list[ShardWork]) -> list[ShardFindings]:
        """The findings of some work, in its order.

        Raises:
            VerificationError: some of it was not compared.
        """
        return [
            ShardFindings(
                [_comparison(self._finding(each, each.codes.name)) for each in work.converted],
                [StoredScales(*self._finding(each, each.codes.name)["scales"]) for each in work.converted],
                [self._finding(each, each[1].name)["differs"] for each in work.copies],
                [Fp8Comparison(**self._finding(each, each.codes.name)) for each in work.fp8],
            )
            for work in todo
        ]

    def _finding(self, compared: Converted | tuple[Tensor, Tensor] | Fp8Weight, name: str) -> Finding:
        found = self.found.get(key_of(compared))
        if found is None:
            raise VerificationError(f"{name}: was not compared while its source was there; run again with --restart")
        return found


def _as_json(work: ShardWork, findings: ShardFindings) -> dict[str, Finding]:
    new: dict[str, Finding] = {}
    for converted, comparison, scales in zip(work.converted, findings.comparisons, findings.scales, strict=True):
        wrong = comparison is None or comparison.invalid or (comparison.rounded and not converted.rounded)
        if wrong:
            raise VerificationError(
                f"{converted.codes.path}: {converted.codes.name}: holds other values than the source's "
                f"{converted.pair.module}; nothing was published. Run again with --restart."
            )
        new[key_of(converted)] = {
            "scales": list(scales),
            "comparison": None if comparison is None else asdict(comparison),
        }
    for copy, at in zip(work.copies, findings.copies, strict=True):
        if at is not None:
            raise VerificationError(
                f"{copy[1].path}: {copy[1].name}: differs from the source from byte {at} on; nothing was published. "
                "Run again with --restart."
            )
        new[key_of(copy)] = {"differs": None}
    for weight, measured in zip(work.fp8, findings.fp8, strict=True):
        for difference in fp8_differences(weight, measured):
            raise VerificationError(
                f"{weight.codes.path}: {difference}; nothing was published. Run again with --restart."
            )
        new[key_of(weight)] = asdict(measured)
    text = json.dumps(new, default=lambda number: number.item())  # NumPy's numbers
    found: dict[str, Finding] = json.loads(text)
    return found


def _comparison(finding: Finding) -> Comparison | None:
    if finding["comparison"] is None:
        return None
    nearness = finding["comparison"]["nearness"]
    return Comparison(**finding["comparison"] | {"nearness": None if nearness is None else Nearness(**nearness)})
