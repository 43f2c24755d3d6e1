"""The process that meets the faults: it imports fp4cast once and forks a child for each point.

It runs with faults.c preloaded. Every line of its input is a request, every line of its output the answer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attacks.fault_child import CPU_SECONDS, WALL_SECONDS, Ended, Tree, in_child, preloaded, tree
from attacks.fault_scenarios import LARGE, SCENARIOS, Scenario, make_source

KILLS = {1, 2, 3}  # of the kinds in faults.c
PARTS = 1000  # a time is a number of thousandths of an undisturbed run


@dataclass
class Stage:
    """A scenario, what it starts from, and how it must end.

    Attributes:
        scenario: the scenario.
        source: SRC.
        kept: a copy of what lies beside DST before.
        here: the directory of DST.
        library: faults.c.
    """

    scenario: Scenario
    source: Path
    kept: Path
    here: Path
    library: Any
    untouched: Tree = field(init=False)

    def __post_init__(self) -> None:
        self.untouched = tree(self.source)
        self._empty()
        if self.scenario.before:
            self._child(lambda: self.scenario.before(self.scenario, self.source, self.dst))  # type: ignore[misc]
        shutil.copytree(self.here, self.kept, symlinks=True)

    @property
    def dst(self) -> Path:
        return self.here / "dst"

    @property
    def state(self) -> Path:
        return self.here / ".dst.fp4cast"

    @cached_property
    def older(self) -> Tree:
        """What lies at DST before, or has been moved aside."""
        return tree(self.kept / "dst") or tree(self.kept / ".dst.fp4cast" / "old")

    @cached_property
    def reference(self) -> tuple[Tree, list[list[Any]], float]:
        """(what DST becomes undisturbed, the calls: name, 0 or whether it counts bytes, path; seconds)."""
        self.reset()
        ended = self._child(self._trace)
        new = tree(self.dst)
        if ended.how != "done" or not new or self.stray():
            raise RuntimeError(f"an undisturbed run: {ended}; left {self.stray()}")
        return new, json.loads(ended.said), ended.seconds

    def _trace(self) -> str:
        self.library.fault_watch(os.fsencode(self.here))
        self.scenario.run(self.source, self.dst)
        last = self.library.fault_count() + 1
        name, counts, path = self.library.fault_name, self.library.fault_counts, self.library.fault_path
        return json.dumps([[name(n).decode(), counts(n), path(n).decode()] for n in range(1, last)])

    def _child(self, work: Callable[[], Any], **extra: Any) -> Ended:
        """Large conversions may take longer."""
        return in_child(work, WALL_SECONDS if self.scenario.source == "large" else CPU_SECONDS, **extra)

    def _empty(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()

    def reset(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.kept, self.here, symlinks=True)

    def stray(self) -> list[str]:
        """What lies beside DST."""
        return sorted(path.name for path in self.here.iterdir() if path != self.dst)

    def meet(self, call: int, fault: tuple[int, int, int]) -> Ended:
        """Run with the fault at a call."""

        def work() -> None:
            self.library.fault_watch(os.fsencode(self.here))
            self.library.fault_arm(call, *fault)
            self.scenario.run(self.source, self.dst)

        self.reset()
        return self._child(work)

    def kill(self, part: int) -> Ended:
        """Run, and be killed at some thousandth of the time."""
        self.reset()
        return self._child(
            lambda: self.scenario.run(self.source, self.dst), kill_after=self.reference[2] * part / PARTS
        )

    def again(self) -> Ended:
        """Run once more without a fault."""
        return self._child(lambda: self.scenario.again(self.source, self.dst))

    # --- what must hold ---

    def broken(self, ended: Ended) -> Iterator[str]:
        """What must not be so after the fault."""
        new, now = self.reference[0], tree(self.dst)
        if ended.how == "raised":
            yield f"raised {ended.said}"
        if ended.how == "hangs":
            yield "did not end"
        if ended.how == "done" and now != new:
            yield f"said that it succeeded, but DST is {self._describe(now)}"
        elif now not in (new, self.older) and not self._aside(now):
            yield f"DST is {self._describe(now)}"
        if tree(self.source) != self.untouched:
            yield "the source has changed"
        leaving = re.compile(re.escape(self.state.name) + r"(\.[0-9a-f]{8})?")  # renamed while it is removed
        if others := [name for name in self.stray() if not leaving.fullmatch(name)]:
            yield f"left {', '.join(sorted(others))}"
        out = tree(self.state / "out")
        if "config.json" in out and out not in (new, self.older) and now != new:
            yield f"an engine would load {self.state.name}/out, which is {self._describe(out)}"

    def broken_after(self, ended: Ended) -> Iterator[str]:
        """What must not be so after the next run."""
        new, now = self.reference[0], tree(self.dst)
        if now != new:
            yield f"run again: DST is {self._describe(now)}"
        if tree(self.source) != self.untouched:
            yield "run again: the source has changed"
        if ended.how == "done" and self.stray():
            yield f"run again: left {', '.join(self.stray())}"
        if ended.how != "done":
            yield f"run again: {ended.how}: {ended.said}"

    def _aside(self, now: Tree) -> bool:
        """Whether the older DST lies aside, where no exchange exists: the next run puts it back."""
        moved = any(name.startswith("rename") and path.endswith("/old") for name, _, path in self.reference[1])
        return moved and not now and tree(self.state / "old") == self.older

    def _describe(self, now: Tree) -> str:
        if not now:
            return "absent, and there was one" if self.older else "absent"
        new = self.reference[0]
        missing = [f"no {name}" for name in new if name not in now]
        other = [f"another {name}" for name in new if name in now and now[name] != new[name]]
        return f"neither absent nor complete: {', '.join([*missing, *other, *sorted(now.keys() - new)])[:500]}"


class World:
    """The scenarios below one directory; each is made when it is first asked for."""

    def __init__(self, work: Path, megabytes: int) -> None:
        self.work, self.megabytes = work, megabytes
        self.library = preloaded()
        self.stages: dict[str, Stage] = {}
        SCENARIOS["fresh"].run(self._source("dense"), self.work / "warm")  # what is imported late, once for all forks

    @classmethod
    def open(cls) -> World:
        """The one that the command line names: a directory, and the megabytes of the larger source."""
        return cls(Path(sys.argv[1]).resolve(), int(sys.argv[2]))

    def stage(self, name: str) -> Stage:
        if name not in self.stages:
            scenario = (SCENARIOS | LARGE)[name]
            source = self._source(scenario.source)
            (self.work / "kept").mkdir(exist_ok=True)
            kept = self.work / "kept" / name
            self.stages[name] = Stage(scenario, source, kept, self.work / "here", self.library)
        return self.stages[name]

    def _source(self, kind: str) -> Path:
        path = self.work / "sources" / kind
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            make_source(kind, path, self.megabytes)
        return path

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The calls of a scenario, or what became of it at a point."""
        stage = self.stage(request["scenario"])
        if "call" not in request:
            return {"calls": stage.reference[1]}
        stage.reference  # noqa: B018, made before the point's own files
        call, fault = request["call"], request["fault"]
        ended = stage.meet(call, fault) if fault else stage.kill(call)
        broken = list(stage.broken(ended))
        if fault and fault[0] in KILLS and ended.how == "done" and stage.scenario.options.get("jobs", 1) == 1:
            broken.append("the call that was to kill it was not made")
        left, complete = stage.stray(), tree(stage.dst) == stage.reference[0]
        after = stage.again()
        broken += stage.broken_after(after)
        return {
            "how": ended.how,
            "said": ended.said,
            "left": left,
            "complete": complete,
            "broken": broken,
        }


def serve(world: World) -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(world.answer(json.loads(line))) + "\n")
        sys.stdout.flush()
