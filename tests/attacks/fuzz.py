"""Fuzz `inspect`, `verify` and `convert`: every outcome is a success, or an error that names the file.

    python tests/attacks/fuzz.py --inputs 1000000 --seed 0 --jobs 2 [--only SEED:NUMBER] [--json FILE]

Each input is a small checkpoint with a few things wrong in it, made from the seed and its number alone: `--only` runs
one of them again and says what was done to it. Exits with 1 if there are findings; see
`attacks.judge` for what they are. A late refusal is none: the error is right, but the shards had been written.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a program: `attacks` lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from attacks.campaign import LIMITS, Figures, judge_apart, run
from attacks.mutate import SHARES, make_input


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", metavar="SEED:NUMBER", help="run this input alone, and say what it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    if arguments.only:
        return _only(console, *map(int, arguments.only.split(":")))
    begin = time.monotonic()
    figures = _run(arguments.seed, arguments.inputs, arguments.jobs)
    seconds = time.monotonic() - begin
    _show(console, figures, arguments.seed, seconds)
    if arguments.json:
        document = _document(figures, arguments.seed, arguments.jobs, seconds)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if figures.findings else 0


def _run(seed: int, inputs: int, jobs: int) -> Figures:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=inputs)
        return run(
            seed,
            range(inputs),
            jobs,
            lambda figures: bar.update(task, completed=figures.inputs, description=f"{len(figures.findings)} findings"),
        )


def _only(console: Console, seed: int, number: int) -> int:
    made = make_input(seed, number)
    console.print(f"{made.command} {made.start.name} {made.options or ''}", markup=False)
    for step in made.steps:
        console.print(f"  {step}", markup=False)
    outcome = judge_apart(made)
    console.print(f"{outcome.kind}: {outcome.label}\n{outcome.detail}", markup=False)
    return 1 if outcome.kind == "finding" else 0


def _by_command(figures: Figures) -> dict[str, dict[str, Any]]:
    """The outcomes of each command by kind, and the refusals by class."""
    rows: dict[str, dict[str, Any]] = {}
    for command in (*SHARES, "harness"):
        mine = {key[1:]: count for key, count in sorted(figures.outcomes.items()) if key[0] == command}
        if command == "harness" and not mine:
            continue
        rows[command] = {
            "inputs": sum(mine.values()),
            "successes": {label: count for (kind, label), count in mine.items() if kind == "success"},
            "refusals": {label: count for (kind, label), count in mine.items() if kind == "refusal"},
            "findings": sum(count for (kind, _), count in mine.items() if kind == "finding"),
        }
    return rows


def _show(console: Console, figures: Figures, seed: int, seconds: float) -> None:
    table = Table("command", "inputs", "successes", "refusals", "findings", title=f"seed {seed}")
    for command, row in _by_command(figures).items():
        counts = (_lines(row["successes"]), _lines(row["refusals"]))
        table.add_row(command, f"{row['inputs']:,}", *counts, f"{row['findings']:,}", end_section=True)
    console.print(table)
    slowest, number, command = figures.slowest
    console.print(
        f"{figures.inputs:,} inputs in {seconds:.0f} s, {figures.inputs / seconds:.0f} a second; the slowest took "
        f"{slowest:.2f} s ({command}, --only {seed}:{number}); largest resident set {figures.rss_bytes / 1e6:.0f} MB",
        soft_wrap=True,
    )
    for style, what, found in (("yellow", "late refusal, ", figures.late), ("bold red", "", figures.findings)):
        for each in sorted(found.values(), key=lambda each: -each.count):
            console.print(
                f"[{style}]{each.count}x {what}{each.command}:[/] {escape(ascii(each.label))}", soft_wrap=True
            )
            console.print(f"  --only {seed}:{each.number}  {each.detail!a}", markup=False, soft_wrap=True)


def _lines(counts: dict[str, int]) -> str:
    return "\n".join(f"{count:,} {label}" for label, count in counts.items())


def _document(figures: Figures, seed: int, jobs: int, seconds: float) -> dict[str, Any]:
    slowest, number, command = figures.slowest
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "seed": seed,
        "jobs": jobs,
        "inputs": figures.inputs,
        "seconds": round(seconds, 1),
        "per_second": round(figures.inputs / seconds),
        "limits": LIMITS,
        "commands": _by_command(figures),
        "findings": [asdict(finding) for finding in figures.findings.values()],
        "late_refusals": [asdict(finding) for finding in figures.late.values()],
        "slowest": {"seconds": round(slowest, 3), "number": number, "command": command},
        "rss_bytes": figures.rss_bytes,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
