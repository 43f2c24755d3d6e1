"""Which engine reads what `convert` writes, in the words of the rows in `families.services`.

Everything that says who serves a result is made of these rows: `inspect`, reports, the README and docs/engines.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from fp4cast.families.services import SERVICES, Service, Verdict
from fp4cast.formats import Activations


def rows_of(family: str, layout: str, activations: Activations) -> list[Service]:
    """The rows about one kind of result."""
    return [row for row in SERVICES if (row.family, row.layout) == (family, layout) and activations in row.activations]


# The verdicts that promise something, the best first, and the word for each.
KNOWN: dict[Verdict, str] = {"serves": "run", "loads": "loaded", "should": "read"}


def serving_rows(family: str, layout: str, activations: Activations) -> list[Service]:
    """Of each engine that promises something for a kind of result, the row that promises most."""
    return list(_first_of_each_engine(_good(rows_of(family, layout, activations))))


def failing_rows(family: str, layout: str, activations: Activations) -> list[Service]:
    """Of each engine that fails with a kind of result, the newest row that says so."""
    return list(_first_of_each_engine([r for r in rows_of(family, layout, activations) if r.verdict == "fails"]))


def served_by(family: str, layout: str, activations: Activations) -> str:
    """Who serves a kind of result, for people: the best that is known of each engine.

    Args:
        family: the name of a `Family`.
        layout: the name of a layout.
        activations: of the result.
    """
    good, bad = serving_rows(family, layout, activations), failing_rows(family, layout, activations)
    said = ", ".join(f"{row.release} ({_kind(row)}{KNOWN[row.verdict]})" for row in good)
    fails = ", ".join(f"{row.release}{f' ({row.models})' * bool(row.models)}" for row in bad)
    return (said or "no engine that we ran or read") + (f"; not {fails}" if fails else "")


# How a server of each engine is started; transformers is none.
_SERVERS = {
    "vLLM": "vllm serve {}",
    "vLLM + fp4cast.vllm": "vllm serve {}",
    "SGLang": "python -m sglang.launch_server --model-path {}",
    "TensorRT-LLM": "trtllm-serve {}",
}


def serving_command(family: str, layout: str, activations: Activations, path: str) -> str:
    """The command that serves a result, in the engine of which most is known; or that there is none yet.

    Args:
        family: the name of a `Family`.
        layout: the name of a layout.
        activations: of the result.
        path: the result.
    """
    good = _good(rows_of(family, layout, activations))
    if commands := [command for row in good if (command := command_of(row, path))]:
        return commands[0]
    others = f"; {good[0].release} loads it" if good else ""
    return f"no server that we ran or read serves this{others}. docs/engines.md says which others do what"


def command_of(row: Service, path: str) -> str:
    """The command that serves a result at a path, with what is known of it; empty where the engine is no server."""
    if row.engine not in _SERVERS:
        return ""
    plugin = ", with fp4cast installed beside it" * ("fp4cast" in row.engine)
    kind = f", {row.models} models" * bool(row.models)
    command = _SERVERS[row.engine].format(shlex.quote(path))
    return f"{command}   # {row.engine.partition(' + ')[0]} {row.version}{plugin} ({KNOWN[row.verdict]}{kind})"


def best_of_each_engine(family: str) -> list[Service]:
    """The row that promises most of each engine, in any layout."""
    return list(_first_of_each_engine(_good([row for row in SERVICES if row.family == family])))


def _good(rows: Sequence[Service]) -> list[Service]:
    return [row for verdict in KNOWN for row in rows if row.verdict == verdict]


def _first_of_each_engine(rows: Sequence[Service]) -> Iterator[Service]:
    taken = set[tuple[str, str]]()
    for row in rows:
        if not taken & {(row.engine, row.models), (row.engine, "")}:
            taken.add((row.engine, row.models))
            yield row


def _kind(row: Service) -> str:
    return f"{row.models}, " if row.models else ""
