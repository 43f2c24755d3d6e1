"""Notes of what was compared while its source was there, so that a later run need not download that again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.byte_ranges import write_whole
from fp4cast.conversion.execute import Finished
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.schedule import Group, groups
from fp4cast.layouts.layout import Selection
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Advance
from fp4cast.verification.piecewise import Piecewise
from fp4cast.verification.receipt import is_sealed, sealed


class Notes:
    """The findings of a streamed conversion, and their notes.

    A note holds for the very bytes that were compared: it names the checksums of the destination's shards.

    Attributes:
        findings: what was found.
    """

    def __init__(self, state: Path, fingerprint: str) -> None:
        self.findings = Piecewise()
        self._state, self._fingerprint = state, fingerprint

    def load(self, plan: Plan, finished: Mapping[str, Finished]) -> set[Group]:
        """Take up the notes of an earlier run; returns the groups that need no comparison any more."""
        return {group for group in groups(plan) if group <= finished.keys() and self._take_up(group, finished)}

    def _take_up(self, group: Group, finished: Mapping[str, Finished]) -> bool:
        try:
            note = json.loads(self._path(group).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(note, dict) or not is_sealed(note) or note.get("holds") != self._holds(group, finished):
            return False
        self.findings.found |= note["found"]
        return True

    def compare(
        self,
        plan: Plan,
        out: Path,
        group: Group,
        finished: Mapping[str, Finished],
        rounded: Collection[str],
        engine: Engine,
        progress: Advance,
    ) -> None:
        """Compare all that lies within a group of shards, and note it.

        Args:
            plan: the plan.
            out: the destination's shards.
            group: the names of those that are compared; the source's of the same names are there, too.
            finished: what is known of the destination's shards.
            rounded: see `Piecewise.compare`.
            engine: runs the comparison.
            progress: called with the number of bytes just read.

        Raises:
            VerificationError: something differs.
        """
        found = self.findings.compare(
            plan.target,
            _within(plan.selection, group),
            [out / file for file in sorted(group)],
            rounded=rounded,
            engine=engine,
            progress=progress,
        )
        note = sealed({"holds": self._holds(group, finished), "found": found})
        write_whole(self._path(group), json.dumps(note).encode())

    def _holds(self, group: Group, finished: Mapping[str, Finished]) -> dict[str, Any]:
        shards = {file: list(finished[file].checksum) for file in sorted(group)}
        return {"plan": self._fingerprint, "shards": shards}

    def _path(self, group: Group) -> Path:
        digest = hashlib.blake2b("\0".join(sorted(group)).encode(), digest_size=8).hexdigest()
        return self._state / f"{digest}.compared"


def _within(selection: Selection, group: Group) -> Selection:
    """What of a selection lies within some of the source's shards."""
    cast = [pair for pair in selection.cast if {pair.codes.path.name, pair.scales.path.name} <= group]
    fp8 = {module: weight for module, weight in selection.fp8.items() if weight.path.name in group}
    untouched = [tensor for tensor in selection.untouched if tensor.path.name in group]
    return Selection(cast, selection.replaced, untouched, fp8=fp8)
