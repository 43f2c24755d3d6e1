"""Claim: an engine computes with the NVFP4 casts what it computes with the BF16 twin. Needs a GPU and vLLM.

    python benchmarks/serve.py [--only NAME ...] [--variants WORD ...] [--tensor-parallel 2] [--graphs] [--rates]
        [--make] [--dir DIR] [--json FILE]

Makes random models, casts them with fp4cast, serves each through vLLM's real kernels (Marlin for NVFP4) with the plugin
`fp4cast.vllm`, and compares the log-probabilities of 3 x 63 prompt tokens and 16 greedy tokens with those of the same
model in BF16: the MXFP4 source as vLLM chooses and through Marlin, the casts as W4A16 and labelled W4A4 (which a GPU
without FP4 units computes as W4A16), and the source cast while it is loaded. A row also has the loader's seconds and
memory, and with --rates the tokens a second.

Every variant runs in a process of its own with a time limit; one that fails is a row with the end of its error, and the
others go on. A gpt-oss that is wrong is followed by three that say which bias it was. `--make` only makes the models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from serve_engine import apart, entry_point
from serve_models import DIAGNOSES, MODELS, make

LIMIT = 0.1  # of |log-probability - the twin's|, for models whose routing cannot flip; BF16 alone gives 0.02
MEAN_LIMIT = 0.05  # of its mean, for those whose routing can
Row = dict[str, Any]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def compare(name: str, found: dict[str, Any], twin: dict[str, Any]) -> Row:
    deltas = [
        abs(a - b) for x, y in zip(found["logprobs"], twin["logprobs"], strict=True) for a, b in zip(x, y, strict=True)
    ]
    largest, mean = max(deltas), sum(deltas) / len(deltas)
    routed = name.endswith("routed") or name == "qwen3-moe"
    return {
        "max_delta": largest,
        "mean_delta": mean,
        "greedy_equal": sum(a == b for a, b in zip(found["greedy"], twin["greedy"], strict=True)),
        "kept": mean <= MEAN_LIMIT if routed else largest <= LIMIT,
    }


def variants(name: str, paths: dict[str, Path], ranks: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(label, checkpoint, options), what the others are compared with first."""
    for label, path in paths.items():
        yield label, path, {}
    if name != "llama":
        yield "mxfp4, Marlin", paths["mxfp4"], {"moe_backend": "marlin"}
    yield "cast on load", paths["mxfp4"], {"quantization": "fp4cast"}
    if ranks > 1:
        split = {"tensor_parallel_size": ranks}
        yield f"modelopt, TP {ranks}", paths["modelopt"], split
        if name != "llama":
            yield f"modelopt, EP {ranks}", paths["modelopt"], split | {"enable_expert_parallel": True}


def wanted(label: str, words: list[str] | None) -> bool:
    """Whether to run a variant: all, or those that hold one of the words, and the twin."""
    return not words or label == "bf16" or any(word in label for word in words)


def measure(name: str, args: argparse.Namespace, work: Path) -> list[Row]:
    """Every variant of a model."""
    say(f"{name}: making it")
    try:
        paths = make(name, work / name, keep=args.dir is not None)
    except Exception as error:  # one model's failure is a row
        return [{"model": name, "variant": "all", "error": f"{type(error).__name__}: {error}"}]
    rows: list[Row] = []
    twin: dict[str, Any] | None = None
    options = {"enforce_eager": not args.graphs}
    if args.attention != "auto":
        options["attention_backend"] = args.attention
    chosen = [each for each in variants(name, paths, args.tensor_parallel) if wanted(each[0], args.variants)]
    for label, path, more in chosen if not args.make else ():
        say(f"{name}: {label}")
        found, text = apart(path, label, options | more, work / "plugin", seconds=args.seconds, rates=args.rates)
        row: Row = {"model": name, "variant": label, "graphs": args.graphs}
        lines = [
            line.partition("] ")[2] or line
            for line in text.splitlines()
            if "fp4cast:" in line or ("MoE backend" in line and "config" not in line)
        ]
        row["log"] = [line[-300:] for line in dict.fromkeys(lines)][:6]
        if found is None:
            row["error"] = text
        elif label == "bf16":
            twin = found
        elif twin is None:
            row["error"] = "runs, but its BF16 twin did not: nothing to compare with"
        else:
            row |= compare(name, found, twin)
        if found is not None:
            row |= {key: found[key] for key in ("load_seconds", "loader", "rates", "device") if key in found}
        rows.append(row)
        say(describe(row))
    return rows


def describe(row: Row) -> str:
    head = f"  {row['model']:24} {row['variant']:20}"
    if "error" in row:
        return f"{head} FAILED: " + row["error"].replace("\n", "\n      ")
    if "max_delta" not in row:
        return f"{head} the twin{speed(row)}"
    verdict = "kept" if row["kept"] else "MISSED"
    return (
        f"{head} max {row['max_delta']:.5f}  mean {row['mean_delta']:.6f}  greedy {row['greedy_equal']} of 3  {verdict}"
        f"{speed(row)}"
    )


def speed(row: Row) -> str:
    loader, rates = row.get("loader", {}), row.get("rates", {})
    peak = f", peak {loader['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in loader else ""
    load = f"  loaded in {loader['seconds']:.1f} s{peak}" if loader else ""
    return load + "".join(f"  {name} {value:,.0f} tokens/s" for name, value in rates.items())


def is_wrong(row: Row) -> bool:
    return row["model"] == "gpt-oss-256" and row["variant"] == "modelopt" and not row.get("kept", True)


def versions() -> dict[str, str]:
    found = {"fp4cast": metadata_version("fp4cast"), "python": sys.version.split()[0]}
    return found | {name: metadata_version(name) for name in ("vllm", "torch", "triton", "transformers")}


def metadata_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


def write(rows: list[Row], args: argparse.Namespace) -> None:
    """After every model: a run that is cut off leaves what it had."""
    devices = sorted({row["device"] for row in rows if "device" in row})
    document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "devices": devices, "versions": versions()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"benchmark": "serve", **document, "rows": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*MODELS, *DIAGNOSES], help="these models; default: all")
    parser.add_argument("--variants", nargs="+", metavar="WORD", help="only these, by a part of their names")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="also on this many GPUs, as TP and as EP")
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention_backend, or auto")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs and torch.compile, not eagerly")
    parser.add_argument("--rates", action="store_true", help="measure prefill and decode, too")
    parser.add_argument("--make", action="store_true", help="only make the models, in --dir")
    parser.add_argument("--seconds", type=float, default=150, help="the limit for one variant")
    parser.add_argument("--budget", type=float, default=3000, help="start no further model after so many seconds")
    parser.add_argument("--dir", type=Path, help="where to work; kept, and what is there is used")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    start, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="fp4cast-serve-") as scratch:
        work = args.dir or Path(scratch)
        entry_point(work / "plugin")
        todo = list(args.only or MODELS)
        for name in todo:
            if time.monotonic() - start > args.budget:
                rows.append({"model": name, "variant": "all", "error": "not run: the budget is spent"})
                continue
            rows += measure(name, args, work)
            if any(map(is_wrong, rows)) and not set(DIAGNOSES) & set(todo):
                todo += DIAGNOSES  # the loop goes on with them
            write(rows, args)
    write(rows, args)
    print("\n".join(describe(row) for row in rows), flush=True)
    return 0 if all(row.get("kept", "error" not in row) for row in rows if row["variant"] != "mxfp4") else 1


if __name__ == "__main__":
    sys.exit(main())
