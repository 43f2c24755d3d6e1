"""Which modules do the entries of a config's `ignore` mean? Anybody may have written them: the time is bounded.

Python's regular expressions can take for ever and cannot be stopped in a thread. So this file is also the program of a
process that matches them, as compressed-tensors does (`re.match`), and that ends when its time is over.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

SECONDS = 5.0
_WILD = frozenset("*?[")
_SECONDS_PER_MATCH = 50e-6  # some hundred times what an ordinary pattern takes


class PatternError(ValueError):
    """An entry is not a valid pattern, or takes too long to match."""


def names_and_expressions(entries: Iterable[str], modules: Sequence[str]) -> set[str]:
    """The modules that entries mean for compressed-tensors: names, and regular expressions after `re:`.

    Raises:
        PatternError: an expression is not valid, or is not matched in time.
    """
    entries = set(entries)
    patterns = sorted(entry.removeprefix("re:") for entry in entries if entry.startswith("re:"))
    found = entries.intersection(modules)
    if patterns and modules:
        for positions in _match(patterns, modules):
            found.update(modules[position] for position in positions)
    return found


def substrings_and_wildcards(entries: Iterable[str], modules: Sequence[str]) -> set[str]:
    """The modules that entries mean for vLLM's ModelOpt loader: substrings, and wildcards for the whole name.

    Raises:
        PatternError: there are too many for the time.
    """
    entries, found, text = set(entries), set[str](), "\n".join(modules)
    # Most entries occur nowhere, which one search of the text tells; that takes less than 5 ns a character.
    end = time.monotonic() + SECONDS + 5e-9 * len(entries) * len(text)
    for entry in entries:
        if not _WILD.isdisjoint(entry):
            found.update(module for module in modules if entry in module or fnmatchcase(module, entry))
        elif entry in text:
            found.update(module for module in modules if entry in module)
        if time.monotonic() > end:
            raise PatternError(f"the config ignores {len(entries)} patterns, too many for {len(modules)} modules")
    return found


def names_and_wildcards(entries: Iterable[str], modules: Sequence[str]) -> tuple[set[str], list[str]]:
    """What entries mean for TensorRT-LLM, which knows names and wildcards for the whole name.

    Returns:
        The modules, and the entries that mean none.

    Raises:
        PatternError: there are too many for the time.
    """
    entries, idle = set(entries), list[str]()
    found = entries.intersection(modules)
    end = time.monotonic() + SECONDS
    for entry in entries - found:
        meant = [] if _WILD.isdisjoint(entry) else [module for module in modules if fnmatchcase(module, entry)]
        found.update(meant)
        if not meant:
            idle.append(entry)
        if time.monotonic() > end:
            raise PatternError(f"the config ignores {len(entries)} patterns, too many for {len(modules)} modules")
    return found, idle


def spellings(name: str, aliases: Iterable[tuple[str, str]]) -> list[str]:
    """Every name under which an engine may look up a module: (pattern, what it may be called instead)."""
    names = [name]
    for pattern, other in aliases:
        names += [re.sub(pattern, other, each) for each in names if re.search(pattern, each)]
    return names


def _match(patterns: list[str], modules: Sequence[str]) -> list[list[int]]:
    seconds = SECONDS + _SECONDS_PER_MATCH * len(patterns) * len(modules)
    command = [sys.executable, "-I", __file__]
    asked = json.dumps([patterns, list(modules)]).encode()
    try:
        said = subprocess.run(  # noqa: S603 # in a session of its own, where no Ctrl-C of a terminal reaches it
            command, input=asked, stdout=subprocess.PIPE, timeout=seconds, check=False, start_new_session=True
        ).stdout
    except subprocess.TimeoutExpired as error:
        said = error.output or b""
    answers = [json.loads(line) for line in said.split(b"\n")[:-1]]
    for pattern, answer in zip(patterns, answers, strict=False):
        if isinstance(answer, str):
            raise PatternError(f"the config ignores 're:{pattern[:100]}', which is not a valid pattern: {answer}")
    if len(answers) < len(patterns):
        slow = patterns[len(answers)][:100]
        raise PatternError(f"the config ignores 're:{slow}', a pattern that is not matched within {seconds:.0f} s")
    return answers


def _serve() -> None:
    """Read [patterns, names]; for each pattern, write a line: the positions of names that match, or what is wrong."""
    patterns, names = json.load(sys.stdin)
    for pattern in patterns:
        answer: list[int] | str
        try:
            match = re.compile(pattern).match
            answer = [position for position, name in enumerate(names) if match(name)]
        except (re.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            answer = str(error) or type(error).__name__
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
