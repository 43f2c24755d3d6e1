"""Let a conversion die, or the system fail it, at every call that changes a file; see what is left.

    python tests/attacks/faults.py [--points N | --all] [--random N] [--seed S] [--jobs J] [--json FILE]
    python tests/attacks/faults.py --only "overwrite:31:kill-after"

DST must be absent or complete (with `overwrite`: the old one or the new one), the source untouched, an error one of
fp4cast's own; running again must end in the bytes of an undisturbed run, and leave nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in the place of a script's own directory

from attacks.fault_points import (
    ANYTIME,
    KINDS,
    MEGABYTES,
    Point,
    Result,
    Server,
    Unavailable,
    anytime,
    attempt_all,
    sample,
    servers,
)
from attacks.fault_scenarios import LARGE, SCENARIOS

Counts = dict[str, Counter[str]]


def count(results: Iterable[Result]) -> tuple[Counts, Counts]:
    """(points, broken points) by scenario, by kind."""
    points: Counts = {}
    broken: Counts = {}
    for result in results:
        scenario, _, kind = result.point
        points.setdefault(scenario, Counter())[kind] += 1
        broken.setdefault(scenario, Counter())[kind] += bool(result.broken)
    return points, broken


def table(points: Counts, broken: Counts) -> Table:
    """Scenarios by kinds: the points, and how many of them are broken."""
    kinds = [kind for kind in (*KINDS, ANYTIME) if any(kind in row for row in points.values())]
    made = Table(title="points, and how many of them are broken")
    made.add_column("scenario")
    for kind in [*kinds, "all"]:
        made.add_column(kind.replace("-", "\n"), justify="right")
    for scenario, row in points.items():
        cells = [(row[kind], broken[scenario][kind]) for kind in kinds]
        cells.append((row.total(), broken[scenario].total()))
        made.add_row(scenario, *(f"{n}, [red]{bad}[/]" if bad else str(n or "") for n, bad in cells))
    return made


def machine() -> dict[str, str]:
    """Where and with what it ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "fp4cast": version("fp4cast"),
    }


def outcomes(results: Iterable[Result]) -> dict[str, int]:
    """How the runs that met a fault ended, and what they left that a user sees."""
    ends = Counter(result.found["how"] for result in results)
    ends["refused, although DST is complete"] = sum(
        result.found["how"] == "refused" and result.found["complete"] for result in results
    )
    ends["done, and something is left beside DST"] = sum(
        result.found["how"] == "done" and bool(result.found["left"]) for result in results
    )
    return dict(ends)


def figures(results: Sequence[Result], seconds: float, seed: int) -> dict[str, Any]:
    """What `--json` writes."""
    points, broken = count(results)
    return {
        "attack": "faults",
        "machine": machine(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "points": sum(row.total() for row in points.values()),
        "broken": sum(row.total() for row in broken.values()),
        "outcomes": outcomes(results),
        "by_scenario": {scenario: dict(row) for scenario, row in points.items()},
        "findings": [{"point": str(r.point), "at": r.at, "broken": r.broken} for r in results if r.broken],
    }


def chosen(server: Server, args: argparse.Namespace) -> list[Point]:
    """The points that the options ask for."""
    if args.only:
        return [Point.parse(text) for text in args.only]
    points = [point for name in args.scenario or SCENARIOS for point in server.points(name, args.kind or KINDS)]
    return sample(points, len(points) if args.all else args.points, args.seed) + anytime(
        list(LARGE), args.random, args.seed
    )


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--points", type=int, default=1000, help="how many, evenly spread (1000)")
    made.add_argument("--all", action="store_true", help="every point; there are about 16,000")
    made.add_argument("--random", type=int, default=20, help="kills of a larger conversion at random times (20)")
    made.add_argument("--megabytes", type=int, default=MEGABYTES, help=f"size of the larger one ({MEGABYTES})")
    made.add_argument("--scenario", action="append", choices=SCENARIOS, help="only this one; may be repeated")
    made.add_argument("--kind", action="append", choices=KINDS, help="only this fault; may be repeated")
    made.add_argument("--only", action="append", metavar="SCENARIO:N:KIND", help="one point; may be repeated")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--jobs", type=int, default=1, help="processes, each with its own points (1)")
    made.add_argument("--dir", type=Path, help="where to work")
    made.add_argument("--json", type=Path, help="write the figures there")
    return made.parse_args()


def main() -> int:
    args, begin, console = parse(), time.monotonic(), Console(width=max(160, Console().width), highlight=False)
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="fp4cast-faults-", dir=args.dir) as work,
        servers(Path(work), args.jobs, args.megabytes) as workers,
    ):
        points, people = chosen(workers[0], args), Console(stderr=True)
        for result in track(attempt_all(workers, points), "points", len(points), console=people, transient=True):
            results.append(result)
            if result.broken or args.only:
                print(result, flush=True)
            if args.only:
                print(f"  {result.found['how']}: {result.found['said']}\n  beside DST: {result.found['left']}")
    made = figures(results, time.monotonic() - begin, args.seed)
    console.print(table(*count(results)))
    for how, number in made["outcomes"].items():
        console.print(f"{number:6d} {how}")
    console.print(f"{made['points']} points, {made['broken']} broken, {made['seconds']} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(made, indent=1) + "\n")
    return int(made["broken"] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unavailable as error:
        sys.exit(f"faults.py: {error}")
