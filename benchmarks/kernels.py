"""Claim: NVFP4 kernels run at the speed of a copy on the device. Needs a GPU; `PYTHONPATH=src` where not installed.

    python benchmarks/kernels.py [--shape 32 5760 2880] [--repeat 100] [--tune] [--json FILE]

Rows: Triton (fp4cast on a GPU), eager torch (fp4cast's reference on the same GPU), nvidia-modelopt's kernel where it is
installed. Ceiling: a device-to-device copy of x, counting bytes read and written. A row's rate counts what it must
read and write once: x, amax, the result. Times are medians by device events; results are checked, bit for bit,
against eager torch before they are timed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from fp4cast.kernels import gpu, reference
from fp4cast.torch import cast

LIMITS = {"fake quant, static": 85.0, "quantize and pack": 70.0}


def median_ms(work: Callable[[], object], repeat: int) -> float:
    """Median milliseconds of device time."""
    return float(triton.testing.do_bench(work, warmup=25, rep=repeat, return_mode="median"))


def peer_kernel() -> Callable[..., torch.Tensor] | str:
    """nvidia-modelopt's static fake quantization, or why it is not there."""
    try:
        from modelopt.torch.kernels.quantization.gemm.fp4_kernel import static_blockwise_fp4_fake_quant
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return static_blockwise_fp4_fake_quant


def equal(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if not torch.equal(a, b):
        raise SystemExit(f"{what}: {int((a != b).sum())} of {a.numel()} values differ")


def works(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and the bytes that each must move."""
    many, spare = x.numel(), torch.empty_like(x)
    scales, result = amax.numel() * amax.element_size(), x.numel() * x.element_size()
    stored = many // 2 + many // 16
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: spare.copy_(x), 2 * result),
        "fake quant, static": (lambda: gpu.fake_quant(x, amax, top, x.dtype, 16), 2 * result + scales),
        "fake quant, dynamic": (lambda: gpu.fake_quant(x, None, top, x.dtype, 16), 2 * result),
        "quantize and pack": (lambda: gpu.quantize(x, None, top, 16), result + stored),
        "quantize and pack, static": (lambda: gpu.quantize(x, amax, top, 16), result + stored + scales),
        "eager torch, fake quant": (lambda: reference.fake_quant(x, amax, top, x.dtype, 16), 2 * result + scales),
        "eager torch, quantize": (lambda: reference.quantize(x, None, top, 16), result + stored),
    }
    codes = torch.randint(0, 256, (many // 2,), dtype=torch.uint8, device=x.device)
    exponents = torch.randint(110, 125, (many // 32,), dtype=torch.uint8, device=x.device)
    source = 2 * (codes.numel() + exponents.numel())
    found["copy of the tensor as MXFP4"] = (lambda: (codes.clone(), exponents.clone()), source)
    # The codes are handed on; the rate counts them as if they were copied, to compare with the copy.
    found["cast of it, fp4cast.torch.cast"] = (lambda: cast(codes, exponents), source)
    peer = peer_kernel()
    if callable(peer):
        found["nvidia-modelopt, fake quant"] = (lambda: peer(x, amax, top), 2 * result + scales)
    else:
        print(f"nvidia-modelopt is not measured ({peer})")
    return found


def check(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor) -> None:
    """A slice of what is timed, against the reference."""
    part, limit = x.reshape(-1, 16)[: 1 << 20], amax[: 1 << 20]
    equal(gpu.fake_quant(part, limit, top, x.dtype, 16), reference.fake_quant(part, limit, top, x.dtype, 16), "static")
    for given in (limit, None):
        for ours, theirs in zip(
            gpu.quantize(part, given, top, 16), reference.quantize(part, given, top, 16), strict=True
        ):
            equal(ours, theirs, "quantize")
    peer = peer_kernel()
    if callable(peer):
        theirs = peer(part, limit, top)
        differ = int((theirs != gpu.fake_quant(part, limit, top, x.dtype, 16)).sum())
        print(f"nvidia-modelopt: {differ} of {theirs.numel()} values differ from ours")


def tune(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor, repeat: int) -> None:
    """Milliseconds for other sizes of programs."""
    for program in (1024, 2048, 4096, 8192):
        for warps in (1, 2, 4, 8):
            gpu._FAKE_QUANT = gpu._QUANTIZE = program, warps
            times = [median_ms(lambda: gpu.fake_quant(x, amax, top, x.dtype, 16), repeat)]
            for gpu._FUSED in (False, True):
                times.append(median_ms(lambda: gpu.quantize(x, None, top, 16), repeat))
            fake, plain, fused = times
            print(f"{program} values, {warps} warps: fake {fake:.3f} ms, quantize {plain:.3f}, fused {fused:.3f}")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", type=int, nargs="+", default=[32, 5760, 2880])
    made.add_argument("--repeat", type=int, default=200, help="milliseconds that each row is repeated for")
    made.add_argument("--tune", action="store_true")
    made.add_argument("--json", type=Path)
    args = made.parse_args()
    x = torch.randn(args.shape, device="cuda", dtype=torch.bfloat16)
    amax = x.reshape(-1, 16).abs().amax(dim=1).float()
    top = amax.amax()
    check(x, amax, top)
    if args.tune:
        tune(x, amax, top, args.repeat)
        return
    rows: dict[str, dict[str, float]] = {}
    for name, (work, nbytes) in works(x, amax, top).items():
        milliseconds = median_ms(work, args.repeat)
        rows[name] = {"milliseconds": milliseconds, "bytes_per_second": nbytes / milliseconds * 1e3}
    ceiling = rows["copy"]["bytes_per_second"]
    missed = []
    for name, row in rows.items():
        row["percent"] = 100 * row["bytes_per_second"] / ceiling
        print(
            f"{name:32} {row['milliseconds']:8.3f} ms {row['bytes_per_second'] / 1e9:8.0f} GB/s {row['percent']:6.1f} %"
        )
        if row["percent"] < LIMITS.get(name, 0):
            missed.append(f"{name}: {row['percent']:.1f} % of the copy, the aim is at least {LIMITS[name]:.0f} %")
    device = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(*missed, sep="\n")
    if args.json:
        document = {"benchmark": "kernels", "machine": device, "shape": args.shape, "rows": rows, "missed": missed}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
