"""Where a checkpoint comes from: its model id and revision on the Hub, where its path or its user says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fp4cast.checkpoints.instead import model_id
from fp4cast.errors import CheckpointError, UsageError


class Origin(NamedTuple):
    """A model on the Hub; both are empty where nobody says it.

    Attributes:
        id: ORG/NAME.
        revision: a commit, or what the user calls it.
    """

    id: str = ""
    revision: str = ""

    def to_json(self) -> dict[str, str]:
        """A JSON object of what is known."""
        return {key: value for key, value in self._asdict().items() if value}

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


UNKNOWN = Origin()


def origin_of(path: Path, said: str | None = None) -> Origin:
    """The origin of a checkpoint's directory.

    A config's `_name_or_path` is not asked: it names what was loaded before a model was quantized, often a path.

    Args:
        path: the directory; in the Hub cache, its name is the commit and an outer one's the model.
        said: what the user says: ORG/NAME, ORG/NAME@REVISION, or the model's page.

    Raises:
        UsageError: the user's word is no model id.
    """
    found = _of_cache(path)
    if said is None:
        return found
    try:
        named = model_id(said)
    except CheckpointError:
        named = None
    if named is None or not _usable(named[0]):
        raise UsageError(f"--source-id: expected ORG/NAME or ORG/NAME@REVISION, got {said[:200]!r}")
    return Origin(named[0], named[1] or (found.revision if found.id == named[0] else ""))


def _of_cache(path: Path) -> Origin:
    """The origin that a path in the Hub cache says: models--ORG--NAME/snapshots/COMMIT."""
    snapshot = path.resolve()
    kind, *names = snapshot.parent.parent.name.split("--")
    if (kind, snapshot.parent.name) != ("models", "snapshots") or not re.fullmatch("[0-9a-f]{40}", snapshot.name):
        return UNKNOWN
    return Origin("/".join(names), snapshot.name) if _usable("/".join(names)) else UNKNOWN


def _usable(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()
