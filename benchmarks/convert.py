"""Convert true-size layers and compare with `cp` of the same bytes, in turn, in the same run.

    python benchmarks/convert.py [--dir DIR] [--repeat 3] [--experts 48] [--json FILE] [--cold] [CASE ...]

Cases: gpt-oss-20b (one layer: 32 experts, [5760, 2880] and [2880, 2880]), deepseek-v4-flash and kimi-k3 (one layer
each, --experts of their experts). Exponents are distributed like those of trained models. Every conversion runs in a
process of its own, alternating with `cp -r` of its source; each figure is the median. The run fails when an output
does not verify, or is not exact.

Ceiling: `cp` reads and writes the source's bytes once. A conversion also writes the larger scales (+6 % of the codes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fp4cast.miniature import write_checkpoint

Tensors = dict[str, tuple[str, np.ndarray]]


def random_codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def realistic_scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Exponents of roughly normal weights in rows of different size: about 10 binades, bytes 111 to 128."""
    rows = rng.normal(0, 0.8, (*shape[:-1], 1)).astype(np.float32)
    noise = rng.standard_normal(shape, np.float32) * np.float32(0.7)
    return np.clip(np.rint(120 + rows + noise), 111, 128).astype(np.uint8)


def gpt_oss(rng: np.random.Generator, _: int) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
        at = f"model.layers.0.mlp.experts.{name}"
        tensors[f"{at}_blocks"] = ("U8", random_codes(rng, 32, rows, 90, 16))
        tensors[f"{at}_scales"] = ("U8", realistic_scales(rng, 32, rows, 90))
        tensors[f"{at}_bias"] = ("BF16", np.zeros((32, rows), np.uint16))
    tensors["model.layers.0.mlp.router.weight"] = ("BF16", np.zeros((32, 2880), np.uint16))
    return tensors, {"model_type": "gpt_oss"}


def experts(
    rng: np.random.Generator, at: str, n: int, inner: int, hidden: int, codes: tuple[str, str], scales: tuple[str, str]
) -> Tensors:
    tensors: Tensors = {}
    for e in range(n):
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            tensors[f"{at}.{e}.{leaf}{codes[0]}"] = (codes[1], random_codes(rng, rows, columns // 2))
            tensors[f"{at}.{e}.{leaf}{scales[0]}"] = (scales[1], realistic_scales(rng, rows, columns // 32))
    return tensors


def deepseek(rng: np.random.Generator, n: int) -> tuple[Tensors, dict[str, Any]]:
    at = "layers.3.ffn.experts"
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "expert_dtype": "fp4"}
    return experts(rng, at, n, 2048, 4096, (".weight", "I8"), (".scale", "F8_E8M0")), config


def kimi(rng: np.random.Generator, n: int) -> tuple[Tensors, dict[str, Any]]:
    at = "language_model.model.layers.1.block_sparse_moe.experts"
    return experts(rng, at, n, 3072, 3584, (".weight_packed", "U8"), (".weight_scale", "U8")), {}


CASES: dict[str, tuple[Callable[..., tuple[Tensors, dict[str, Any]]], list[str], float]] = {
    "gpt-oss-20b": (gpt_oss, [], 0.0),  # transposed: every byte moves; no aim yet
    "deepseek-v4-flash": (deepseek, ["--activations", "w4a4", "--input-scales", "1.0"], 2.0),
    "kimi-k3": (kimi, [], 2.0),
}


def make(case: str, path: Path, n: int) -> None:
    tensors, config = CASES[case][0](np.random.default_rng(0), n)
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = {f"model-{i:05d}-of-00002.safetensors": {n: tensors[n] for n in half} for i, half in enumerate(halves, 1)}
    write_checkpoint(path, files, config)


def timed(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a process and its children."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def forget(path: Path) -> None:
    """Drop a directory's pages from the cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(case: str, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    _, options, aim = CASES[case]
    source, copy, destination = root / case, root / "cp", root / "dst"
    # In a process of its own: a child's peak memory would start at that of its parent.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(case, source, args.experts))
    maker.start()
    maker.join()
    size = sum(file.stat().st_size for file in source.iterdir())
    fp4cast = [sys.executable, "-m", "fp4cast"]
    convert = [*fp4cast, "convert", str(source), str(destination), *options, "--json"]
    runs: dict[str, list[tuple[float, int]]] = {"cp": [], "convert": [], "convert + verify": []}
    for _ in range(args.repeat):
        for name, command, made in (
            ("cp", ["cp", "-r", str(source), str(copy)], copy),
            ("convert", [*convert, "--no-verify"], destination),
            ("convert + verify", convert, destination),
        ):
            if args.cold:
                forget(source)
            runs[name].append(timed(command))
            shutil.rmtree(made)
    subprocess.run(convert, stdout=subprocess.DEVNULL, check=True)
    witness = subprocess.run(
        [*fp4cast, "verify", str(source), str(destination), "--json"], capture_output=True, check=True
    )
    report = json.loads(witness.stdout)
    if not report["exact"]:
        sys.exit(f"{case}: the output is not exact")
    shutil.rmtree(source)
    shutil.rmtree(destination)
    rows = {name: summary(samples, runs["cp"], size) for name, samples in runs.items()}
    return {"case": case, "bytes": size, "tensors": report["tensors"]["cast"], "aim": aim or None, "rows": rows}


def summary(samples: list[tuple[float, int]], base: list[tuple[float, int]], size: int) -> dict[str, float]:
    seconds = statistics.median(s for s, _ in samples)
    ratios = [s / b for (s, _), (b, _) in zip(samples, base, strict=True)]
    return {
        "seconds": seconds,
        "bytes_per_second": size / seconds,
        "ratio_to_cp": statistics.median(ratios),
        "peak_bytes": max(peak for _, peak in samples),
    }


def show(results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    table = Table(title=f"{machine['cpu']}, {machine['cores']} cores, {machine['directory']}, {machine['cache']} cache")
    for column in ("case", "size", "work", "wall", "source bytes/s", "x cp", "peak memory"):
        table.add_column(column, justify="left" if column in ("case", "work") else "right")
    for result in results:
        for i, (name, row) in enumerate(result["rows"].items()):
            table.add_row(
                result["case"] if i == 0 else "",
                f"{result['bytes'] / 1e9:.2f} GB" if i == 0 else "",
                name,
                f"{row['seconds']:.2f} s",
                f"{row['bytes_per_second'] / 1e9:.2f} GB/s",
                f"{row['ratio_to_cp']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
            )
    Console(width=120).print(table)


def missed(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        row = result["rows"]["convert"]
        if result["aim"] and row["ratio_to_cp"] > result["aim"]:
            yield f"{result['case']}: {row['ratio_to_cp']:.2f} x cp, the aim is {result['aim']}"
        if row["peak_bytes"] > 500e6:
            yield f"{result['case']}: peak memory {row['peak_bytes'] / 1e6:.0f} MB, the aim is 500 MB"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is given")
    parser.add_argument("--dir", type=Path, help="where to work; a directory on the disk to measure")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--experts", type=int, default=48, help="of DeepSeek-V4-Flash and Kimi-K3")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each run")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="fp4cast-bench-", dir=args.dir) as scratch:
        results = [measure(case, Path(scratch), args) for case in args.cases or CASES]
    machine = {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "directory": "memory" if str(args.dir or "").startswith("/dev/shm") else "disk",
        "cache": "cold" if args.cold else "warm",
    }
    show(results, machine)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    for line in missed(results):
        print("missed:", line)


if __name__ == "__main__":
    main()
