"""Claim: where each read waits, as on a network, conversion and verification wait less than `cp -r` and `cat`.

    python benchmarks/disks.py [--latency 1 8] [--gb 0.25] [--jobs 1 2 8 16] [--dir DIR] [--repeat 2] [CASE ...]

SRC, and for verification DST, lie on a FUSE file system of our own (tests/fuse_server.py, which needs root), in front
of a directory in the page cache: each read of at most 128 kB, all that the kernel asks for there, takes so many
milliseconds, any number at the same time. The claim is about --latency 8 or more: with less, on a few hundred
megabytes, the start of Python counts for more than waiting.
`bytes read` are those that the server was asked for, over the size of SRC, or of both sides.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import CASES, make
from common import FP4CAST, Sample, alternate, apart, claim, finish, parser, scratch, summary, timed, verified
from host import files, forget, machine, need, size

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fuse import Fuse, served

SECONDS = 1200  # a file system lives no longer
LIMIT, CLAIMED = 1.0, 8  # x ceiling, from so many milliseconds on


def options(doc: str | None) -> argparse.Namespace:
    made = parser(doc, repeat=2)
    made.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; the first two when none is given"
    )
    made.add_argument("--latency", type=float, nargs="+", default=[1, 8], help="milliseconds of each read")
    made.add_argument("--gb", type=float, default=0.25, help="of DeepSeek-V4-Flash and Kimi-K3; gpt-oss has a layer")
    made.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 8, 16])
    args = made.parse_args()
    args.cases = args.cases or list(CASES)[:2]
    if unknown := set(args.cases) - set(CASES):
        made.error(f"unknown case {', '.join(unknown)}")
    return args


class Disk:
    """The file system, with what its server was asked for by each work."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.read: dict[str, list[int]] = {}

    def timed(self, work: str, command: tuple[str, ...], *sides: Path) -> Sample:
        """Time a command with nothing of both sides in the page cache."""
        forget(*sides)
        self.fuse.change()
        sample = timed(command)
        self.read.setdefault(work, []).append(self.fuse.change().get("bytes read", 0))
        return sample

    def rows(self, runs: dict[str, list[Sample]], nbytes: int) -> dict[str, Any]:
        """The figures of each work, beside the first."""
        base = next(iter(runs.values()))
        rows = {work: summary(samples, base, nbytes) for work, samples in runs.items()}
        for work, row in rows.items():
            row["read_ratio"] = statistics.median(self.read[work]) / nbytes
        return rows


def convert(disk: Disk, source: Path, destination: Path, more: tuple[str, ...], args: Any) -> dict[str, list[Sample]]:
    command = (*FP4CAST, "convert", str(source), str(destination), *more, "--json")

    def run(work: str, command: tuple[str, ...]) -> Sample:
        shutil.rmtree(destination, ignore_errors=True)
        return disk.timed(work, command, source)

    works: dict[str, Callable[[bool], Sample]] = {
        "cp -r": lambda _: run("cp -r", ("cp", "-r", str(source), str(destination)))
    }
    for jobs in args.jobs:
        work = f"convert --jobs {jobs}"
        plain = (*command, "--no-verify", "--no-sync", "--jobs", str(jobs))
        works[work] = lambda _, work=work, plain=plain: run(work, plain)  # type: ignore[misc]
    work = f"convert --jobs {args.jobs[-1]}, verified"
    works[work] = lambda _: run(work, (*command, "--no-sync", "--jobs", str(args.jobs[-1])))
    return alternate(args.repeat, works)


def verify(disk: Disk, source: Path, destination: Path, args: Any) -> dict[str, list[Sample]]:
    every = tuple(map(str, files(source, destination)))
    command = (*FP4CAST, "verify", str(source), str(destination), "--json")
    works: dict[str, Callable[[bool], Sample]] = {
        "cat": lambda _: disk.timed("cat", ("cat", *every), source, destination)
    }
    for jobs in args.jobs:
        work = f"verify --jobs {jobs}"
        each = (*command, "--jobs", str(jobs))
        works[work] = lambda _, work=work, each=each: disk.timed(work, each, source, destination)  # type: ignore[misc]
    return alternate(args.repeat, works)


def measure(case: str, latency: float, root: Path, args: Any) -> list[dict[str, Any]]:
    """Both sides of one case at one latency."""
    draft, behind, last = CASES[case](1, args.gb), root / "behind", args.jobs[-1]
    need(root, 2 * draft.nbytes + draft.converted_bytes)
    behind.mkdir()
    apart(make, behind / "src", case, 1, args.gb)
    with served(behind, root / "disk", seconds=SECONDS, latency=latency / 1000, keep=True) as fuse:
        disk, source, written = Disk(fuse), fuse.path / "src", root / "dst"
        nbytes = size(behind / "src")
        made = disk.rows(convert(disk, source, written, draft.options, args), nbytes)
        verified(source, written)
        shutil.move(written, behind / "dst")
        both = size(behind / "src", behind / "dst")
        seen = disk.rows(verify(disk, source, fuse.path / "dst", args), both)
    shutil.rmtree(behind)
    (root / "disk").rmdir()
    limit = LIMIT if latency >= CLAIMED else None
    where = {"case": f"{case}, {latency:g} ms", "cache": "cold"}
    return [
        where
        | {"bytes": nbytes, "ceiling": "cp -r", "rows": made}
        | {"claims": [claim(f"convert --jobs {last}", "seconds", "ratio", limit)]},
        where
        | {"bytes": both, "ceiling": "cat", "rows": seen}
        | {"claims": [claim(f"verify --jobs {last}", "seconds", "ratio", limit)]},
    ]


def main() -> None:
    args = options(__doc__)
    with scratch(args) as root:
        facts = machine(root)
        results = [
            each for case in args.cases for latency in args.latency for each in measure(case, latency, root, args)
        ]
    finish("disks", facts, results, args)


if __name__ == "__main__":
    main()
