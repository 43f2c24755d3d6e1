"""Print the tables of measured claims from benchmarks/results: one line a claim, and the README's rows.

    python benchmarks/table.py [--results DIRECTORY] [--update PAGE ...]

Reads what `--json` of the benchmarks wrote under the names of RESULTS, in that order; a file that is not there has no
lines, so the same results give the same tables. Without --update both tables are printed. A page gets those for which
it has a mark, one of MARKS.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import FIGURES, missed
from host import describe

RESULTS = (
    "convert-disk.json",
    "convert-disk-cold.json",
    "convert-memory.json",
    "verify-disk.json",
    "verify-disk-cold.json",
    "verify-memory.json",
    "cores.json",
    "memory.json",
    "scale.json",
    "startup.json",
    "peer.json",
)

TITLES = {
    "convert": "converting costs a copy",
    "verify": "verifying costs a read",
    "cores": "many cores are used",
    "memory": "memory stays small",
    "scale": "1.56 TB and 497,220 tensors",
    "startup": "starting costs little",
    "peer": "faster than nvidia-modelopt",
}
PEER = ("faster", "work_faster")  # figures beside nvidia-modelopt, not beside the ceiling
HEAD = ("claim", "case", "fp4cast", "beside", "ratio", "limit", "peak memory")
_NAMED = 2  # limits that the README names, where no more are missed
SUMMARY_HEAD = ("", "beside", "rounds", "median", "worst", "limits met")


class Row(NamedTuple):
    """A row of the README's table: one figure of one benchmark, over all rounds of all cases.

    Attributes:
        benchmark: whose results.
        works: the rows of each case that count.
        key: the figure, of `FIGURES`, relative to the ceiling or to a peer.
        label: the row's first cell.
        beside: what the figure is relative to, for people.
        most: a large figure is a bad one.
    """

    benchmark: str
    works: tuple[str, ...]
    key: str
    label: str
    beside: str
    most: bool


SUMMARY = (
    Row("convert", ("convert",), "ratio", "time, `convert --no-verify`", "`cp -r`", True),
    Row("convert", ("convert, verified",), "ratio", "time, `convert`", "`cp -r`", True),
    Row("verify", ("verify",), "percent", "speed, `verify`", "`cat` of both sides", False),
    Row("memory", ("convert", "verify"), "percent", "peak memory, 2 workers", "300 MB + 64 MB a worker", True),
    Row("peer", ("fp4cast, verified",), "faster", "speed, `convert`", "nvidia-modelopt 0.47", False),
)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.{0 if nbytes >= 1e6 else 1}f} MB"


def _where(facts: dict[str, Any], cache: str) -> str:
    return cache if facts["storage"] == "memory" else f"{facts['storage']}, {cache}"


def _figure(row: dict[str, Any], key: str) -> str:
    """A figure in words, with its rate where there is one."""
    text = FIGURES[key][1](row[key])
    rate = "bytes_per_second"
    return f"{text}, {FIGURES[rate][1](row[rate])}" if key == "seconds" and rate in row else text


def _met(result: dict[str, Any], item: dict[str, Any]) -> bool:
    return not list(missed([{**result, "claims": [item]}]))


def _judged(result: dict[str, Any], item: dict[str, Any]) -> tuple[str, str]:
    """The figure with its limit, bold where it keeps it, and in a word whether it does."""
    write = FIGURES[item["key"]][1]
    text = write(result["rows"][item["work"]][item["key"]])
    if item["limit"] is None:
        return text, ""
    limit = f"({'at most' if item['most'] else 'at least'} {write(item['limit'])})"
    return (f"**{text}** {limit}", "met") if _met(result, item) else (f"{text} {limit}", "missed")


def _line(document: dict[str, Any], result: dict[str, Any], item: dict[str, Any]) -> tuple[str, ...]:
    row, figure = result["rows"][item["work"]], item["figure"]
    against = item["against"] or ("modelopt" if item["key"] in PEER else result["ceiling"])
    ceiling = result["rows"][against]
    # A ceiling's own memory says nothing about an absolute limit on memory.
    top = f"`{against}`: {_figure(ceiling, figure)}" if figure in ceiling and item["key"] != "peak_bytes" else ""
    return (
        TITLES.get(document["benchmark"], document["benchmark"]),
        f"{result['case']}, {_size(result['bytes'])}, {_where(document['machine'], result['cache'])}",
        f"`{item['work']}`: {_figure(row, item['figure'])}",
        top,
        *_judged(result, item),
        FIGURES["peak_bytes"][1](row["peak_bytes"]) if "peak_bytes" in row else "",
    )


def _rounds(result: dict[str, Any], work: str, key: str) -> list[float]:
    """A relative figure of each round, where rounds were kept; else the one figure of the case."""
    row, ceiling = result["rows"][work], result["rows"][result["ceiling"]]
    if key not in ("ratio", "percent") or "samples" not in row:
        return [row[key]]
    ratios = [mine / floor for mine, floor in zip(row["samples"], ceiling["samples"], strict=True)]
    return [100 / ratio for ratio in ratios] if key == "percent" else ratios


def _figures(row: Row, document: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Every figure of a row, and where it was measured."""
    for result in document["results"]:
        where = f"{result['case']}, {document['machine']['file_system']}"
        for work in row.works:
            if work not in result["rows"]:
                continue  # of a run before it was measured
            yield from ((value, where) for value in _rounds(result, work, row.key))


def _summary_line(row: Row, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    own = [document for document in found if document["benchmark"] == row.benchmark]
    figures = [figure for document in own for figure in _figures(row, document)]
    worst, where = max(figures) if row.most else min(figures)
    judged = [(r, item) for d in own for r in d["results"] for item in r["claims"] if item["limit"] is not None]
    limits = [_met(r, item) for r, item in judged if item["work"].removesuffix(", sync") in row.works]
    write = FIGURES[row.key][1]
    return (
        row.label,
        row.beside,
        str(len(figures)),
        write(statistics.median(value for value, _ in figures)),
        f"{write(worst)} ({where})" if len(figures) > 1 else write(worst),
        f"{sum(limits)} of {len(limits)}" if limits else "",
    )


def _misses(document: dict[str, Any]) -> Iterator[str]:
    for result in document["results"]:
        for item in result["claims"]:
            figure, verdict = _judged(result, item)
            if verdict == "missed":
                yield f"`{item['work']}` of {result['case']}, {document['machine']['file_system']}: {figure}"


def documents(directory: Path) -> Iterator[dict[str, Any]]:
    """What is there."""
    for name in RESULTS:
        if (directory / name).exists():
            yield json.loads((directory / name).read_text())


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ("---",) * len(head), *lines])


def markdown(directory: Path) -> str:
    """The whole table, and where it was measured."""
    found = list(documents(directory))
    lines = [_line(document, r, item) for document in found for r in document["results"] for item in r["claims"]]
    machines = dict.fromkeys(describe(document["machine"]) for document in found)
    return f"{_table(HEAD, lines)}\nMeasured on: {'; '.join(machines)}.\n"


def summary(directory: Path) -> str:
    """The README's rows, medians and worst figures of all rounds of all cases, and how many limits were missed."""
    found = list(documents(directory))
    measured = {document["benchmark"] for document in found}
    rows = _table(SUMMARY_HEAD, (_summary_line(row, found) for row in SUMMARY if row.benchmark in measured))
    misses = [line for document in found for line in _misses(document)]
    if len(misses) > _NAMED:
        return rows + f"\nMissed, by their medians: {len(misses)}, [named there](docs/performance.md#measured).\n"
    return rows + (f"\nMissed, by their medians: {'; '.join(misses)}.\n" if misses else "")


MARKS = {"<!-- benchmarks/table.py -->": markdown, "<!-- benchmarks/table.py: summary -->": summary}
END = "<!-- end -->"


def update(page: Path, directory: Path) -> None:
    """Put each table between its mark and the next end."""
    text = page.read_text()
    for mark, write in MARKS.items():
        if mark in text:
            before, rest = text.split(mark)
            text = f"{before}{mark}\n{write(directory)}{END}{rest.partition(END)[2]}"
    page.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIRECTORY")
    parser.add_argument("--update", type=Path, nargs="+", metavar="PAGE", help="put the tables there, print nothing")
    args = parser.parse_args()
    for page in args.update or ():
        update(page, args.results)
    if not args.update:
        print(markdown(args.results), summary(args.results), sep="\n", end="")
