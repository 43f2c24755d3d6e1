"""Single steps, each timed by scale.py and peer.py in a process of its own: `python steps.py STEP ARGUMENT...`.

Prints {"work_seconds": ...}: what the step itself took, without the start of Python and the imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PREAD_BYTES = 8 << 20


def headers(source: str) -> float:
    """Parse and check all headers, recognise the family, pair the tensors."""
    from fp4cast.checkpoints.directory import open_checkpoint
    from fp4cast.families.recognise import read_source

    begin = time.perf_counter()
    read_source(open_checkpoint(Path(source)))
    return time.perf_counter() - begin


def plan(source: str) -> float:
    """Everything that `convert` does before it writes: headers, all scales, the plan and its fingerprint."""
    from fp4cast.conversion.plan import make_plan

    begin = time.perf_counter()
    _ = make_plan(Path(source)).fingerprint
    return time.perf_counter() - begin


def plan_unread(source: str) -> float:
    """The same, with every read of tensor bytes answered by zeros from memory: all but the reading."""
    import numpy as np

    from fp4cast.checkpoints.byte_ranges import File

    zeros = np.zeros(PREAD_BYTES, np.uint8)

    def read(_: Any, start: int, nbytes: int) -> Any:  # noqa: ARG001
        return zeros[:nbytes] if nbytes <= len(zeros) else np.zeros(nbytes, np.uint8)

    def read_into(_: Any, start: int, out: Any) -> None:  # noqa: ARG001
        out.fill(0)

    File.read, File.read_into = read, read_into  # type: ignore[method-assign]
    return plan(source)


def preads(source: str, threads: str) -> float:
    """The ceiling: read the bytes of all scales with plain preads."""
    from fp4cast.checkpoints.directory import open_checkpoint

    tensors = [t for t in open_checkpoint(Path(source)).tensors.values() if t.name.endswith(".weight_scale")]
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {t.path for t in tensors}}

    def work(part: list[Any]) -> None:
        view = memoryview(bytearray(PREAD_BYTES))
        for t in part:
            for at in range(0, t.nbytes, PREAD_BYTES):
                os.preadv(descriptors[t.path], [view[: min(PREAD_BYTES, t.nbytes - at)]], t.start + at)

    many = int(threads)
    size = -(-len(tensors) // many)
    begin = time.perf_counter()
    with ThreadPoolExecutor(many) as pool:
        list(pool.map(work, [tensors[i : i + size] for i in range(0, len(tensors), size)]))
    return time.perf_counter() - begin


def modelopt(source: str, destination: str) -> float:
    """Cast one shard of Kimi-K3-like experts with nvidia-modelopt's primitives, in one thread.

    The order of calls is that of NVIDIA's own script for Kimi-K3: a shared exponent for w1 and w3, then tensor by
    tensor, then one file.
    """
    import torch
    from modelopt.torch.export import shard_cast_utils as peer
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    begin = time.perf_counter()
    out: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt", device="cpu") as shard:
        names = list(shard.keys())
        modules = [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]
        shared = peer.build_w13_kmax_overrides(modules, lambda m: shard.get_tensor(f"{m}.weight_scale"), "cpu")
        for module in modules:
            codes, scales = (shard.get_tensor(f"{module}.{part}") for part in ("weight_packed", "weight_scale"))
            k_max = shared[module] if module in shared else peer.mxfp4_kmax(scales, "cpu")
            cast, block, tensor, *_ = peer.quantize_mxfp4_to_nvfp4_lossless(codes, scales, k_max, "cpu")
            out |= {f"{module}.weight": cast, f"{module}.weight_scale": block, f"{module}.weight_scale_2": tensor}
    save_file(out, destination)
    return time.perf_counter() - begin


STEPS: dict[str, Callable[..., float]] = {
    step.__name__: step for step in (headers, plan, plan_unread, preads, modelopt)
}

if __name__ == "__main__":
    print(json.dumps({"work_seconds": STEPS[sys.argv[1]](*sys.argv[2:])}))
