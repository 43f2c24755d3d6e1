"""Markdown of text that may be anybody's: names of tensors and licences can neither end a cell nor become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LONGEST = 120  # characters of a checkpoint's text


def code(text: str) -> str:
    """A code span of a checkpoint's text; characters that no usual name has become `?`.

    >>> code("model.layers.*.q_proj"), code("a`|<b>")
    ('`model.layers.*.q_proj`', '`a???b?`')
    """
    shown = re.sub(r"[^\w.*/:@+, -]", "?", text[:_LONGEST], flags=re.ASCII).strip() or "?"
    return f"`{shown}{'...' if len(text) > _LONGEST else ''}`"


def table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    """A table; what its cells hold is Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plural(count: int, one: str) -> str:
    """The number and its noun, "1 tensor" or "2,000 tensors"."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def gigabytes(nbytes: int) -> str:
    """A size in GB or, if it is small, in MB."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:,.2f} MB"
