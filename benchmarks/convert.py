"""Claim: converting takes hardly longer than copying, and its proof adds little.

`fp4cast convert` beside `cp -r`, in turn: without the proof (--no-verify) and with it, both without waiting for the
disk (--no-sync); and the default, which verifies and waits for the disk, beside `cp -r` and `sync`.

    python benchmarks/convert.py [--dir DIR] [--repeat 3] [--cold] [--layers 24] [--gb 10] [--json FILE] [CASE ...]

Cases: gpt-oss-20b (all of it, 13.8 GB, fused and transposed), deepseek-v4-flash and kimi-k3 (--gb of their experts).
Every round times each command once, after a sync and with the source read into the cache (--cold: dropped from it)
just before; what was written is removed at once, and in the last round verified first. A ratio is the median over
rounds. Ceiling: `cp -r` reads and writes the source's bytes once; a conversion also doubles the scales (+6 %).
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import CASES, Draft, make
from common import FP4CAST, Sample, alternate, apart, claim, finish, parser, scratch, summary, timed, verified
from host import cache_state, machine, need, prepare, size

LIMITS = {"disk": 1.15, "memory": 2.0}
FUSED_LIMITS = {"disk": 1.5, "memory": 3.0}  # gpt-oss: every byte changes its place
PROOF_LIMITS = {"disk": 1.3, "memory": 2.2}  # with every value compared
FUSED_PROOF_LIMITS = {"disk": 2.0, "memory": 3.0}


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options that measuring a conversion and its verification share."""
    made = parser(doc, repeat=3)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is given")
    made.add_argument("--cold", action="store_true", help="drop the page cache before each command")
    made.add_argument("--layers", type=int, default=24, help="of gpt-oss-20b")
    made.add_argument("--gb", type=float, default=10, help="of DeepSeek-V4-Flash and Kimi-K3")
    return made


def arguments(made: argparse.ArgumentParser) -> argparse.Namespace:
    args = made.parse_args()
    if unknown := set(args.cases) - set(CASES):
        made.error(f"unknown case {', '.join(unknown)}")
    if args.cold and machine(args.dir or Path(tempfile.gettempdir()))["storage"] == "memory":
        made.error("a directory in memory has no cold cache")
    args.cases = args.cases or list(CASES)
    return args


def source(case: str, root: Path, args: argparse.Namespace) -> tuple[Path, Draft]:
    """Make a case's checkpoint, once the space for it and for one copy is there."""
    draft = CASES[case](args.layers, args.gb)
    need(root, draft.nbytes + draft.converted_bytes)
    apart(make, root / case, case, args.layers, args.gb)
    return root / case, draft


def measure(case: str, root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    path, draft = source(case, root, args)
    copy, destination, nbytes = root / "cp", root / "dst", size(path)
    command = (*FP4CAST, "convert", str(path), str(destination), *draft.options, "--json")

    def copied(_: bool, *, sync: bool = False) -> Sample:
        prepare(args.cold, path)
        plain = ("cp", "-r", str(path), str(copy))
        sample = timed(("sh", "-c", f"{shlex.join(plain)} && sync -f {shlex.quote(str(copy))}") if sync else plain)
        shutil.rmtree(copy)
        return sample

    def converted(last: bool, *more: str) -> Sample:
        prepare(args.cold, path)
        sample = timed((*command, *more))
        if last:
            verified(path, destination)
        shutil.rmtree(destination)
        return sample

    works = {
        "cp -r": copied,
        "convert": lambda last: converted(last, "--no-verify", "--no-sync"),
        "convert, verified": lambda last: converted(last, "--no-sync"),
        "cp -r, sync": lambda last: copied(last, sync=True),
        "convert, verified, sync": converted,
    }
    runs = alternate(args.repeat, works)
    shutil.rmtree(path)
    limits = (FUSED_LIMITS, FUSED_PROOF_LIMITS) if case == "gpt-oss-20b" else (LIMITS, PROOF_LIMITS)
    limit, proof = (each[facts["storage"]] for each in limits)
    return {
        "case": case,
        "bytes": nbytes,
        "cache": cache_state(facts, args.cold, 2 * nbytes),
        "ceiling": "cp -r",
        "rows": {work: summary(samples, runs[_beside(work)], nbytes) for work, samples in runs.items()},
        "claims": [
            claim("convert", "seconds", "ratio", limit),
            claim("convert, verified", "seconds", "ratio", proof),
            claim("convert, verified, sync", "seconds", "ratio", proof, against="cp -r, sync"),
        ],
    }


def _beside(work: str) -> str:
    """The copy that a row's ratio is to: one that waits for the disk beside a conversion that does."""
    return "cp -r, sync" if work.endswith(", sync") else "cp -r"


def main(name: str, doc: str | None, measure: Callable[..., dict[str, Any]]) -> None:
    """Measure every case; verify.py has the same options and cases."""
    args = arguments(options(doc))
    with scratch(args) as root:
        facts = machine(root)
        results = [measure(case, root, args, facts) for case in args.cases]
    finish(name, facts, results, args)


if __name__ == "__main__":
    main("convert", __doc__, measure)
