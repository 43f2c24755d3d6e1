"""Claim: fp4cast casts a shard many times as fast as nvidia-modelopt. One shard, file to file, one thread each.

    python benchmarks/peer.py [--dir DIR] [--experts 8] [--repeat 3] [--json FILE]

The shard holds --experts experts of [2048, 7168] under Kimi-K3's names (187 MB). nvidia-modelopt is driven through the
primitives that its own scripts use (modelopt.torch.export.shard_cast_utils, see steps.py), in a process of its own,
with one thread; fp4cast in its own with --jobs 1, without and with verification. Whole processes are compared, and the
work alone without Python's start and the imports (torch's take seconds). Ceiling: `cp` of the shard.

Then both outputs are decoded and compared, value by value: they must be equal but for the sign of zeros, which
nvidia-modelopt drops (it is counted). Needs nvidia-modelopt 0.47.0, torch and safetensors beside fp4cast.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import KIMI_CONFIG, KIMI_NAMES, Draft, experts, kimi_expert, write
from common import FP4CAST, Sample, alternate, apart, claim, finish, parser, scratch, step, summary, timed, verified
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.header import Tensor, read_header
from fp4cast.formats import nvfp4_values
from host import cache_state, machine, need, prepare, size

INNER, HIDDEN = 2048, 7168
SHARD, PEER = "model-00001-of-00001.safetensors", "peer.safetensors"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ROWS = 256  # decoded together


def make(path: Path, many: int) -> None:
    write(path, Draft([experts(kimi_expert, many, INNER, HIDDEN, KIMI_NAMES)], KIMI_CONFIG))


class Output:
    """One shard of NVFP4 experts, to be decoded."""

    def __init__(self, path: Path) -> None:
        self.tensors = read_header(path).tensors
        self.file = File(path)

    def modules(self) -> set[str]:
        """The cast modules, by their tensor scales."""
        return {name.removesuffix(".weight_scale_2") for name in self.tensors if name.endswith(".weight_scale_2")}

    def rows(self, tensor: Tensor, first: int) -> np.ndarray:
        """Some rows of a tensor's bytes."""
        width, last = tensor.shape[1], min(first + ROWS, tensor.shape[0])
        return self.file.read(tensor.start + first * width, (last - first) * width).reshape(-1, width)

    def values(self, module: str, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(packed codes, values) of some rows of a module."""
        codes, scales, scale = (self.tensors[module + end] for end in (".weight", ".weight_scale", ".weight_scale_2"))
        tensor_scale = float(self.file.read(scale.start, 4).view("<f4")[0])
        packed = self.rows(codes, first)
        return packed, nvfp4_values(packed, self.rows(scales, first), tensor_scale)


def compare(ours: Path, theirs: Path) -> dict[str, int]:
    """How many values, and how many signs of zeros, differ between two shards."""
    a, b = Output(ours), Output(theirs)
    counts = {"values": 0, "different_values": 0, "different_signs_of_zero": 0}
    if a.modules() != b.modules() or not a.modules():
        sys.exit(f"the peer cast {len(b.modules())} modules, fp4cast {len(a.modules())}")
    for module in sorted(a.modules()):
        for first in range(0, a.tensors[f"{module}.weight"].shape[0], ROWS):
            (left_codes, left), (right_codes, right) = a.values(module, first), b.values(module, first)
            counts["values"] += left.size
            counts["different_values"] += int((left != right).sum())
            if not np.array_equal(left_codes, right_codes):
                other = np.signbit(left) != np.signbit(right)
                counts["different_signs_of_zero"] += int((other & (left == 0) & (right == 0)).sum())
    return counts


def commands(root: Path, source: Path) -> dict[str, tuple[tuple[str, ...], Path, str]]:
    """By work: the command, what it makes, and the key under which its stdout says what the work itself took."""
    copy, peer, destination = root / "copy.safetensors", root / PEER, root / "dst"
    convert = (*FP4CAST, "convert", str(source), str(destination), "--jobs", "1", "--json")
    return {
        "cp": (("cp", str(source / SHARD), str(copy)), copy, ""),
        "modelopt": (step("modelopt", source / SHARD, peer), peer, "work_seconds"),
        "fp4cast, verified": (convert, destination, "seconds"),
        "fp4cast": ((*convert, "--no-verify"), destination, "seconds"),
    }


def measure(root: Path, many: int, repeat: int, facts: dict[str, Any]) -> dict[str, Any]:
    source, said = root / "source", root / "said.json"
    need(root, many * 120e6)
    apart(make, source, many)
    works = commands(root, source)
    work_seconds: dict[str, list[float]] = {work: [] for work, (*_, key) in works.items() if key}

    def run(work: str) -> Sample:
        command, made, key = works[work]
        shutil.rmtree(made, ignore_errors=True) if made.is_dir() else made.unlink(missing_ok=True)
        prepare(False, source)
        sample = timed(command, said, ONE_THREAD)
        if key:
            work_seconds[work].append(json.loads(said.read_text())[key])
        return sample

    runs = alternate(repeat, {work: lambda _, work=work: run(work) for work in works})
    verified(source, root / "dst")
    nbytes = size(source)
    rows = {work: summary(samples, runs["cp"], nbytes) for work, samples in runs.items()}
    for work, seconds in work_seconds.items():
        rows[work]["work_seconds"] = statistics.median(seconds)
        rows[work]["start_seconds"] = rows[work]["seconds"] - rows[work]["work_seconds"]
    for work in ("fp4cast, verified", "fp4cast"):
        for key, figure in (("seconds", "faster"), ("work_seconds", "work_faster")):
            rows[work][figure] = rows["modelopt"][key] / rows[work][key]
    return {
        "case": f"{many} experts of [{INNER}, {HIDDEN}]",
        "bytes": nbytes,
        "cache": cache_state(facts, False, nbytes),
        "ceiling": "cp",
        "rows": rows,
        "counts": compare(root / "dst" / SHARD, root / PEER),
        "claims": [claim("fp4cast", "seconds", "faster", None), claim("fp4cast", "work_seconds", "work_faster", None)],
    }


def main() -> None:
    made = parser(__doc__, repeat=3)
    made.add_argument("--experts", type=int, default=8)
    args = made.parse_args()
    if missing := [name for name in ("modelopt", "torch", "safetensors") if not importlib.util.find_spec(name)]:
        made.error(f"needs {', '.join(missing)}: pip install nvidia-modelopt==0.47.0 torch safetensors")
    # Once untimed, as for fp4cast: its bytecode and libraries are cached then.
    subprocess.run([sys.executable, "-c", "import modelopt.torch.export"], stderr=subprocess.DEVNULL, check=True)
    with scratch(args) as root:
        facts = machine(root) | {"modelopt": version("nvidia-modelopt"), "torch": version("torch")}
        result = measure(root, args.experts, args.repeat, facts)
    counts = result["counts"]
    print(", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items()))
    finish("peer", facts, [result], args)
    if counts["different_values"]:
        sys.exit("the peer's values differ from ours")


if __name__ == "__main__":
    main()
