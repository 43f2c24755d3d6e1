"""Claim: many cores are used. convert and verify beside as many parallel copiers and readers of the same bytes.

    python benchmarks/cores.py [--dir DIR] [--repeat 1] [--workers 1,2,4,8,16] [--gb 20] [--json FILE] [CASE ...]

Cases are those of convert.py, in shards of 1.25 GB. For each number of workers every round times, in turn: N `cp` at a
time over the source's shards, N `cat` at a time over both sides', `convert --no-verify`, `verify` and `convert`, each
with --jobs N. Ceilings: the copiers for conversions, the readers for `verify`. Aims with 16 workers: 80 % of the copy
where codes keep their order, 60 % for gpt-oss, 80 % of the read.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from checkpoints import CASES, make
from common import FP4CAST, Sample, alternate, apart, claim, finish, parser, scratch, summary, timed, verified
from host import files, machine, need, size

SHARD_BYTES = 1.25e9
LAYER_BYTES = 0.573e9  # of gpt-oss-20b
MOST = 16  # the number of workers that has aims


def in_parallel(command: str, paths: list[Path], workers: int) -> Sample:
    """Run a command on each file, so many at a time."""
    names = "\\n".join(map(str, paths))
    return timed(("sh", "-c", f"printf '{names}\\n' | xargs -P {workers} -I @ {command}"))


def measure(case: str, root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    path, copied, made, kept = (root / name for name in ("src", "cp", "new", "dst"))
    layers = round(args.gb * 1e9 / LAYER_BYTES)
    draft = CASES[case](layers, args.gb)
    need(root, draft.nbytes + 2 * draft.converted_bytes)
    apart(make, path, case, layers, args.gb, SHARD_BYTES)
    convert = (*FP4CAST, "convert", str(path))
    timed((*convert, str(kept), *draft.options, "--no-verify", "--jobs", str(MOST)))
    verified(path, kept)
    results = [_with(workers, case, (path, copied, made, kept), draft.options, args) for workers in args.workers]
    for directory in (path, kept):
        shutil.rmtree(directory)
    return results


def _with(
    workers: int, case: str, places: tuple[Path, ...], options: tuple[str, ...], args: argparse.Namespace
) -> dict[str, Any]:
    path, copied, made, kept = places
    jobs = ("--jobs", str(workers))

    def copy(_: bool) -> Sample:
        copied.mkdir()
        sample = in_parallel(f"cp @ {copied}", files(path), workers)
        shutil.rmtree(copied)
        return sample

    def convert(*more: str) -> Sample:
        sample = timed((*FP4CAST, "convert", str(path), str(made), *options, *jobs, "--no-sync", *more))
        shutil.rmtree(made)
        return sample

    runs = alternate(
        args.repeat,
        {
            "parallel cp": copy,
            "parallel cat": lambda _: in_parallel("cat @ > /dev/null", files(path, kept), workers),
            "convert --no-verify": lambda _: convert("--no-verify"),
            "verify": lambda _: timed((*FP4CAST, "verify", str(path), str(kept), *jobs)),
            "convert": lambda _: convert(),
        },
    )
    both = size(path, kept)
    rows = {}
    for work, samples in runs.items():
        reads = work in ("parallel cat", "verify")
        base = runs["parallel cat" if reads else "parallel cp"]
        rows[work] = summary(samples, base, both if reads else size(path))
        rows[work]["percent"] = 100 / rows[work]["ratio"]
    least = 60.0 if case.startswith("gpt-oss") else 80.0
    aims = {"convert --no-verify": least, "verify": 80.0}
    return {
        "case": f"{case}, {workers} workers",
        "bytes": size(path),
        "cache": "in memory",
        "ceiling": "parallel cp",
        "rows": rows,
        "claims": [
            claim(work, "seconds", "percent", aim, most=False, against=None if work != "verify" else "parallel cat")
            for work, aim in aims.items()
            if workers == MOST
        ],
    }


def main() -> None:
    made = parser(__doc__, repeat=1)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is given")
    made.add_argument("--workers", default="1,2,4,8,16", help="numbers of workers, with commas")
    made.add_argument("--gb", type=float, default=20, help="of each checkpoint")
    args = made.parse_args()
    args.workers = [int(number) for number in args.workers.split(",")]
    with scratch(args) as root:
        facts = machine(root)
        results = [result for case in args.cases or CASES for result in measure(case, root, args)]
    finish("cores", facts, results, args)


if __name__ == "__main__":
    main()
