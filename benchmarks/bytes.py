"""The byte path in memory, one thread: what casting does to bytes, beside memcpy of the same bytes. Figures, no limits.

    python benchmarks/bytes.py [--matrices 16] [--repeat 5] [--json FILE]

Rows: turning a bank of --matrices uint8 matrices of gpt-oss's shapes, as fp4cast does it and by NumPy; doubling
scales; comparing two buffers eight bytes at a time. Each works through more bytes than a cache holds. Ceiling:
np.copyto of the bytes that the row reads, measured in turn; the comparison reads two buffers and writes none, and may
pass it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import Sample, alternate, finish, parser, summary
from fp4cast.casting.tight_rule import halve, scale_table
from fp4cast.checkpoints.tiles import LIMITS
from fp4cast.checkpoints.transpose import compiled, transpose
from fp4cast.verification import values as compare
from host import machine

SHAPES = ((5760, 1440), (2880, 1440))  # codes of gpt-oss's two projections
CHUNK_BYTES = 1 << 20


def turn(bank: np.ndarray, out: np.ndarray, transpose: Callable[[np.ndarray, np.ndarray], None]) -> None:
    """Transpose matrices one by one, in bands of rows, as `fp4cast.conversion.writer` does."""
    for matrix, turned in zip(bank, out, strict=True):
        for i in range(0, len(matrix), LIMITS.band_rows):
            transpose(matrix[i : i + LIMITS.band_rows], turned[:, i : i + LIMITS.band_rows])


def by_numpy(matrix: np.ndarray, out: np.ndarray) -> None:
    """What fp4cast does without a compiler."""
    out[:] = matrix.T


def double(scales: np.ndarray, table: np.ndarray) -> None:
    """`halve` of chunks: two E4M3 bytes for each E8M0 byte."""
    for i in range(0, len(scales), CHUNK_BYTES):
        halve(scales[i : i + CHUNK_BYTES], table)


def equal(left: np.ndarray, right: np.ndarray) -> None:
    """Compare chunks as uint64."""
    for i in range(0, len(left), CHUNK_BYTES):
        part = slice(i, i + CHUNK_BYTES)
        if not compare.equal(left[part], right[part]):
            raise AssertionError("equal buffers compare as different")


def clock(work: Callable[[], None]) -> Sample:
    begin = time.perf_counter()
    work()
    return Sample(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(name: str, data: np.ndarray, work: Callable[[], None], repeat: int) -> dict[str, Any]:
    """A result of two rows: memcpy of `data`, and the work on it."""
    copy = np.empty_like(data)
    works = {"memcpy": lambda _: clock(lambda: np.copyto(copy, data)), name: lambda _: clock(work)}
    alternate(1, works)  # touches every page once
    runs = alternate(repeat, works)
    rows = {key: summary(samples, runs["memcpy"], data.nbytes) for key, samples in runs.items()}
    for row in rows.values():
        row["percent"] = 100 / row["ratio"]
    claims: list[Any] = []
    return {
        "case": name,
        "bytes": data.nbytes,
        "cache": "in memory",
        "ceiling": "memcpy",
        "rows": rows,
        "claims": claims,
    }


def main() -> None:
    made = parser(__doc__, repeat=5)
    made.add_argument("--matrices", type=int, default=16)
    args = made.parse_args()
    if not compiled():
        raise SystemExit("fp4cast was installed without a C compiler: there is no compiled transpose to measure")
    rng = np.random.default_rng(0)
    results = []
    for rows, columns in SHAPES:
        bank = rng.integers(0, 256, (args.matrices, rows, columns), np.uint8)
        out = np.empty((args.matrices, columns, rows), np.uint8)
        for how, way in (("", transpose), (", NumPy", by_numpy)):
            name = f"transpose [{rows}, {columns}]{how}"
            results.append(measure(name, bank, lambda b=bank, o=out, w=way: turn(b, o, w), args.repeat))
            if not np.array_equal(out[-1], bank[-1].T):
                raise SystemExit("the transpose is wrong")
    scales = np.clip(rng.normal(119.5, 1.1, args.matrices << 22).round(), 111, 128).astype(np.uint8)
    table = scale_table(120)
    results.append(measure("halve scales", scales, lambda: double(scales, table), args.repeat))
    flat, twin = bank.reshape(-1), bank.reshape(-1).copy()
    results.append(measure("equal, as uint64", flat, lambda: equal(flat, twin), args.repeat))
    finish("bytes", machine(args.dir or Path.cwd()), results, args)


if __name__ == "__main__":
    main()
