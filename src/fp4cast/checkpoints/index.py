"""The index of a checkpoint: which shard holds which tensor. Names in it may not leave the directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.header import Shard
from fp4cast.errors import IndexFileError

INDEX = "model.safetensors.index.json"
MAX_FILE_NAME = 230  # bytes: most file systems take 255, and notes, unfinished shards and working directories add some


def weight_map(path: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """The weight_map of an index, whose file names are plain names inside the directory.

    Args:
        path: the directory.
        document: the parsed index.

    Raises:
        IndexFileError: it is none, or a name is not such a one.
    """
    weights = document.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise IndexFileError(f"{path / INDEX}: expected a non-empty weight_map, got {str(weights)[:200]}")
    usable: set[str] = set()
    for name, file in weights.items():
        if not isinstance(file, str) or file not in usable:
            _check_file_name(path, name, file)
            usable.add(file)
    return weights


def _check_file_name(path: Path, name: str, file: object) -> None:
    if not isinstance(file, str) or not file or "\0" in file or Path(file).name != file or file in {".", ".."}:
        raise IndexFileError(
            f"{path / INDEX}: tensor {name!r} points to {file!r}; expected the name of a file in the same directory"
        )
    try:
        length = len(file.encode())
    except UnicodeEncodeError:
        length = MAX_FILE_NAME + 1
    if length > MAX_FILE_NAME:
        raise IndexFileError(
            f"{path / INDEX}: tensor {name!r} points to {file[:100]!r}; expected at most {MAX_FILE_NAME} bytes of UTF-8"
        )
    if not file.endswith(".safetensors"):
        raise IndexFileError(f"{path / INDEX}: tensor {name!r} is in {file!r}; expected a .safetensors file")


def check_index(path: Path, weights: Mapping[str, str], shards: Mapping[str, Shard]) -> None:
    """Raise where an index and the headers of its shards disagree.

    Raises:
        IndexFileError: they do.
    """
    for name, file in weights.items():
        if name not in shards[file].tensors:
            raise IndexFileError(f"{path / INDEX}: tensor {name!r} is not in {file}, where the index says it is")
    if len(weights) == sum(len(shard.tensors) for shard in shards.values()):
        return  # each is one of them, so that there are no others
    for file, shard in shards.items():
        for name in shard.tensors:
            if weights.get(name) != file:
                raise IndexFileError(
                    f"{path / file}: tensor {name!r} is in this file, but {INDEX} says {weights.get(name, 'nowhere')!r}"
                )
