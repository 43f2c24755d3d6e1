"""Bit rot: flip bits in every region of finished conversions, and tell larger lies; each must be found and named.

    python tests/attacks/flips.py --flips 10000 --seed 0 [--lies 2000] [--json FILE]

Every family in every layout, one conversion with rounded half-blocks and one with a tensor of zeros, and the same again
without the receipt, but for the rounded one, which it alone tells from damage. A change is found when `verify` fails or
refuses, and named when it says the tensor or the file. It is free when a note says that nothing pins those bytes
down: tensor scales of zeros, input scales without a receipt. Exits with 1 when a change is neither found nor free.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path

if __package__ in (None, ""):  # run as a program: `attacks` lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

import fp4cast
from attacks.lies import LIES
from attacks.rotten import Case, Span, make_cases, spans
from fp4cast.errors import Fp4CastError

Verify = Callable[..., fp4cast.Report]
VERIFY: Verify = partial(fp4cast.verify, strict=True, jobs=1)
BARE = " (no receipt)"


@dataclass
class Figures:
    """Counts by (case, region, outcome), where an outcome is found, unnamed, missed or free.

    Attributes:
        counts: the table.
        misses: sentences about the first misses.
    """

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    misses: list[str] = field(default_factory=list)

    def add(self, case: str, region: str, outcome: str, what: str) -> None:
        self.counts[case, region, outcome] += 1
        if outcome in ("missed", "unnamed") and len(self.misses) < 100:
            self.misses.append(f"{outcome}: {case}, {region}: {what}")

    def total(self, outcome: str | None = None, region: str | None = None, case: str | None = None) -> int:
        wanted = (case, region, outcome)
        return sum(n for key, n in self.counts.items() if all(w in (None, k) for w, k in zip(wanted, key, strict=True)))

    @property
    def failed(self) -> int:
        return self.total("missed") + self.total("unnamed")


def judge(source: Path, destination: Path, names: tuple[str, ...], free: str, verify: Verify) -> tuple[str, str]:
    """(outcome, what `verify` said) of a destination that was changed.

    Args:
        source: the MXFP4 checkpoint.
        destination: the changed NVFP4 one.
        names: the change is named when one of these is said.
        free: it may pass where a note says this; empty if it may not.
        verify: what to try.
    """
    try:
        report = verify(source, destination)
    except Fp4CastError as error:
        text = str(error)
    else:
        text = "\n".join(map(str, report.differences))
        if report.ok:
            return ("free", "") if free and any(free in note for note in report.notes) else ("missed", text)
    return ("found" if any(name in text for name in names) else "unnamed"), text[:300]


def flip(span: Span, bit: int) -> None:
    """Flip a bit of a span, in place; twice restores it."""
    with span.path.open("r+b") as file:
        file.seek(span.start + bit // 8)
        byte = file.read(1)[0]
        file.seek(span.start + bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def flips_of(case: Case) -> Iterator[tuple[str, Path, list[Span]]]:
    """(region, destination, its spans), with the receipt and without it."""
    for region, places in spans(case.source, case.destination).items():
        yield region, case.destination, places
    if not case.rounded:
        for region, places in spans(case.source, case.bare).items():
            yield region + BARE, case.bare, places


def flip_bits(cases: list[Case], flips: int, seed: int, figures: Figures, verify: Verify = VERIFY) -> None:
    """Flip `flips` bits, spread evenly over all regions of all cases."""
    todo = [(case, *each) for case in cases for each in flips_of(case)]
    rng = random.Random(seed)  # noqa: S311
    for number in range(flips):
        case, region, destination, places = todo[number % len(todo)]
        ends = list(accumulate(place.nbytes for place in places))
        at = rng.randrange(8 * ends[-1])
        which = bisect(ends, at // 8)
        span, bit = places[which], at - 8 * (ends[which] - places[which].nbytes)
        flip(span, bit)
        try:
            outcome, said = judge(case.source, destination, span.names, span.free, verify)
        finally:
            flip(span, bit)
        figures.add(case.name, region, outcome, f"bit {bit} of {span.names[0]} in {span.path.name}: {said}")


def tell_lies(cases: list[Case], lies: int, seed: int, figures: Figures, verify: Verify = VERIFY) -> None:
    """Tell `lies` lies about whole tensors, headers and configs, with and without the receipt in turn."""
    rng = random.Random(seed)  # noqa: S311
    todo = [(case, path, name) for case in cases for path in case.directories for name in LIES]
    for number in range(lies):
        case, path, name = todo[number % len(todo)]
        with tempfile.TemporaryDirectory(dir=case.source.parent) as scratch:
            copy = shutil.copytree(path, Path(scratch, "dst"))
            told = LIES[name](rng, copy)
            if told.names:
                outcome, said = judge(case.source, copy, *told, verify)
                region = f"lie: {name}" + (BARE if path == case.bare else "")
                figures.add(case.name, region, outcome, f"{told.names}: {said}")


def show(console: Console, figures: Figures, seconds: float) -> None:
    """A table of cases by regions: how many flips, and how many were missed."""
    cases, regions = (list(dict.fromkeys(key[i] for key in figures.counts)) for i in (0, 1))
    table = Table("region", "flips", "found", "free", "unnamed", "missed", title="bit rot")
    for region in regions:
        counts = [figures.total(outcome, region) for outcome in (None, "found", "free", "unnamed", "missed")]
        table.add_row(region, *(f"{n:,}" for n in counts), style="bold red" if counts[3] + counts[4] else None)
    console.print(table)
    table = Table("case", "flips", "missed")
    for case in cases:
        failed = figures.total("missed", case=case) + figures.total("unnamed", case=case)
        table.add_row(case, f"{figures.total(case=case):,}", f"{failed:,}", style="bold red" if failed else None)
    console.print(table)
    for miss in figures.misses:
        console.print(miss, markup=False, soft_wrap=True)
    console.print(f"{figures.total():,} changes in {seconds:.0f} s, {figures.failed} not found and named")


def document(figures: Figures, seed: int, seconds: float) -> dict[str, object]:
    """The figures as JSON: by region and by conversion, how many changes, and how many were missed or free."""
    tables: list[dict[str, dict[str, int]]] = [{}, {}]
    for (case, region, outcome), count in sorted(figures.counts.items()):
        for table, key in zip(tables, (region, case), strict=True):
            row = table.setdefault(key, {"changes": 0, "missed": 0, "free": 0})
            row["changes"] += count
            row["missed"] += count if outcome in ("missed", "unnamed") else 0
            row["free"] += count if outcome == "free" else 0
    totals = {"changes": figures.total(), "free": figures.total("free"), "missed": figures.failed}
    date = datetime.now(UTC).date().isoformat()
    return {
        "date": date,
        "seed": seed,
        "seconds": round(seconds, 1),
        **totals,
        "regions": tables[0],
        "conversions": tables[1],
        "misses": figures.misses,
    }


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--lies", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    arguments = parser.parse_args()
    begin, figures = time.monotonic(), Figures()
    with tempfile.TemporaryDirectory() as scratch:
        cases = make_cases(Path(scratch))
        flip_bits(cases, arguments.flips, arguments.seed, figures)
        tell_lies(cases, arguments.lies, arguments.seed, figures)
    seconds = time.monotonic() - begin
    show(Console(highlight=False), figures, seconds)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document(figures, arguments.seed, seconds), indent=1) + "\n")
    return 1 if figures.failed else 0


if __name__ == "__main__":
    sys.exit(main())
