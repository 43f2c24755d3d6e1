"""Claim: the whole PTQ flow with the cast costs less time and memory than nvidia-modelopt's on the same model.

    python benchmarks/ptq.py --dir DIR [--layers 6] [--source SRC] [--device cuda] [--json FILE]

Makes a gpt-oss checkpoint of gpt-oss-20b's true layer shapes in DIR (or takes SRC), and runs in processes of their own:
`fp4cast ptq --cast_mxfp4_to_nvfp4`; the same with `--low_memory_mode`; the same steps with nvidia-modelopt (load,
quantize with static weights, calibrate, pin the closed form's amax, export); `fp4cast calibrate` and `fp4cast convert`,
which need no model in memory. All calibrate on the same samples. Afterwards every value of our output is compared with
the source, and every tensor with the peer's. The first use of each library's kernels is not timed: it compiles them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "gpt-oss-tiny"
DOCS = Path(__file__).parent.parent / "docs"
SAMPLES, LENGTH, BATCH = 32, 512, 8
QFORMAT = "nvfp4_mlp_only"


def prepare(path: Path, layers: int) -> None:
    """The checkpoint, with the fixture's tokenizer, so that there is text to run it on."""
    from checkpoints import CASES, write

    write(path, CASES["gpt-oss-20b"](layers, 0.0))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FIXTURE / name, path / name)


@contextmanager
def timed(clock: dict[str, float], name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock[name] = time.monotonic() - begin


def peaks() -> dict[str, int]:
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "device": device}


def import_transformers() -> None:
    """It imports lazily; the clock is for the work."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config  # noqa: F401
    from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: F401


def run_ours(source: Path, out: Path, text: Path, device: str, low_memory_mode: bool = False) -> dict[str, Any]:
    from fp4cast.kernels import dynamic_fp4_fake_quant, quantize_nvfp4
    from fp4cast.ptq import Options, quantize

    import_transformers()
    x = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    quantize_nvfp4(x, amax=torch.ones(256, device=device)), dynamic_fp4_fake_quant(x)
    done = quantize(
        Options(
            source,
            out,
            QFORMAT,
            cast_mxfp4_to_nvfp4=True,
            dataset=str(text),
            calib_size=SAMPLES,
            calib_seq=LENGTH,
            batch_size=BATCH,
            device=device,
            low_memory_mode=low_memory_mode,
        )
    )
    return {"seconds": dict(done.seconds), "peak_memory": dict(done.peak_memory), "exact": done.exact}


def run_peer(source: Path, out: Path, text: Path, device: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    from fp4cast.checkpoints.directory import open_checkpoint
    from fp4cast.ptq.data import open_dataset, split, tokenize
    from fp4cast.ptq.load import load_model, load_tokenizer

    import_transformers()
    rules = static_rules(mtq.NVFP4_MLP_ONLY_CFG)
    warm = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(device)
    mtq.quantize(warm, static_rules(mtq.NVFP4_DEFAULT_CFG), lambda model: model(torch.ones(2, 64, device=device)))
    checkpoint, clock = open_checkpoint(source), dict[str, float]()
    samples = tokenize(open_dataset(str(text)), load_tokenizer(checkpoint), SAMPLES, LENGTH)

    def loop(model: Any) -> None:
        for batch in split(samples, BATCH):
            model.base_model(input_ids=batch.to(device), use_cache=False)

    with timed(clock, "load"):
        model = load_model(checkpoint, device)
    with timed(clock, "calibrate"), torch.no_grad():
        mtq.quantize(model, rules, loop)
    with timed(clock, "cast"):
        pin(model, source)
    with timed(clock, "export"), torch.no_grad():
        export_hf_checkpoint(model, export_dir=out)
    return {"seconds": clock, "peak_memory": peaks()}


def static_rules(config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's rules with static weight quantizers, as its cast needs them."""
    rules: dict[str, Any] = copy.deepcopy(config)
    for rule in rules["quant_cfg"]:
        if "weight_quantizer" in rule["quantizer_name"] and rule.get("cfg"):
            rule["cfg"]["block_sizes"]["type"] = "static"
    return rules


def pin(model: Any, source: Path) -> None:
    """The closed form of the cast by torch alone: 6 * 2^k and 6 * 448 * 2^(k_max - 8)."""
    from safetensors import safe_open

    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for name in [name for name in index if name.endswith("_scales")]:
        with safe_open(source / index[name], "pt") as file:
            k = file.get_tensor(name).float() - 127
        quantizer = model.get_submodule(name.removesuffix("_scales") + "_weight_quantizer")
        quantizer.global_amax = torch.tensor(6 * 448 * 2.0 ** (k.max().item() - 8), device=quantizer._amax.device)
        quantizer._amax.copy_((6 * 2.0**k).repeat_interleave(2, dim=-1).reshape(quantizer._amax.shape))


def run_calibrate(source: Path, out: Path, text: Path, device: str) -> dict[str, Any]:
    from fp4cast.ptq.layerwise.calibrate import calibrate

    import_transformers()
    out.mkdir()
    options = {"dataset": str(text), "calib_size": SAMPLES, "calib_seq": LENGTH, "batch_size": BATCH}
    found = calibrate(source, out / "amax.json", device=device, **options)
    return {"seconds": {"calibrate": found.seconds}, "peak_memory": peaks()}


def run_convert(source: Path, out: Path, _: Path, __: str) -> dict[str, Any]:
    import fp4cast

    scales = out.parent / "calibrate" / "amax.json"
    report = fp4cast.convert(source, out, activations="w4a4", input_scales=scales)
    return {"seconds": {"convert": report.seconds}, "peak_memory": peaks(), "exact": report.exact}


RUNS: dict[str, Callable[[Path, Path, Path, str], dict[str, Any]]] = {
    "ours": run_ours,
    "layers": partial(run_ours, low_memory_mode=True),
    "peer": run_peer,
    "calibrate": run_calibrate,
    "convert": run_convert,
}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes; of packed codes with -0 as 0, for the peer keeps no sign there."""
    stored = tensor.reshape(-1).view(torch.uint8)
    if tensor.dtype != torch.uint8:
        return stored
    low, high = stored & 0x0F, stored & 0xF0
    return torch.where(low == 8, 0, low) | torch.where(high == 0x80, 0, high)


def differences(a: Path, b: Path) -> list[str]:
    """Names of tensors that two directories hold differently."""
    left, right = tensors(a), tensors(b)
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    return [name for name in left if not torch.equal(bits(left[name]), bits(right[name]))]


def input_scale_error(a: Path, b: Path) -> float:
    """The largest relative difference of two directories' input scales."""
    left, right = tensors(a), tensors(b)
    names = [name for name in left if name.endswith("input_scale")]
    return max(abs(1 - left[name].item() / right[name].item()) for name in names)


def text_of_docs(path: Path) -> Path:
    path.write_text("\n".join(file.read_text() for file in sorted(DOCS.rglob("*.md"))))
    return path


def subprocess_run(name: str, source: Path, root: Path, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, "--dir", root, "--source", source, "--device", device]
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"seconds"')]
    if result.returncode or not lines:
        return {"error": f"exit status {result.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"CPU, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where checkpoints are made; emptied of what is made")
    parser.add_argument("--source", type=Path, help="take this checkpoint instead of making one")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    text = text_of_docs(args.dir / "text.txt")
    if args.only:
        print(json.dumps(RUNS[args.only](args.source, args.dir / args.only, text, args.device)))
        return
    source = args.source or args.dir / "source"
    if not source.exists():
        prepare(source, args.layers)
    rows = {}
    for name in RUNS:
        shutil.rmtree(args.dir / name, ignore_errors=True)
        rows[name] = subprocess_run(name, source, args.dir, args.device)
        print(name, json.dumps(rows[name]), flush=True)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    report: dict[str, Any] = {
        "device": device_name(args.device),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "model": {"layers": args.layers, "bytes": size},
        "samples": {"count": SAMPLES, "tokens": LENGTH, "batch": BATCH},
        "rows": rows,
        "low_memory_mode writes the same": not differences(args.dir / "ours", args.dir / "layers"),
        "ours equals convert with calibrate's scales": not differences(args.dir / "ours", args.dir / "convert"),
    }
    if "error" not in rows["peer"]:
        report["differs from the peer"] = differences(args.dir / "ours", args.dir / "peer")
        report["input scales differ by at most"] = input_scale_error(args.dir / "ours", args.dir / "peer")
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
