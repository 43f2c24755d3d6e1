"""Claim: verifying runs at 70 % of the speed of reading from a disk, and at 85 % in memory.

`fp4cast verify SRC DST` beside `cat` of all their files.

    python benchmarks/verify.py [--dir DIR] [--repeat 3] [--cold] [--layers 24] [--gb 10] [--json FILE] [CASE ...]

The cases are those of convert.py. Each is converted once; then every round times each command once, after a sync and
with both checkpoints read once (--cold: dropped from the cache) just before. What does not fit into memory is then only
partly warm, and the table says so. Ceiling: one `cat` of every file of both directories to /dev/null.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

from common import FP4CAST, Sample, alternate, claim, summary, timed, verified
from convert import main, source
from host import cache_state, files, prepare, size

LIMITS = {"disk": 70.0, "memory": 85.0}  # percent of the speed of cat


def measure(case: str, root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    path, draft = source(case, root, args)
    destination = root / "dst"
    convert = (*FP4CAST, "convert", str(path), str(destination), *draft.options, "--no-verify", "--json")
    subprocess.run(convert, stdout=subprocess.DEVNULL, check=True)
    nbytes = size(path, destination)

    def run(command: tuple[str, ...]) -> Sample:
        prepare(args.cold, path, destination)
        return timed(command)

    verify = (*FP4CAST, "verify", str(path), str(destination), "--json")
    works = {
        "cat": lambda _: run(("cat", *map(str, files(path, destination)))),
        "verify": lambda _: run(verify),
        "verify --jobs 1": lambda _: run((*verify, "--jobs", "1")),
    }
    runs = alternate(args.repeat, works)
    verified(path, destination)
    shutil.rmtree(path)
    shutil.rmtree(destination)
    rows = {work: summary(samples, runs["cat"], nbytes) for work, samples in runs.items()}
    for row in rows.values():
        row["percent"] = 100 / row["ratio"]
    return {
        "case": case,
        "bytes": nbytes,
        "cache": cache_state(facts, args.cold, nbytes),
        "ceiling": "cat",
        "rows": rows,
        "claims": [claim("verify", "seconds", "percent", LIMITS[facts["storage"]], most=False)],
    }


if __name__ == "__main__":
    main("verify", __doc__, measure)
