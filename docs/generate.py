"""Write what pages show of the code: the table of families, and the picture of the rooms.

python docs/generate.py            # rewrite the parts between the marks
python docs/generate.py --check    # exit with 1 where a page differs
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from imports import MODULES, SOURCE, imports_of, room

from fp4cast.families.recognise import FAMILIES
from fp4cast.layouts.choose import targets_of

ROOT = Path(__file__).parent.parent
END = "<!-- end -->"


def families_table() -> str:
    """One line a family: where it can go, and who serves that, from the rows of `fp4cast.families`."""
    lines = ["| family | layout | activations | served by |", "|---|---|---|---|"]
    for family in FAMILIES:
        activations: dict[str, list[str]] = defaultdict(list)
        for target in targets_of(family):
            activations[target.layout.name].append(target.activations.upper())
        for layout, kinds in activations.items():
            lines.append(f"| {family.title} | `{layout}` | {', '.join(kinds)} | {family.served[layout]} |")
    return "\n".join(lines)


def families_summary() -> str:
    """One line a family, for the README."""
    lines = ["| family | served by, in which layout |", "|---|---|"]
    for family in FAMILIES:
        served = "; ".join(f"`{layout}`: {who}" for layout, who in family.served.items())
        lines.append(f"| {family.title} | {served} |")
    return "\n".join(lines)


def edges() -> dict[str, set[str]]:
    """Which room imports which; modules that lie in no room are the ground, and not drawn."""
    rooms = {name for name in map(room, MODULES) if (SOURCE / name).is_dir()}
    found: dict[str, set[str]] = {name: set() for name in sorted(rooms)}
    for module in MODULES:
        if room(module) in rooms:
            found[room(module)] |= {room(name) for name in imports_of(module)} & rooms - {room(module)}
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way says already."""

    def below(name: str) -> set[str]:
        return set().union(*({each} | below(each) for each in graph[name]))

    return {name: {each for each in to if not any(each in below(other) for other in to)} for name, to in graph.items()}


def picture() -> str:
    """The rooms as a Mermaid chart: an arrow leads from a room to what it imports."""
    arrows = [f"  {name} --> {each}" for name, to in reduced(edges()).items() for each in sorted(to)]
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```"])


def rooms_table() -> str:
    """What each room says of itself."""
    lines = ["| room | what it knows, and what it does not |", "|---|---|"]
    for name in edges():
        sentence = (SOURCE / name / "__init__.py").read_text().splitlines()[0].strip('"')
        lines.append(f"| [`{name}`](../src/fp4cast/{name}) | {sentence} |")
    return "\n".join(lines)


PARTS = {
    "README.md": {"families": families_summary},
    "docs/targets.md": {"families": families_table},
    "docs/architecture.md": {"picture": picture, "rooms": rooms_table},
}


def main() -> int:
    """Number of pages that differ, as the exit status of --check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, stale = parser.parse_args().check, 0
    for page, parts in PARTS.items():
        text = (ROOT / page).read_text()
        new = text
        for name, make in parts.items():
            begin = f"<!-- docs/generate.py: {name} -->"
            before, rest = new.split(begin)
            new = f"{before}{begin}\n{make()}\n{END}{rest.split(END, 1)[1]}"
        if new != text and check:
            print(f"{page} is not what docs/generate.py writes")
            stale += 1
        elif new != text:
            (ROOT / page).write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main())
