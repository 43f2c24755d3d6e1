"""Open a checkpoint on the Hub: config, index and headers are read, each checked as in a directory."""

from __future__ import annotations

from pathlib import Path

from fp4cast.checkpoints.directory import CONFIG, SINGLE, Checkpoint, gc_paused
from fp4cast.checkpoints.header import Shard, parse_header
from fp4cast.checkpoints.index import INDEX, check_index, weight_map
from fp4cast.checkpoints.instead import refuse_without_weights
from fp4cast.checkpoints.json_files import DOCUMENT, parse_json
from fp4cast.checkpoints.raw_header import header_bytes
from fp4cast.errors import CheckpointError, IndexFileError
from fp4cast.hub.ranges import RemoteFiles
from fp4cast.parallel.workers import workers

CONNECTIONS = 16  # requests at a time


@gc_paused()
def open_repository(files: RemoteFiles, path: Path, shards: Path | None = None) -> Checkpoint:
    """Open a checkpoint on the Hub; no tensor is read.

    Args:
        files: its files.
        path: what errors call it, or where its small files lie.
        shards: where its shards will lie; None for `path`.

    Raises:
        CheckpointError: a file is missing or malformed; often one of its subclasses.
    """
    names = files.repository.files
    if INDEX in names:
        weights = weight_map(path, parse_json(path / INDEX, _document(files, path, INDEX)))
        wanted = sorted(set(weights.values()))
    elif SINGLE in names:
        weights, wanted = {}, [SINGLE]
    else:
        raise refuse_without_weights(path, set(names))
    config = parse_json(path / CONFIG, _document(files, path, CONFIG))
    if missing := [file for file in wanted if file not in names]:
        raise IndexFileError(
            f"{path / INDEX}: {len(missing)} of {len(wanted)} shards are missing on the Hub, the first is {missing[0]}"
        )

    def read(file: str) -> Shard:
        where, size = (shards or path) / file, names[file].size
        raw = header_bytes(where, size, lambda start, nbytes: bytes(files.read(file, start, nbytes)))
        return parse_header(where, raw, size)

    with workers(CONNECTIONS) as pool:
        found = dict(zip(wanted, pool.map(read, wanted), strict=True))
    if weights:
        check_index(path, weights, found)
    return Checkpoint(path, config, found)


def _document(files: RemoteFiles, path: Path, name: str) -> bytes:
    if name not in files.repository.files:
        raise CheckpointError(f"{path / name}: is not on the Hub; expected a checkpoint with its config")
    size = files.repository.files[name].size
    if size > DOCUMENT.nbytes:
        raise CheckpointError(f"{path / name}: has {size} bytes; at most {DOCUMENT.nbytes} are read as JSON")
    return files.whole(name)
