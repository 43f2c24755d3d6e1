"""Claim: memory does not grow with the size of tensors or shards: 300 MB, and 64 MB a worker.

    python benchmarks/memory.py [--dir DIR] [--gb 40] [--tensor-gb 8] [--json FILE] [CASE ...]

Cases, all sparse, so that the source takes no space (holes read as zero bytes; small tensors are real):
shards (--gb of DeepSeek-V4-Flash's experts in shards of 5 GB), bank (gpt-oss's names, one expert of --tensor-gb in one
tensor, which is transposed) and dense (one projection of --tensor-gb, compressed-tensors' names). Each is converted
with verification and verified again, with 1 and with 2 workers, once. The conversions write real bytes: as many as the
size, and 6 % more. What is measured is the resident memory of the whole process tree, and the limit is the ceiling.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoints import KIMI_NAMES, Draft, Spec, compressed, deepseek, dense, write
from common import FP4CAST, Sample, apart, claim, finish, parser, scratch, timed
from host import cache_state, machine, need

BASE_BYTES, WORKER_BYTES = 300e6, 64e6


def _edge(gb: float) -> int:
    """K = N of one tensor whose codes take some gigabytes."""
    return max(1, round(math.sqrt(2 * gb * 1e9) / 64)) * 64


def bank(gb: float) -> Draft:
    """A bank of one huge expert under gpt-oss's names."""
    n = _edge(gb)
    at = "model.layers.0.mlp.experts.down_proj"
    specs = [
        dense(f"{at}_bias", 1, n),
        Spec(f"{at}_blocks", "U8", (1, n, n // 32, 16), "codes"),
        Spec(f"{at}_scales", "U8", (1, n, n // 32), "scales"),
    ]
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    return Draft([specs], config)


def dense_tensor(gb: float) -> Draft:
    """One huge projection under compressed-tensors' names."""
    n = _edge(gb)
    at = "model.layers.0.mlp.down_proj"
    codes, codes_dtype, scales, scales_dtype = KIMI_NAMES
    specs = [
        dense("model.norm.weight", n),
        Spec(at + codes, codes_dtype, (n, n // 2), "codes"),
        Spec(at + scales, scales_dtype, (n, n // 32), "scales"),
    ]
    return Draft([specs], {"model_type": "llama", "quantization_config": compressed(["lm_head"])})


CASES: dict[str, tuple[str, Callable[[float], Draft]]] = {
    "shards": ("gb", lambda gb: deepseek(0, gb)),
    "bank": ("tensor_gb", bank),
    "dense": ("tensor_gb", dense_tensor),
}


def make(path: Path, case: str, gb: float) -> None:
    write(path, CASES[case][1](gb), sparse=True)


def row(sample: Sample, nbytes: int, limit: float) -> dict[str, Any]:
    return {
        "seconds": sample.seconds,
        "bytes_per_second": nbytes / sample.seconds,
        "percent": 100 * sample.peak_bytes / limit,
        "peak_bytes": sample.peak_bytes,
    }


def measure(case: str, root: Path, gb: float, numbers: list[int], facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One result for each number of workers."""
    path, destination, said, draft = root / case, root / "dst", root / "said.json", CASES[case][1](gb)
    need(root, draft.converted_bytes)
    apart(make, path, case, gb)
    for jobs in numbers:
        limit = BASE_BYTES + WORKER_BYTES * jobs
        works = {
            "convert": (*FP4CAST, "convert", str(path), str(destination), *draft.options),
            "verify": (*FP4CAST, "verify", str(path), str(destination)),
        }
        rows: dict[str, Any] = {"limit": {"peak_bytes": limit, "percent": 100.0}}
        for work, command in works.items():
            sample = timed((*command, "--json", "--jobs", str(jobs)), said)
            rows[work] = row(sample, draft.nbytes, limit)
            if json.loads(said.read_text())["exact"] is not True:
                sys.exit(f"{case}: {work} does not say that every value is equal")
        shutil.rmtree(destination)
        yield {
            "case": f"{case}, {jobs} worker{'s' * (jobs > 1)}",
            "bytes": draft.nbytes,
            "cache": cache_state(facts, False, 0) if facts["storage"] == "memory" else "holes",
            "ceiling": "limit",
            "rows": rows,
            "claims": [claim(work, "peak_bytes", "percent", 100.0) for work in works],
        }
    shutil.rmtree(path)


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is given")
    made.add_argument("--gb", type=float, default=40, help="of the case shards")
    made.add_argument("--tensor-gb", type=float, default=8, help="of the cases bank and dense")
    made.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers of workers")
    args = made.parse_args()
    if unknown := set(args.cases) - set(CASES):
        made.error(f"unknown case {', '.join(unknown)}")
    args.cases = args.cases or list(CASES)
    return args


def main() -> None:
    args = arguments()
    with scratch(args) as root:
        facts = machine(root)
        sizes = {case: getattr(args, CASES[case][0]) for case in args.cases}
        results = [result for case, gb in sizes.items() for result in measure(case, root, gb, args.jobs, facts)]
    finish("memory", facts, results, args)


if __name__ == "__main__":
    main()
