"""Write what pages show of the code and its figures: the families, the picture of the rooms, what attacks found.

python docs/generate.py            # rewrite the parts between the marks
python docs/generate.py --check    # exit with 1 where a page differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from imports import MODULES, SOURCE, imports_of, room
from names import PUBLIC, names_table

from fp4cast.cli.modelopt_options import ROWS, Row
from fp4cast.families.family import Family
from fp4cast.families.recognise import FAMILIES
from fp4cast.families.served import KNOWN, best_of_each_engine, served_by
from fp4cast.families.services import SERVICES, Service
from fp4cast.layouts.choose import targets_of

ROOT = Path(__file__).parent.parent
MARK, END = "<!-- docs/generate.py: {} -->", "<!-- end -->"


def proof() -> str:
    """The proof, as the study's page has it."""
    return (SOURCE / "study" / "proof.md").read_text().rstrip()


def families_table() -> str:
    """One line for each thing that is served alike, from the rows of `fp4cast.families.services`."""
    lines = ["| family | layout | activations | served by |", "|---|---|---|---|"]
    for family in FAMILIES:
        kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
        for layout, activations in ((target.layout.name, target.activations) for target in targets_of(family)):
            who = served_by(family.served_as, layout, activations)
            kinds[layout, who].append(activations.upper())
        for (layout, who), names in kinds.items():
            lines.append(f"| {family.title} | `{layout}` | {', '.join(names)} | {who} |")
    return "\n".join(lines)


def families_summary() -> str:
    """One line for families that are served, and alike, for the README: the engines, and what is known of each."""
    alike = defaultdict[str, list[str]](list)
    for family in FAMILIES:
        best = best_of_each_engine(family.served_as)
        if not best:
            continue
        engines = [f"{row.engine} ({', '.join(_limits(row, family))})" for row in best]
        known = {row.engine for row in best}
        fails = [row.engine for row in SERVICES if (row.family, row.verdict) == (family.served_as, "fails")]
        none = [engine for engine in dict.fromkeys(fails) if engine not in known]
        alike[f"{', '.join(engines)}{'; not ' * bool(none)}{', '.join(none)}"].append(family.title)
    lines = [f"| {', '.join(titles)} | {who} |" for who, titles in alike.items()]
    return "\n".join(["| family | engines |", "|---|---|", *lines])


def _limits(row: Service, family: Family) -> list[str]:
    """What a service holds for, if not for all of a family, and what is known of it."""
    limits = [row.models] * bool(row.models) + list(row.activations) * (row.activations != family.activations)
    return [*(limit.replace("w4a", "W4A") for limit in limits), KNOWN[row.verdict]]


def matrix() -> str:
    """Every row of `fp4cast.families.services`, with its source and date."""
    lines = ["| family | layout | activations | engine | verdict | when, where |", "|---|---|---|---|---|---|"]
    for row in SERVICES:
        models = f", {row.models}" if row.models else ""
        verdict = f"**{row.verdict}**" + (f": {row.why}" if row.why else "")
        how = f"{'run' if row.seen else 'read'} {row.date}" if row.verdict != "open" else row.date
        source = re.sub(r"([\w/]+\.py(?::[\d,-]+)?)", r"`\1`", row.source)
        kinds = ", ".join(row.activations).upper()
        when = f"{how}{': ' * bool(source)}{source}"
        cells = (f"{row.family}{models}", f"`{row.layout}`", kinds, row.release, verdict, when)
        lines.append(f"| {' | '.join(cells)} |")
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


def figures(name: str) -> dict[str, Any]:
    """What a script of tests/attacks or benchmarks has written."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def attacks_table() -> str:
    """One line an attack: how much of it, what must hold, how often it did not."""
    fuzz, faults, flips = figures("reliability/fuzz"), figures("reliability/faults"), figures("reliability/flips")
    commands = ", ".join(f"{row['inputs']:,} {name}" for name, row in fuzz["commands"].items() if name != "harness")
    broken = sum(row["findings"] for name, row in fuzz["commands"].items() if name != "harness")
    seconds, mib = fuzz["limits"]["seconds"], fuzz["limits"]["address_space_bytes"] >> 20
    rows = [
        ("attack", "how many", "what must hold", "broken", "slowest, largest", "when"),
        ("---",) * 6,
        (
            "[`fuzz.py`](../tests/attacks/fuzz.py): mutated checkpoints",
            f"{fuzz['inputs']:,} ({commands})",
            f"success, or an error that names the file; at most {seconds:g} s and {mib} MiB of address space beyond "
            "the start; no file written, SRC unchanged",
            f"{broken}",
            f"{fuzz['slowest']['seconds']:.1f} s, {fuzz['rss_bytes'] / 1e6:.0f} MB",
            fuzz["date"],
        ),
        (
            "[`faults.py`](../tests/attacks/faults.py): kill -9, ENOSPC, EIO, EROFS, EINTR, short and zero counts at "
            "calls that create, write, rename, remove or sync, and kills at random times",
            f"{faults['points']:,} points in {len(faults['by_scenario'])} scenarios",
            "DST absent or complete (old or new); the next run ends in the same bytes; SRC unchanged; nothing left",
            f"{faults['broken']}",
            "",
            faults["machine"]["date"],
        ),
        (
            "[`flips.py`](../tests/attacks/flips.py): bits flipped, tensors swapped, rows permuted, configs changed",
            f"{flips['changes']:,} in {len(flips['conversions'])} conversions",
            f"`verify` finds and names it ({flips['free']} changed no value, and that is said)",
            f"{flips['missed']}",
            "",
            flips["date"],
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def regions_table() -> str:
    """How many changes each region of a destination met, with its receipt and without it."""
    lines = [
        "| what was changed | changes | without the receipt | missed | changed no value |",
        "|---|---|---|---|---|",
    ]
    regions, none = figures("reliability/flips")["regions"], {"changes": 0, "missed": 0, "free": 0}
    for region, row in regions.items():
        if not region.endswith(" (no receipt)"):
            bare = regions.get(f"{region} (no receipt)", none)
            missed, free = row["missed"] + bare["missed"], row["free"] + bare["free"]
            lines.append(f"| {region} | {row['changes']:,} | {bare['changes']:,} | {missed} | {free} |")
    return "\n".join(lines)


def scenarios_table() -> str:
    """How many faults each scenario met."""
    lines = ["| scenario | faults |", "|---|---|"]
    for scenario, row in figures("reliability/faults")["by_scenario"].items():
        lines.append(f"| {scenario} | {sum(row.values()):,} |")
    return "\n".join(lines)


def gpu_table() -> str:
    """What `benchmarks/serve.py` measured on a GPU, each beside the BF16 twin in the same engine."""
    lines = ["| model | checkpoint | largest difference | mean | greedy tokens | experts' kernel |", "|" + "---|" * 6]
    for row in served_rows():
        if "max_delta" not in row:
            continue
        kernels = [match[1] for line in row["log"] if (match := re.search(r"Using '(\w+)' \w+ MoE backend", line))]
        deltas = f"{row['max_delta']:.5f} | {row['mean_delta']:.6f}"
        greedy, kernel = f"{row['greedy_equal']} of 3 equal", kernels[0].capitalize() if kernels else ""
        variant = row["variant"] + ", CUDA graphs" * row["graphs"]
        lines.append(f"| {row['model']} | {variant} | {deltas} | {greedy} | {kernel} |")
    return "\n".join(lines)


def rates_table() -> str:
    """Loading and speed of the rows that have them; speed beside that of the source through Marlin."""
    rows = [row for row in served_rows() if "rates" in row]
    peer = next(row["rates"] for row in rows if row["variant"] == "mxfp4, Marlin")
    lines = ["| checkpoint | loaded in | peak | held | prefill, tokens/s | decode, tokens/s |", "|" + "---|" * 6]
    for row in rows:
        loader, rates = row["loader"], row["rates"]
        sizes = " | ".join(f"{loader[key] / 1e9:.2f} GB" for key in ("peak_bytes", "held_bytes"))
        speed = " | ".join(f"{rates[key]:,.0f} ({rates[key] / peer[key]:.2f} ×)" for key in ("prefill", "decode"))
        lines.append(f"| {row['variant']} | {loader['seconds']:.1f} s | {sizes} | {speed} |")
    return "\n".join(lines)


def served_rows() -> list[dict[str, Any]]:
    """The rows of `benchmarks/serve.py` on a GPU."""
    found: list[dict[str, Any]] = figures("gpu/serve-h100")["rows"]
    return found


def options_table() -> str:
    """Every option of ModelOpt's two entries, and what becomes of it."""
    lines = ["| `hf_ptq.py` | `huggingface_example.sh` | here |", "|---|---|---|"]
    for row in ROWS:
        names = (", ".join(f"`{name}`" for name in each.split(", ") if name) for each in row.names)
        refused = f"**Refused**{' with another value' * bool(row.only)}: {row.refusal}" if row.refusal else ""
        here = " ".join(filter(None, (row.meaning, refused))).replace("|", r"\|")
        lines.append(f"| {' | '.join(names)} | {here} |")
    return "\n".join(lines)


def _shell_rows(accepted: bool) -> list[Row]:
    return [row for row in ROWS if row.names[1] and bool(row.meaning) is accepted]


def shell_usage() -> str:
    """The lines of the shell entry's help for options that the original has, too."""
    lines = [f"  {f'{row.names[1]} {row.value}':<26} {row.meaning}" for row in _shell_rows(accepted=True)]
    return "\n".join(["usage_of_options() {", "  cat <<'EOF'", *lines, "EOF", "}"])


def shell_refusals() -> str:
    """What the shell entry says of options, or of values, that it refuses."""
    lines = ["refusal() {", '  case "$1" in']
    lines += [f'    {row.names[1]}) echo "{row.names[1]}: {row.refusal}" ;;' for row in _shell_rows(accepted=False)]
    for row in _shell_rows(accepted=True):
        if row.only:
            lines.append(f"    {row.names[1]}={row.only}) ;;")
            lines.append(f'    {row.names[1]}=*) echo "${{1/=/ }}: {row.refusal}" ;;')
    return "\n".join([*lines, "  esac", "}"])


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"families": families_summary},
    "docs/exactness.md": {"proof": proof},
    "docs/ptq.md": {"options": options_table},
    "docs/targets.md": {"families": families_table},
    "docs/engines.md": {"gpu": gpu_table, "rates": rates_table, "matrix": matrix},
    "docs/architecture.md": {"picture": picture, "rooms": rooms_table},
    "docs/reference.md": {f"names {module}": partial(names_table, module) for module in PUBLIC},
    "scripts/parser.sh": {"usage": shell_usage, "refusals": shell_refusals},
    "docs/reliability.md": {"attacks": attacks_table, "regions": regions_table, "scenarios": scenarios_table},
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
            begin, end = (f"# docs/generate.py: {name}", "# end") if page.endswith(".sh") else (MARK.format(name), END)
            before, rest = new.split(begin)
            new = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
        if new != text and check:
            print(f"{page} is not what docs/generate.py writes")
            stale += 1
        elif new != text:
            (ROOT / page).write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main())
