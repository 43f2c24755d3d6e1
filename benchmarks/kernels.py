"""Claim: NVFP4 kernels run at the speed of a copy on the device. Needs a GPU; `PYTHONPATH=src` where not installed.

    python benchmarks/kernels.py [--shape 32 5760 2880 ...] [--repeat 100] [--others] [--tune] [--json FILE]

Rows: Triton (fp4cast on a GPU) for FP32, FP16 and BF16 in 2, 3 and 4 dimensions, odd sizes and a small one among them.
`--others` instead: eager torch (fp4cast's reference on the same GPU), and nvidia-modelopt's kernel where it is
installed, for the first shape in BF16. Ceiling: a device-to-device copy of the same x, counting bytes read and written.
A row's rate counts what it must read and write once: x, amax, the result. Times are medians by device events; results
are checked, bit for bit, against eager torch before they are timed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from fp4cast.kernels import gpu, packing, reference
from fp4cast.torch import cast

SHAPES = ((32, 5760, 2880), (30011, 17680), (3, 7, 4999, 5072), (2880, 2880))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {"fake quant": 85.0, "quantize and pack": 85.0, "cast": 95.0}  # by a name's beginning
LARGE = 1 << 26  # values; the limits are for tensors from here on, which no cache holds

Work = tuple[Callable[[], Any], int]


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


def ours(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor) -> dict[str, Work]:
    """A copy, what is timed for every type and shape, and the bytes that each must move."""
    spare = torch.empty_like(x)
    scales, result = amax.numel() * amax.element_size(), x.numel() * x.element_size()
    stored = x.numel() // 2 + x.numel() // 16
    return {
        "copy": (lambda: spare.copy_(x), 2 * result),
        "fake quant, static": (lambda: gpu.fake_quant(x, amax, top, x.dtype, 16), 2 * result + scales),
        "fake quant, dynamic": (lambda: gpu.fake_quant(x, None, top, x.dtype, 16), 2 * result),
        "quantize and pack": (lambda: gpu.quantize(x, None, top, 16), result + stored),
        "quantize and pack, static": (lambda: gpu.quantize(x, amax, top, 16), result + stored + scales),
    }


def others(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor) -> dict[str, Work]:
    """What else reaches the same results, for one type and shape."""
    spare = torch.empty_like(x)
    scales, result = amax.numel() * amax.element_size(), x.numel() * x.element_size()
    found: dict[str, Work] = {
        "copy": (lambda: spare.copy_(x), 2 * result),
        "eager torch, fake quant": (lambda: reference.fake_quant(x, amax, top, x.dtype, 16), 2 * result + scales),
        "eager torch, quantize": (lambda: reference.quantize(x, None, top, 16), result + result // 4 + result // 32),
    }
    peer = peer_kernel()
    if callable(peer):
        part, limit = x.view(-1, 16)[: 1 << 20], amax[: 1 << 20]
        differ = int((peer(part, limit, top) != gpu.fake_quant(part, limit, top, x.dtype, 16)).sum())
        print(f"nvidia-modelopt: {differ} of {part.numel()} values differ from ours")
        found["nvidia-modelopt, fake quant"] = (lambda: peer(x, amax, top), 2 * result + scales)
    else:
        print(f"nvidia-modelopt is not measured ({peer})")
    return found


def casts(many: int) -> dict[str, Work]:
    """The cast of a tensor of MXFP4, which hands its codes on: its rate counts them as if they were copied."""
    blocks = many // 32
    codes = torch.randint(0, 256, (blocks * 16,), dtype=torch.uint8, device="cuda")
    exponents = torch.randint(110, 125, (blocks,), dtype=torch.uint8, device="cuda")
    source = 2 * (codes.numel() + exponents.numel())
    return {
        "copy": (lambda: (codes.clone(), exponents.clone()), source),
        "cast of MXFP4, fp4cast.torch.cast": (lambda: cast(codes, exponents), source),
    }


def check(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor) -> None:
    """The last part of what is timed, against the reference."""
    part, limit = x.view(-1, 16)[-(1 << 20) :], amax[-(1 << 20) :]
    equal(gpu.fake_quant(part, limit, top, x.dtype, 16), reference.fake_quant(part, limit, top, x.dtype, 16), "static")
    for given, whole in ((limit, amax), (None, None)):
        for mine, theirs in zip(gpu.quantize(x, whole, top, 16), reference.quantize(part, given, top, 16), strict=True):
            equal(mine.view(len(amax), -1)[-(1 << 20) :], theirs.view(len(part), -1), "quantize")


def tune(x: torch.Tensor, amax: torch.Tensor, top: torch.Tensor, repeat: int) -> None:
    """Milliseconds for other sizes of programs."""
    for gpu._VALUES in (2048, 4096, 8192):
        for gpu._WARPS in (2, 4, 8):
            milliseconds = median_ms(lambda: gpu.fake_quant(x, amax, top, x.dtype, 16), repeat)
            print(f"fake quant, {gpu._VALUES} values, {gpu._WARPS} warps: {milliseconds:.3f} ms")
    for packing._WARPS in (1, 2, 4, 8):
        own, given = (median_ms(lambda a=a: gpu.quantize(x, a, top, 16), repeat) for a in (None, amax))  # type: ignore[misc]
        print(f"quantize, {packing._WARPS} warps: {own:.3f} ms, static {given:.3f}")


def measure(
    works: dict[str, Work], values: int, repeat: int, what: str
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Each row's milliseconds, rate and share of the copy's, and which large ones miss their aim."""
    rows: dict[str, dict[str, float]] = {}
    missed = []
    for name, (work, nbytes) in works.items():
        milliseconds = median_ms(work, repeat)
        rate = nbytes / milliseconds * 1e3
        percent = 100 * rate / (rows["copy"]["bytes_per_second"] if rows else rate)
        rows[name] = {"milliseconds": milliseconds, "bytes_per_second": rate, "percent": percent}
        print(f"{what:32} {name:34} {milliseconds:8.3f} ms {rate / 1e9:6.0f} GB/s {percent:6.1f} %")
        aim = next((LIMITS[each] for each in LIMITS if name.startswith(each)), 0.0)
        if values >= LARGE and percent < aim:
            missed.append(f"{what}: {name}: {percent:.1f} % of the copy, the aim is at least {aim:.0f} %")
    return rows, missed


def made(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal values, their blocks' largest, and the largest of all."""
    x = torch.randn(shape, device="cuda", dtype=dtype)
    amax = torch.linalg.vector_norm(x.view(-1, 16), ord=math.inf, dim=1).float()
    return x, amax, amax.amax()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", type=int, nargs="+", action="append", help="instead of the four of the claim")
    options.add_argument("--repeat", type=int, default=200, help="milliseconds that each row is repeated for")
    options.add_argument("--others", action="store_true", help="eager torch and nvidia-modelopt")
    options.add_argument("--tune", action="store_true")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    shapes = [tuple(each) for each in args.shape] if args.shape else list(SHAPES)
    if args.tune:
        tune(*made(shapes[0], DTYPES[0]), args.repeat)
        return
    measured: list[dict[str, Any]] = []
    missed: list[str] = []
    for shape in shapes[:1] if args.others else shapes:
        for dtype in DTYPES[:1] if args.others else DTYPES:
            tensors, name = made(shape, dtype), str(dtype).removeprefix("torch.")
            check(*tensors)
            works = others(*tensors) if args.others else ours(*tensors)
            rows, fewer = measure(works, math.prod(shape), args.repeat, f"{name} {list(shape)}")
            measured.append({"shape": shape, "dtype": name, "rows": rows})
            missed += fewer
            del tensors, works
        if not args.others:
            rows, fewer = measure(casts(math.prod(shape)), math.prod(shape), args.repeat, f"mxfp4 {list(shape)}")
            measured.append({"shape": shape, "dtype": "mxfp4", "rows": rows})
            missed += fewer
    device = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(*missed, sep="\n")
    if args.json:
        document = {"benchmark": "kernels", "machine": device, "measured": measured, "missed": missed}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
