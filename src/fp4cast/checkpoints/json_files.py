"""JSON documents of a checkpoint: read with limits, written the same on every machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4cast.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20  # Kimi-K3's index, with half a million tensors, takes 80 MB


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
            if size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes; at most {MAX_JSON_BYTES} are read as JSON")
            document = json.loads(file.read(size).decode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Serialise a JSON document."""
    return (json.dumps(document, indent=2) + "\n").encode()


def index_bytes(total: int, weight_map: Mapping[str, str]) -> bytes:
    """Like `json_bytes`, for an index, the one large document: the json module is slow when it indents."""
    entries = json.dumps(weight_map, separators=(",\n    ", ": "))[1:-1]
    return (
        f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n    {entries}\n  }}\n}}\n'
    ).encode()
