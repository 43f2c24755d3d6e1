"""Print the README's table of measured claims from benchmarks/results: one line a claim, in Markdown.

    python benchmarks/table.py [--update README.md] [DIRECTORY]

Reads what `--json` of the benchmarks wrote under the names of RESULTS, in that order; a file that is not there has no
lines, so the same results give the same table. DIRECTORY is benchmarks/results when none is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import FIGURES
from host import describe

RESULTS = (
    "convert-disk.json",
    "convert-disk-cold.json",
    "convert-memory.json",
    "verify-disk.json",
    "verify-disk-cold.json",
    "verify-memory.json",
    "memory.json",
    "scale.json",
    "peer.json",
)

TITLES = {
    "convert": "converting costs a copy",
    "verify": "verifying costs a read",
    "memory": "memory stays small",
    "scale": "1.56 TB and 497,220 tensors",
    "peer": "faster than nvidia-modelopt",
}
BEGIN, END = "<!-- benchmarks/table.py -->", "<!-- end -->"
HEAD = ("claim", "case", "fp4cast", "ceiling", "ratio", "peak memory")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def _where(facts: dict[str, Any], cache: str) -> str:
    return cache if facts["storage"] == "memory" else f"{facts['storage']}, {cache}"


def _figure(row: dict[str, Any], key: str) -> str:
    """A figure in words, with its rate where there is one."""
    text = FIGURES[key][1](row[key])
    rate = "bytes_per_second"
    return f"{text}, {FIGURES[rate][1](row[rate])}" if key == "seconds" and rate in row else text


def _ratio(row: dict[str, Any], item: dict[str, Any]) -> str:
    write = FIGURES[item["key"]][1]
    text = f"**{write(row[item['key']])}**"
    if item["limit"] is None:
        return text
    return f"{text} ({'at most' if item['most'] else 'at least'} {write(item['limit'])})"


def _line(document: dict[str, Any], result: dict[str, Any], item: dict[str, Any]) -> tuple[str, ...]:
    row, against = result["rows"][item["work"]], item["against"] or result["ceiling"]
    ceiling, figure = result["rows"][against], item["figure"]
    # A ceiling's own memory says nothing about an absolute limit on memory.
    top = f"`{against}`: {_figure(ceiling, figure)}" if figure in ceiling and item["key"] != "peak_bytes" else ""
    return (
        TITLES.get(document["benchmark"], document["benchmark"]),
        f"{result['case']}, {_size(result['bytes'])}, {_where(document['machine'], result['cache'])}",
        f"`{item['work']}`: {_figure(row, item['figure'])}",
        top,
        _ratio(row, item),
        FIGURES["peak_bytes"][1](row["peak_bytes"]) if "peak_bytes" in row else "",
    )


def documents(directory: Path) -> Iterator[dict[str, Any]]:
    """What is there."""
    for name in RESULTS:
        if (directory / name).exists():
            yield json.loads((directory / name).read_text())


def markdown(directory: Path) -> str:
    """The whole table, and where it was measured."""
    found = list(documents(directory))
    lines = [_line(document, r, item) for document in found for r in document["results"] for item in r["claims"]]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in [HEAD, ("---",) * len(HEAD), *lines])
    machines = dict.fromkeys(describe(document["machine"]) for document in found)
    return f"{table}\nMeasured on: {'; '.join(machines)}.\n"


def update(readme: Path, directory: Path) -> None:
    """Put the table between the README's marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{markdown(directory)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"RESULTS: {', '.join(RESULTS)}")
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--update", type=Path, metavar="README", help="put the table there instead of printing it")
    args = parser.parse_args()
    if args.update:
        update(args.update, args.directory)
    else:
        print(markdown(args.directory), end="")
