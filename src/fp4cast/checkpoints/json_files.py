"""JSON documents of a checkpoint: read with limits, written the same on every machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fp4cast.checkpoints.instead import LFS_POINTER
from fp4cast.errors import CheckpointError


class Bounds(NamedTuple):
    """How much JSON is parsed: a file of `[{},{},...` becomes objects of 25 times its size.

    Attributes:
        nbytes: bytes of the text.
        containers: objects and arrays: `{` and `[` in it, in strings too.
        keys: keys of objects: `:` in it.
        values: values: `,` in it.
    """

    nbytes: int
    containers: int
    keys: int
    values: int

    def excess(self, raw: bytes) -> str:
        """What is too much in a text, in words; empty where nothing is. Takes a fraction of the time of parsing."""
        for what, found, limit in (
            ("bytes", len(raw), self.nbytes),
            ("objects and arrays", raw.count(b"{") + raw.count(b"["), self.containers),
            ("keys", raw.count(b":"), self.keys),
            ("values", raw.count(b",") + 1, self.values),
        ):
            if found > limit:
                return f"has {found} {what}; at most {limit} are read as JSON"
        return ""


# Kimi-K3's index, half a million tensors, takes 80 MB; its receipt, were every tensor rounded, a quarter of a million
# objects and 1.2 million keys. The worst document within these bounds takes 1.3 GB (tests/checkpoints).
DOCUMENT = Bounds(128 << 20, 1_000_000, 2_000_000, 4_000_000)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: it is missing, unreadable, too large, or not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > DOCUMENT.nbytes:
                raise CheckpointError(f"{path}: has {size} bytes; at most {DOCUMENT.nbytes} are read as JSON")
            raw = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_json(path, raw)


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        path: where it is from, which errors name.
        raw: its text.

    Raises:
        CheckpointError: it is too large, or not a JSON object.
    """
    if raw.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the document. Fetch it with `git lfs pull` there, or download the "
            "model again with `hf download`."
        )
    if excess := DOCUMENT.excess(raw):
        raise CheckpointError(f"{path}: {excess}")
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


_string = json.encoder.encode_basestring_ascii  # of one string, what `json.dumps` does


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Serialise a JSON document."""
    return (json.dumps(document, indent=2) + "\n").encode()


def index_bytes(total: int, weight_map: Mapping[str, str]) -> bytes:
    """Like `json_bytes`, for an index, the one large document; names are sorted.

    The json module is slow when it indents, and takes several times the memory of the text.
    """
    files = {file: _string(file) for file in set(weight_map.values())}
    lines = [f"{_string(name)}: {files[weight_map[name]]}".encode() for name in sorted(weight_map)] or [b""]
    head = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n    '
    lines[0] = head.encode() + lines[0]
    lines[-1] += b"\n  }\n}\n"
    return b",\n    ".join(lines)
