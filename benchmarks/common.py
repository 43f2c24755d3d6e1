"""What every benchmark shares: timing whole process trees, rounds, medians, claims, tables and JSON.

A result is one case: rows of figures by the work that was done, the row that is the ceiling, and claims (which figure
of which row must keep which limit). `table.py` renders the same JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from host import describe

FP4CAST = (sys.executable, "-m", "fp4cast")
SAMPLE_SECONDS = 0.02
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# Every figure that a row may hold: the head of its column, and how it is written.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("wall", lambda v: f"{v:.2f} s"),
    "cpu_seconds": ("user + system", lambda v: f"{v:.3f} s"),
    "start_seconds": ("start, imports", lambda v: f"{v:.2f} s"),
    "work_seconds": ("work only", lambda v: f"{v:.2f} s"),
    "bytes_per_second": ("rate", lambda v: f"{v / 1e9:.2f} GB/s" if v >= 1e8 else f"{v / 1e6:.2f} MB/s"),
    "ratio": ("x ceiling", lambda v: f"{v:.2f} x"),
    "read_ratio": ("bytes read", lambda v: f"{v:.2f} x"),
    "percent": ("of ceiling", lambda v: f"{v:.1f} %"),
    "faster": ("x as fast", lambda v: f"{v:.1f} x"),
    "work_faster": ("x, work only", lambda v: f"{v:.1f} x"),
    "microseconds": ("a pair", lambda v: f"{v:.1f} us"),
    "peak_bytes": ("peak memory", lambda v: f"{v / 1e6:.0f} MB"),
}


class Sample(NamedTuple):
    """One timed command: wall seconds, the largest resident memory of its process tree, and its processor's seconds."""

    seconds: float
    peak_bytes: int
    cpu_seconds: float = 0.0


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _tree_bytes(pid: int) -> int:
    """Resident bytes of a process and all below it; pages that they share count more than once."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return own + sum(_tree_bytes(child) for child in _children(pid))
    except (OSError, IndexError):
        return 0  # it has just ended


def timed(command: Sequence[str], output: Path | None = None, env: Mapping[str, str] | None = None) -> Sample:
    """Run a command to its end; stdout goes to `output` or nowhere.

    Memory is resident memory only. A child inherits its parent's mark of ru_maxrss, so that figure counts where it is
    above our own; the samples see all processes of the tree at once.
    """
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks, done = [0], threading.Event()

    def watch(pid: int) -> None:
        while True:
            peaks[0] = max(peaks[0], _tree_bytes(pid))
            if done.wait(SAMPLE_SECONDS):
                return

    with tempfile.TemporaryFile() as errors, Path(output or os.devnull).open("wb") as out:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env={**os.environ, **(env or {})})
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        done.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-2000:]
            sys.exit(f"{' '.join(command)[:500]}\nfailed with exit status {process.returncode}:\n{tail}")
    peak = max(peaks[0], usage.ru_maxrss * 1024 if usage.ru_maxrss > inherited else 0)
    return Sample(seconds, peak, usage.ru_utime + usage.ru_stime)


def step(name: str, *arguments: object) -> tuple[str, ...]:
    """The command that does a step of steps.py."""
    return (sys.executable, str(Path(__file__).with_name("steps.py")), name, *map(str, arguments))


def apart(function: Callable[..., None], *args: object) -> None:
    """Call in a process of its own, so that its memory does not count as ours, nor as that of our children."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed with exit status {process.exitcode}")


def verified(source: Path, destination: Path) -> dict[str, Any]:
    """What `fp4cast verify` says; the benchmark ends here when that is not that every value is equal."""
    command = [*FP4CAST, "verify", str(source), str(destination), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout or "{}")
    if done.returncode or report.get("exact") is not True:
        why = report.get("differences", [])[:5] or done.stderr[-2000:]
        sys.exit(f"{destination} does not verify (exit status {done.returncode}): {why}")
    return report


def alternate(rounds: int, works: Mapping[str, Callable[[bool], Sample]]) -> dict[str, list[Sample]]:
    """Do every work once a round, one after the other; each is told whether it is the last time."""
    runs: dict[str, list[Sample]] = {work: [] for work in works}
    for i in range(rounds):
        for work, do in works.items():
            runs[work].append(do(i == rounds - 1))
    return runs


def summary(samples: Sequence[Sample], base: Sequence[Sample], nbytes: int) -> dict[str, Any]:
    """Medians, the ratio being that of pairs of the same round."""
    seconds = statistics.median(sample.seconds for sample in samples)
    return {
        "seconds": seconds,
        "bytes_per_second": nbytes / seconds,
        "ratio": statistics.median(s.seconds / b.seconds for s, b in zip(samples, base, strict=True)),
        "peak_bytes": max(sample.peak_bytes for sample in samples),
        "samples": [round(sample.seconds, 4) for sample in samples],
    }


def claim(
    work: str, figure: str, key: str, limit: float | None, *, most: bool = True, against: str | None = None
) -> dict[str, Any]:
    """That row `work` keeps `limit` in figure `key`; a table shows `figure` of it and of `against`, or the ceiling."""
    return {"work": work, "figure": figure, "key": key, "limit": limit, "most": most, "against": against}


def show(name: str, facts: dict[str, Any], results: Iterable[dict[str, Any]]) -> None:
    results = list(results)
    keys = [key for key in FIGURES if any(key in row for result in results for row in result["rows"].values())]
    table = Table(title=f"{name}: {describe(facts)}")
    for head in ("case", "size", "cache", "work"):
        table.add_column(head)
    for key in keys:
        table.add_column(FIGURES[key][0], justify="right")
    for result in results:
        for i, (work, row) in enumerate(result["rows"].items()):
            about = (result["case"], f"{result['bytes'] / 1e9:.2f} GB", result["cache"])
            head = f"{work} (ceiling)" if work == result["ceiling"] else work
            cells = (FIGURES[key][1](row[key]) if key in row else "" for key in keys)
            table.add_row(*(about if i == 0 else ("", "", "")), head, *cells)
    Console(width=max(140, Console().width)).print(table)


def missed(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        for item in result["claims"]:
            value, limit = result["rows"][item["work"]][item["key"]], item["limit"]
            if limit is not None and (value > limit if item["most"] else value < limit):
                head, write = FIGURES[item["key"]]
                side = "at most" if item["most"] else "at least"
                yield f"{result['case']}, {item['work']}: {head} {write(value)}, the aim is {side} {write(limit)}"


def parser(doc: str | None, *, repeat: int = 0) -> argparse.ArgumentParser:
    """The options of every benchmark; `repeat` is the default number of rounds, where there are rounds."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        sys.exit("this kernel does not list a task's children in /proc: memory cannot be measured")
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dir", type=Path, help="where to work; a directory on the disk to measure")
    if repeat:
        made.add_argument("--repeat", type=int, default=repeat, help="rounds; figures are medians")
    made.add_argument("--json", type=Path, help="write the figures there")
    made.add_argument("--report", action="store_true", help="exit with 0 even when a claim is missed")
    return made


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    """A directory to work in, once Python's bytecode and libraries are where later runs find them."""
    subprocess.run([*FP4CAST, "demo", "--quiet"], stdout=subprocess.DEVNULL, check=True)
    with tempfile.TemporaryDirectory(prefix="fp4cast-bench-", dir=args.dir) as path:
        yield Path(path)


def finish(name: str, facts: dict[str, Any], results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Show, write, and judge."""
    lines = list(missed(results))
    show(name, facts, results)
    if args.json:
        document = {"benchmark": name, "machine": facts, "results": results, "missed": lines}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    for line in lines:
        print("missed:", line)
    if lines and not args.report:
        sys.exit(1)
