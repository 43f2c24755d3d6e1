"""A checkpoint directory: config.json, the index, the shards that it names, and the files beside them.

Subfolders are never searched for weights: what the index (or the single `model.safetensors`) does not name is not
part of the model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fp4cast.checkpoints.header import Shard, Tensor, read_header
from fp4cast.checkpoints.index import INDEX, check_index, weight_map
from fp4cast.checkpoints.instead import refuse_path, refuse_without_weights
from fp4cast.checkpoints.json_files import read_json
from fp4cast.errors import CheckpointError, IndexFileError

CONFIG = "config.json"
SINGLE = "model.safetensors"
QUANT_CONFIG = "hf_quant_config.json"
RECEIPT = "fp4cast.json"

# Copies of the weights in other formats: neither downloaded nor carried along.
OTHER_DIRECTORIES = ("original", "metal", "onnx")
OTHER_SUFFIXES = (".gguf", ".bin", ".pt", ".pth", ".onnx", ".msgpack", ".h5")
OTHER_FORMATS = (*(f"{name}/*" for name in OTHER_DIRECTORIES), *(f"*{suffix}" for suffix in OTHER_SUFFIXES))
# Weights and other tools' leftovers: not carried along either.
SKIPPED_DIRECTORIES = {*OTHER_DIRECTORIES, "__pycache__"}
_SKIPPED_ENDINGS = (".bin.index.json", ".safetensors.index.json")
_SKIPPED_SUFFIXES = {*OTHER_SUFFIXES, ".safetensors", ".lock", ".incomplete"}
_SKIPPED_NAMES = {CONFIG, INDEX, QUANT_CONFIG, RECEIPT}

Stamps = tuple[tuple[str, int, int], ...]  # (name, size, modification time in ns) of every shard


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every header parsed and checked, nothing else read.

    Attributes:
        path: its directory.
        config: config.json.
        shards: by file name, in the order of their names.
        renamed: config and tensors are seen as those of another layout, and not as the files hold them.
    """

    path: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    renamed: bool = False

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, shard after shard, in the order of their bytes."""
        table: dict[str, Tensor] = {}
        for shard in self.shards.values():
            if both := table.keys() & shard.tensors.keys():
                name = next(name for name in shard.tensors if name in both)
                files = f"{table[name].path.name} and {shard.path.name}"
                raise IndexFileError(f"{self.path}: tensor {name!r} is in both {files}")
            table |= shard.tensors
        return table

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def companions(self) -> Iterator[PurePosixPath]:
        """The model's files other than weights (tokenizer, code, licence): relative paths, sorted.

        Raises:
            CheckpointError: a folder cannot be listed, or a file is a link out of the checkpoint.
        """
        for relative in walk(self.path, skipped=SKIPPED_DIRECTORIES):
            path = self.path / relative
            skipped = str(relative) in _SKIPPED_NAMES  # a tokenizer's config.json lies deeper
            skipped = skipped or path.name.endswith(_SKIPPED_ENDINGS) or path.suffix in _SKIPPED_SUFFIXES
            if not skipped and path.is_file():
                resolve_link(self.path, path)
                yield relative


def walk(directory: Path, skipped: Collection[str] = ()) -> list[PurePosixPath]:
    """The files below a directory, but for hidden ones: relative paths, sorted.

    Args:
        directory: where to begin.
        skipped: names of folders to leave out.

    Raises:
        CheckpointError: a folder cannot be listed; what it holds must not be left out only because it cannot be seen.
    """

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    found: list[PurePosixPath] = []
    try:
        for folder, folders, files in os.walk(directory, onerror=refuse):
            folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
            here = PurePosixPath(Path(folder).relative_to(directory).as_posix())
            found += [here / name for name in files if not name.startswith(".")]
    except RecursionError as error:
        raise CheckpointError(f"{directory}: its folders are nested too deeply") from error
    return sorted(found)


def companion_sizes(checkpoint: Checkpoint) -> dict[PurePosixPath, int]:
    """The companions and their sizes in bytes.

    Raises:
        CheckpointError: one is a link that leads elsewhere, or cannot be examined.
    """
    try:
        return {name: (checkpoint.path / name).stat().st_size for name in checkpoint.companions()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def stamp(checkpoint: Checkpoint) -> Stamps:
    """The name, size and modification time of every shard, which show whether one has changed."""
    stats = ((file, shard.path.stat()) for file, shard in checkpoint.shards.items())
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def check_stamps(checkpoint: Checkpoint, stamps: Stamps, work: str) -> None:
    """Raise if a shard has changed since its stamp was taken.

    Args:
        checkpoint: the opened checkpoint.
        stamps: its stamps, taken when it was opened.
        work: a verb for the work done meanwhile: convert, export.

    Raises:
        CheckpointError: a shard has changed, or is gone.
    """
    try:
        now: object = stamp(checkpoint)
    except OSError as error:
        now = error
    if now != stamps:
        raise CheckpointError(
            f"{checkpoint.path}: a shard changed while it was {work}ed; nothing was published. "
            f"Wait until its download or copy is finished and {work} again."
        )


def resolve_link(root: Path, path: Path) -> Path:
    """The file that a link leads to: one of the checkpoint's, or of the Hub cache's blobs; another may be private.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    if not path.is_symlink():
        return path
    roots = [root.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of the checkpoint; expected a file inside. "
            "Replace the link with the file itself, or remove it."
        )
    return target


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector while millions of small objects are built; also a decorator.

    It halves the time, and none of the objects is in a cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()  # and back: all that there is counts as old, and is not looked at at once
                gc.unfreeze()
            gc.enable()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a checkpoint's directory before the message of an error that does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) not in str(error):
            error.args = (f"{path}: {error}",)
        raise


@gc_paused()
def open_checkpoint(path: Path, config: str = CONFIG) -> Checkpoint:
    """Open a checkpoint directory; every header is checked, no tensor is read.

    Args:
        path: the directory.
        config: the name of its config file.

    Raises:
        CheckpointError: a file is missing or malformed; often one of its subclasses.
    """
    try:
        return _open(path, config)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _open(path: Path, config: str) -> Checkpoint:
    if not path.is_dir():
        raise refuse_path(path)
    for name in (INDEX, config):
        if (path / name).exists():
            resolve_link(path, path / name)
    if (path / INDEX).exists() or (path / INDEX).is_symlink():  # a broken link is an index that cannot be read
        weights = weight_map(path, read_json(path / INDEX))
        files = sorted(set(weights.values()))
    elif (path / SINGLE).exists():
        weights, files = {}, [SINGLE]
    else:
        raise refuse_without_weights(path, {file.name for file in path.iterdir()})
    document = read_json(path / config)
    if missing := [file for file in files if not (path / file).is_file()]:
        raise IndexFileError(
            f"{path / INDEX}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}. "
            "Finish the download."
        )
    for file in files:
        resolve_link(path, path / file)
    shards = {file: read_header(path / file) for file in files}  # threads would only wait for each other
    if weights:
        check_index(path, weights, shards)
    return Checkpoint(path, document, shards)
