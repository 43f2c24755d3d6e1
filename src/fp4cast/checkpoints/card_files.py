"""The model card's files: what people read and edit, and no loader does, so that nothing judges them.

README.md is the card, README.svg its picture. A conversion writes both; the source's then lie beside them, with
".source" in their names, and so do those of its own source, one ".source" more.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

CARD = "README.md"
PICTURE = "README.svg"

_NAME = re.compile(r"(README(?:\.source)*)(\.(?:md|svg))", re.IGNORECASE)  # some file systems ignore the case


def is_card_file(name: str) -> bool:
    """Whether a path, relative to its checkpoint, is that of a card or its picture, old or new.

    >>> [is_card_file(name) for name in ("README.md", "README.source.svg", "docs/README.md", "README.txt")]
    [True, True, False, False]
    """
    return _NAME.fullmatch(name) is not None


def behind_card(name: PurePosixPath) -> PurePosixPath | None:
    """Where a file lay before a card was put beside it; None for a card and its picture, which lay nowhere.

    >>> behind_card(PurePosixPath("README.source.md")), behind_card(PurePosixPath("README.svg"))
    (PurePosixPath('README.md'), None)
    """
    match = _NAME.fullmatch(str(name))
    if match is None:
        return name
    stem = match[1].removesuffix(".source")
    return None if stem == match[1] else PurePosixPath(f"{stem}{match[2]}")


def beside_card(name: PurePosixPath) -> PurePosixPath:
    """Where a source's file lies in a destination that has a card of its own.

    >>> beside_card(PurePosixPath("README.md")), beside_card(PurePosixPath("LICENSE"))
    (PurePosixPath('README.source.md'), PurePosixPath('LICENSE'))
    """
    match = _NAME.fullmatch(str(name))
    return name if match is None else PurePosixPath(f"{match[1]}.source{match[2]}")
