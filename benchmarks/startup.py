"""Claim: fp4cast says its version in 0.15 s. Beside it: Python, and Python with the libraries of every conversion.

    python benchmarks/startup.py [--dir DIR] [--repeat 30] [--json FILE]

Every round runs each command once, in a process of its own: Python alone, with NumPy, with Typer, with both; then
`--version`, `--help`, and the conversion of a miniature (kimi-k3), verified. A row has the least of all rounds, since
whatever else a machine does only adds; claims are about processor time, user and system, which waits for nobody. What
the conversion itself takes is the least of as many in one process that has done one before; the rest of the command is
its start, with all imports. Ceiling: Python with both libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import FP4CAST, Sample, alternate, claim, finish, parser, scratch, timed
from fp4cast.miniatures import make
from host import cache_state, machine, size

LIMIT_SECONDS = 0.15
CEILING = "python, numpy and typer"
CONVERT = "convert a miniature"
WORK = """
import json, shutil, sys, time
import fp4cast

source, destination, repeat = sys.argv[1:]
seconds = []
for _ in range(int(repeat) + 1):
    begin = time.process_time()
    fp4cast.convert(source, destination)
    seconds.append(time.process_time() - begin)
    shutil.rmtree(destination)
print(json.dumps(min(seconds[1:])))
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def least(samples: list[Sample]) -> dict[str, Any]:
    return {
        "seconds": min(sample.seconds for sample in samples),
        "cpu_seconds": min(sample.cpu_seconds for sample in samples),
        "peak_bytes": max(sample.peak_bytes for sample in samples),
    }


def measure(root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    source, destination = make("kimi-k3", root / "src"), root / "dst"
    commands = {
        "python": python("pass"),
        "python, numpy": python("import numpy"),
        "python, typer": python("import typer"),
        CEILING: python("import numpy, typer"),
        "--version": (*FP4CAST, "--version"),
        "--help": (*FP4CAST, "--help"),
        CONVERT: (*FP4CAST, "convert", str(source), str(destination)),
    }

    def run(command: tuple[str, ...]) -> Sample:
        sample = timed(command)
        shutil.rmtree(destination, ignore_errors=True)
        return sample

    works = {work: lambda _, command=command: run(command) for work, command in commands.items()}
    rows = {work: least(samples) for work, samples in alternate(args.repeat, works).items()}
    arguments = [str(source), str(destination), str(args.repeat)]
    done = subprocess.run([*python(WORK), *arguments], capture_output=True, text=True, check=True)
    rows[CONVERT]["work_seconds"] = json.loads(done.stdout)
    rows[CONVERT]["start_seconds"] = rows[CONVERT]["cpu_seconds"] - rows[CONVERT]["work_seconds"]
    for row in rows.values():
        row["ratio"] = row["cpu_seconds"] / rows[CEILING]["cpu_seconds"]
    return {
        "case": "a miniature of kimi-k3",
        "bytes": size(source),
        "cache": cache_state(facts, False, size(source)),
        "ceiling": CEILING,
        "rows": rows,
        "claims": [
            claim("--version", "cpu_seconds", "cpu_seconds", LIMIT_SECONDS),
            claim(CONVERT, "cpu_seconds", "start_seconds", None),  # the aim was 0.15 s, too
        ],
    }


def main() -> None:
    args = parser(__doc__, repeat=30).parse_args()
    with scratch(args) as root:
        facts = machine(root)
        finish("startup", facts, [measure(root, args, facts)], args)


if __name__ == "__main__":
    main()
