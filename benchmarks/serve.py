"""Claim: an engine computes with the NVFP4 casts what it computes with the BF16 twin. Needs a GPU and vLLM.

    python benchmarks/serve.py [--only NAME ...] [--tensor-parallel 2] [--graphs] [--make] [--json FILE]

Makes random models, casts them with fp4cast, serves each through vLLM's real kernels (Marlin for NVFP4) with the plugin
`fp4cast.vllm`, and compares the log-probabilities of 3 x 63 prompt tokens and 16 greedy tokens with those of the same
model in BF16. Every variant runs in a process of its own with a time limit; one that fails is a row with the end of
its error, and the others go on. A gpt-oss that is wrong is followed by three that say which bias it was.
`--make` only makes the models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import fp4cast
from serve_models import DIAGNOSES, MODELS, make

LIMIT = 0.1  # of |log-probability - the twin's|, for models whose routing cannot flip; BF16 alone gives 0.02
MEAN_LIMIT = 0.05  # of its mean, for those whose routing can
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
Row = dict[str, Any]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def serve(path: Path, out: Path, options: dict[str, Any]) -> None:
    """In a process of its own: load, and write log-probabilities and greedy tokens."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    from fp4cast.vllm import register

    register()
    defaults = {
        "max_model_len": 256, "gpu_memory_utilization": 0.3, "enable_prefix_caching": False, "disable_log_stats": True,
    }  # fmt: skip
    start = time.perf_counter()
    llm = LLM(str(path), skip_tokenizer_init=True, **(defaults | options))
    loaded = time.perf_counter()
    torch.manual_seed(0)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in torch.randint(2, 500, (3, 64)).tolist()]
    sampling = SamplingParams(
        max_tokens=16, temperature=0, prompt_logprobs=0, logprobs=5, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    found = {
        "logprobs": [[next(iter(step.values())).logprob for step in each.prompt_logprobs[1:]] for each in outputs],
        "greedy": [list(each.outputs[0].token_ids) for each in outputs],
        "load_seconds": loaded - start,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    out.write_text(json.dumps(found))


def apart(
    path: Path, label: str, options: dict[str, Any], seconds: float, plugin: Path
) -> tuple[dict[str, Any] | None, str]:
    """(what `serve` found, or None, and the end of what it printed)."""
    slug = "".join(c if c.isalnum() else "-" for c in label)
    out, log = path.with_name(f"{slug}.json"), path.with_name(f"{slug}.log")
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(path), str(out), json.dumps(options)]
    source = str(Path(fp4cast.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (source, str(plugin), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        )  # fmt: skip
        try:
            status: object = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"none: no end after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # an engine's workers keep the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text(errors="replace")
    if out.exists():
        return json.loads(out.read_text()), text
    return None, f"exit status {status}\n{tail(text)}"


def tail(text: str) -> str:
    """The lines that say why: the last ones that name an error, and the last ones."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line][-4:]
    return "\n".join(line[-300:] for line in dict.fromkeys([*errors, *lines[-6:]]))


def entry_point(path: Path) -> Path:
    """A folder that makes vLLM's own processes find the plugin where fp4cast runs from its source."""
    if not any(each.name == "fp4cast" for each in metadata.entry_points(group="vllm.general_plugins")):
        info = path / f"fp4cast-{fp4cast.__version__ if hasattr(fp4cast, '__version__') else '0'}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4cast\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfp4cast = fp4cast.vllm:register\n")
    return path


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
        "load_seconds": found["load_seconds"],
        "device": found["device"],
    }


def variants(name: str, paths: dict[str, Path], ranks: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(label, checkpoint, options), the twin first."""
    for label, path in paths.items():
        yield label, path, {}
    if name.startswith("gpt-oss"):
        yield "cast on load", paths["mxfp4"], {"quantization": "fp4cast"}
    if ranks > 1 and "modelopt" in paths:
        split = {"tensor_parallel_size": ranks}
        yield f"modelopt, TP {ranks}", paths["modelopt"], split
        yield f"modelopt, EP {ranks}", paths["modelopt"], split | {"enable_expert_parallel": True}


def measure(name: str, args: argparse.Namespace, work: Path) -> list[Row]:
    """Every variant of a model."""
    say(f"{name}: making it")
    try:
        paths = make(name, work / name)
    except Exception as error:  # one model's failure is a row
        return [{"model": name, "variant": "all", "error": f"{type(error).__name__}: {error}"}]
    rows: list[Row] = []
    twin: dict[str, Any] | None = None
    options = {"enforce_eager": not args.graphs}
    if args.attention != "auto":
        options["attention_backend"] = args.attention
    for label, path, more in variants(name, paths, args.tensor_parallel) if not args.make else ():
        say(f"{name}: {label}")
        found, text = apart(path, label, options | more, args.seconds, work / "plugin")
        row: Row = {"model": name, "variant": label}
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
            row |= {"load_seconds": found["load_seconds"], "device": found["device"]}
        elif twin is None:
            row["error"] = "runs, but its BF16 twin did not: nothing to compare with"
        else:
            row |= compare(name, found, twin)
        rows.append(row)
        say(describe(row))
    return rows


def describe(row: Row) -> str:
    head = f"  {row['model']:24} {row['variant']:20}"
    if "error" in row:
        return f"{head} FAILED: " + row["error"].replace("\n", "\n      ")
    if "max_delta" not in row:
        return f"{head} the twin"
    verdict = "kept" if row["kept"] else "MISSED"
    return (
        f"{head} max {row['max_delta']:.5f}  mean {row['mean_delta']:.6f}  greedy {row['greedy_equal']} of 3  {verdict}"
    )


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
    parser.add_argument("--tensor-parallel", type=int, default=1, help="also on this many GPUs, as TP and as EP")
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention_backend, or auto")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs and torch.compile, not eagerly")
    parser.add_argument("--make", action="store_true", help="only make the models, in --dir")
    parser.add_argument("--seconds", type=float, default=150, help="the limit for one variant")
    parser.add_argument("--budget", type=float, default=3000, help="start no further model after so many seconds")
    parser.add_argument("--dir", type=Path, help="where to work; kept")
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
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        sys.exit(main())
