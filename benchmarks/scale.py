"""Claim: a checkpoint of Kimi-K3's size is read and planned in a minute, and its many tensors cost next to nothing.

    python benchmarks/scale.py [--dir DIR] [--layers 92] [--pairs 20000] [--repeat 3] [--json FILE] [CASE ...]

plan: Kimi-K3 as sparse files. Headers, index and config are whole; tensor bytes are holes, which read as zeros without
a disk. Real: 96 shards, 497,220 tensors, 1,560,860,324,864 bytes of them, of which scales 85,085,650,944; names, dtypes
and shapes of all 92 x 896 experts, six tensors back to back. Filled: the other 2,628 tensors, 114 GB, are BF16 under
names of the model's modules, all of one shape [*, 7168] but the last, which takes what is left; which shard holds what
is even. Timed, once each: headers alone; headers and plan, with all scales read and with every read answered from
memory; `inspect --json`. Ceiling: two threads that pread the same scale bytes of the same files.

pairs: the cost of a tensor. --pairs projections of [256, 1024] under Kimi-K3's names, and the same bytes in 20 pairs,
each converted without verification in turn with `cp -r`. What the small ones take longer, for 250,000 pairs, is held
against the time that cp, at the rate measured on the large ones, would take for 1.56 TB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from checkpoints import KIMI_CONFIG, KIMI_NAMES, Draft, Spec, cut, dense, experts, kimi_expert, write
from common import FP4CAST, Sample, alternate, apart, claim, finish, parser, scratch, step, summary, timed, verified
from host import cache_state, forget, machine, need, prepare, size

LAYERS, EXPERTS, SHARDS = 92, 896, 96
TOTAL_BYTES, SCALE_BYTES, TENSORS = 1_560_860_324_864, 85_085_650_944, 497_220
HIDDEN = 7168
MODULES = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.g_proj", "self_attn.b_proj", "self_attn.f_a_proj", "self_attn.f_b_proj",
    "self_attn.q_conv1d", "self_attn.k_conv1d", "self_attn.v_conv1d", "self_attn.o_norm",
    "block_sparse_moe.gate", "block_sparse_moe.routed_expert_up_proj", "block_sparse_moe.routed_expert_down_proj",
    "block_sparse_moe.routed_expert_norm", "block_sparse_moe.shared_experts.gate_proj",
    "block_sparse_moe.shared_experts.up_proj", "block_sparse_moe.shared_experts.down_proj",
)  # fmt: skip
LARGE_PAIRS = 20
PAIRS = 250_000  # Kimi-K3 has 247,296
COPIED, MORE = "cp of 1.56 TB, at this rate", f"{PAIRS:,} pairs more"
LIMIT_SECONDS, LIMIT_BYTES, LIMIT_PERCENT = 60.0, 2e9, 10.0


def filling(many: int, nbytes: int) -> list[Spec]:
    """So many BF16 tensors of so many bytes in all."""
    rows = nbytes // 2 // HIDDEN // many
    names = (
        f"language_model.model.layers.{i // len(MODULES)}.{MODULES[i % len(MODULES)]}.weight"
        if i < (LAYERS + 1) * len(MODULES)
        else f"vision_tower.encoder.blocks.{i}.weight"
        for i in range(many - 1)
    )
    specs = [dense(name, rows, HIDDEN) for name in names]
    return [*specs, dense("mm_projector.weight", nbytes // 2 - len(specs) * rows * HIDDEN)]


def kimi_k3(layers: int) -> Draft:
    """Kimi-K3, or the part of it that so many of its 92 sparse layers are."""
    shards: list[list[Spec]] = [[] for _ in range(max(1, SHARDS * layers // LAYERS))]
    pairs = experts(kimi_expert, layers * EXPERTS, 3072, 3584, KIMI_NAMES)
    others = TENSORS - LAYERS * EXPERTS * 6
    rest = filling(others * layers // LAYERS, (TOTAL_BYTES - SCALE_BYTES * 17) * layers // LAYERS // 2 * 2)
    for i in range(0, len(pairs), 6):
        shards[i * len(shards) // len(pairs)] += pairs[i : i + 6]
    for i, spec in enumerate(rest):
        shards[i * len(shards) // len(rest)].append(spec)
    return Draft(shards, KIMI_CONFIG)


def make_kimi_k3(path: Path, layers: int) -> None:
    draft = kimi_k3(layers)
    if layers == LAYERS:
        counted = (len(draft.shards), sum(map(len, draft.shards)), draft.nbytes)
        if counted != (SHARDS, TENSORS, TOTAL_BYTES):
            sys.exit(f"this is not Kimi-K3: {counted}")
    write(path, draft, sparse=True)


def make_pairs(path: Path, pairs: int, rows: int) -> None:
    """Projections of [rows, 1024], in four shards."""
    specs = experts(kimi_expert, -(-pairs // 3), rows, 1024, KIMI_NAMES)[: 2 * pairs]
    square = [spec._replace(shape=(rows, 512 if spec.kind == "codes" else 32)) for spec in specs]
    write(path, Draft(cut(square, sum(spec.nbytes for spec in square) / 4), KIMI_CONFIG))


def planning(root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """The case plan."""
    path, out, layers = root / "k3", root / "out.json", args.layers
    apart(make_kimi_k3, path, layers)
    ceiling, unread, planned = "preads, 2 threads", "headers + plan, no reads", "headers + plan"
    commands = {
        ceiling: step("preads", path, 2),
        "headers": step("headers", path),
        unread: step("plan_unread", path),
        planned: step("plan", path),
        "inspect --json": (*FP4CAST, "inspect", str(path), "--json"),
    }
    rows: dict[str, Any] = {}
    for work, command in commands.items():
        forget(path)  # a hole's pages of zeros are cached like any others
        sample = timed(command, out)
        report = json.loads(out.read_text())
        rows[work] = {"seconds": sample.seconds, "peak_bytes": sample.peak_bytes}
        rows[work] |= {key: report[key] for key in ("work_seconds",) if key in report}
    if not report["exact"]:
        sys.exit("inspect does not say that the sparse checkpoint is exact")
    nbytes = SCALE_BYTES * layers // LAYERS
    for row in rows.values():
        row["ratio"] = row["seconds"] / rows[ceiling]["seconds"]
    rows[ceiling]["bytes_per_second"] = nbytes / rows[ceiling]["work_seconds"]
    shutil.rmtree(path)
    return {
        "case": f"kimi-k3, {layers} of {LAYERS} layers",
        "bytes": nbytes,
        "cache": cache_state(facts, False, 0) if facts["storage"] == "memory" else "holes",
        "ceiling": ceiling,
        "rows": rows,
        "claims": [
            claim(unread, "seconds", "seconds", LIMIT_SECONDS),
            claim(unread, "peak_bytes", "peak_bytes", LIMIT_BYTES),
            claim(planned, "peak_bytes", "peak_bytes", LIMIT_BYTES),
        ],
    }


def beyond(runs: dict[str, list[Sample]], rate: float, pairs: int) -> dict[str, Any]:
    """What Kimi-K3's number of small pairs takes longer than few large ones, beside cp of all its bytes."""
    both = zip(runs["convert, small"], runs["convert, large"], strict=True)
    one = statistics.median(small.seconds - large.seconds for small, large in both) / pairs
    whole = TOTAL_BYTES / rate
    more = {"seconds": one * PAIRS, "microseconds": 1e6 * one, "percent": 100 * one * PAIRS / whole}
    return {COPIED: {"seconds": whole}, MORE: more}


def tensors(root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """The case pairs."""
    pairs = args.pairs // LARGE_PAIRS * LARGE_PAIRS
    need(root, 3.2 * pairs * 256 * (512 + 32))
    paths = {"small": root / "small", "large": root / "large"}
    apart(make_pairs, paths["small"], pairs, 256)
    apart(make_pairs, paths["large"], LARGE_PAIRS, 256 * pairs // LARGE_PAIRS)

    def run(kind: str, convert: bool, last: bool) -> Sample:
        source, destination = paths[kind], root / "out"
        prepare(False, source)
        work = (*FP4CAST, "convert", "--no-verify") if convert else ("cp", "-r")
        sample = timed((*work, str(source), str(destination)))
        if convert and last:
            verified(source, destination)
        shutil.rmtree(destination)
        return sample

    works = {
        "cp -r, large": lambda last: run("large", False, last),
        "convert, large": lambda last: run("large", True, last),
        "cp -r, small": lambda last: run("small", False, last),
        "convert, small": lambda last: run("small", True, last),
    }
    runs = alternate(args.repeat, works)
    nbytes = size(paths["large"])
    rows = {work: summary(samples, runs["cp -r, large"], nbytes) for work, samples in runs.items()}
    rows |= beyond(runs, rows["cp -r, large"]["bytes_per_second"], pairs)
    return {
        "case": f"{pairs:,} pairs or {LARGE_PAIRS}",
        "bytes": nbytes,
        "cache": cache_state(facts, False, nbytes),
        "ceiling": "cp -r, large",
        "rows": rows,
        "claims": [claim(MORE, "seconds", "percent", LIMIT_PERCENT, against=COPIED)],
    }


CASES = {"plan": planning, "pairs": tensors}


def main() -> None:
    made = parser(__doc__, repeat=3)
    made.add_argument("--layers", type=int, default=LAYERS, help="of Kimi-K3's 92")
    made.add_argument("--pairs", type=int, default=20_000, help="small projections of the case pairs")
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; both when none is given")
    args = made.parse_args()
    if unknown := set(args.cases) - set(CASES):
        made.error(f"unknown case {', '.join(unknown)}")
    with scratch(args) as root:
        facts = machine(root)
        results = [CASES[case](root, args, facts) for case in args.cases or CASES]
    finish("scale", facts, results, args)


if __name__ == "__main__":
    main()
