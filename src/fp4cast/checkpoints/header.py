"""safetensors headers: parsed as untrusted input, and laid out before the first byte of a new file is written.

The format: 8 bytes little-endian header length, a JSON header, then the tensors back to back. The checks are those of
the reference implementation and a few more; nothing is allocated before the length that asks for it has been checked
against the file's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from fp4cast.checkpoints.raw_header import HEADER, digest_of_header, header_bytes
from fp4cast.errors import CheckpointError, HeaderError

MAX_NAME = 4096  # characters of a tensor's name: what looks names up, and messages that hold them, stay small

_KEYS = frozenset({"dtype", "shape", "data_offsets"})
METADATA = "__metadata__"  # the key of a header that is no tensor

# safetensors' dtypes and their widths in bits.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
UNQUANTIZED = frozenset({"BF16", "F16", "F32", "F64"})  # dtypes of unquantized weights


class Tensor(NamedTuple):
    """One tensor of a shard: what it is and which bytes of the file hold it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.path.name})"


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been checked.

    Attributes:
        path: where it is.
        tensors: by name, in the order of their bytes.
        metadata: the header's `__metadata__`.
        size: its bytes.
        mode: its permissions; those of a new file where it does not lie on this machine.
        digest: of the header, see `digest_of_header`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    size: int
    mode: int = 0o666
    digest: str = ""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:200]!r} occurs twice")
    return table


def _count_keys(header: object) -> int:
    """How many keys a header and its entries have; each takes a colon of the text, which may have more."""
    if not isinstance(header, dict):
        return -1
    return len(header) + sum(len(entry) for entry in header.values() if isinstance(entry, dict))


def _count(shape: list[int], limit: int) -> int:
    """The number of elements of a shape, or any number over `limit`: hostile shapes multiply into endless numbers."""
    total = 0 if 0 in shape else 1
    for size in shape:
        if total > limit:
            break
        total *= size
    return total


class _Kind(NamedTuple):
    """A dtype, a shape, and the bits that they take."""

    dtype: str
    shape: tuple[int, ...]
    bits: int


def _are_sizes(values: object) -> bool:
    """Whether these are a list of sizes; a plain loop, since a checkpoint may have a million of them."""
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True


def _entry(path: Path, name: str, entry: object, base: int, kinds: dict[tuple[Any, ...], _Kind]) -> Tensor:
    """Check one header entry: a known dtype, valid sizes, and as many bytes as dtype and shape say.

    `kinds` holds what the entries so far have in common: half a million have a few dozen dtypes and shapes.
    """
    if len(name) > MAX_NAME:
        raise HeaderError(
            f"{path}: tensor {name[:200]!r}...: expected a name of at most {MAX_NAME} characters, got {len(name)}"
        )
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _wrong(path, name, f"expected dtype, shape and data_offsets, got {str(entry)[:200]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _wrong(path, name, f"unknown dtype {str(dtype)[:200]!r}; known are {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        raise _wrong(path, name, f"the shape must be a list of sizes, got {str(shape)[:200]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _wrong(path, name, f"data_offsets must be two sizes, got {str(offsets)[:200]}")
    begin, end = offsets
    kind = kinds.get((dtype, *shape))
    if kind is None:
        kind = kinds[dtype, *shape] = _Kind(dtype, tuple(shape), _count(shape, 1 << 64) * DTYPE_BITS[dtype])
    bits = kind.bits
    if bits != (end - begin) * 8:
        takes = f"{dtype} {str(shape)[:200]} takes {bits / 8:g} bytes"
        raise _wrong(path, name, f"{takes}, data_offsets {offsets} give {end - begin}")
    return Tensor(name, kind.dtype, kind.shape, base + begin, end - begin, path)


def _wrong(path: Path, name: str, what: str) -> HeaderError:
    return HeaderError(f"{path}: tensor {name!r}: {what}")


def _check_contiguous(path: Path, tensors: Iterable[Tensor], base: int, size: int) -> None:
    position, before = base, ""
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps" if tensor.start < position else f"leaves a hole of {tensor.start - position} bytes after"
            raise HeaderError(
                f"{path}: tensor {tensor.name!r} {what} {repr(before) if before else 'the header'}: "
                f"expected data offset {position - base}, got {tensor.start - base}"
            )
        position, before = tensor.start + tensor.nbytes, tensor.name
    if position != size:
        raise HeaderError(
            f"{path}: the header describes {position} bytes, the file has {size}. "
            "It is truncated, or something was appended: download it again."
        )


def read_header(path: Path) -> Shard:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: the file cannot be opened.
        HeaderError: the header is malformed or does not fit the file.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = header_bytes(path, status.st_size, lambda start, nbytes: os.pread(file.fileno(), nbytes, start))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_header(path, raw, status.st_size, status.st_mode)


def parse_header(path: Path, raw: bytes, size: int, mode: int = 0o666) -> Shard:
    """Parse and check the JSON text of a header.

    Args:
        path: the file, which errors and tensors name.
        raw: the text.
        size: bytes of the file.
        mode: see `Shard`.

    Raises:
        HeaderError: it is malformed or does not fit the file.
    """
    if excess := HEADER.excess(raw):
        raise HeaderError(f"{path}: the header {excess}")
    try:
        prefix, base, colons = len(raw).to_bytes(8, "little"), 8 + len(raw), raw.count(b":")
        text, digest = raw.decode(), digest_of_header(prefix, raw)
        del raw  # before the objects take their place
        header = json.loads(text)
        if _count_keys(header) != colons:  # a colon in a name, or a key that occurs twice
            header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        what = f"{path}: the header is not valid JSON: {error}"
        raise HeaderError(f"{what}. If its download was interrupted, download it again.") from error
    if not isinstance(header, dict):
        raise HeaderError(f"{path}: the header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{path}: __metadata__ must map strings to strings, got {str(metadata)[:200]!r}")
    try:
        "".join([*header, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"{path}: a name holds a lone surrogate, which UTF-8 cannot encode: {error}") from error
    kinds: dict[tuple[Any, ...], _Kind] = {}
    tensors = [_entry(path, name, entry, base, kinds) for name, entry in header.items()]
    if any(before.start + before.nbytes != after.start for before, after in pairwise(tensors)):
        tensors.sort(key=attrgetter("start", "nbytes"))
    _check_contiguous(path, tensors, base, size)
    return Shard(path, {tensor.name: tensor for tensor in tensors}, metadata, size, mode, digest)


@dataclass(frozen=True)
class FileLayout:
    """The layout of a new safetensors file: its header, and the offset of every tensor."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_string = json.encoder.encode_basestring  # of one string, what `_json` does


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> FileLayout:
    """Place tensors in a new file.

    Wider dtypes come first and the given order is kept otherwise, so that every tensor is aligned to its dtype.

    Args:
        tensors: (name, dtype, shape) of each.
        metadata: the file's `__metadata__`.

    Returns:
        The header's bytes, padded to a multiple of 8, and the absolute offset of every tensor.
    """
    entries = [f"{_json(METADATA)}:{_json(dict(metadata))}"] if metadata else []
    relative: dict[str, int] = {}
    kinds: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}  # many tensors have one
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -DTYPE_BITS[t[1]]):
        if (kind := kinds.get((dtype, shape))) is None:
            said = f'"dtype":{_json(dtype)},"shape":{_json(shape)}'
            kind = kinds[dtype, shape] = math.prod(shape) * DTYPE_BITS[dtype] // 8, said
        nbytes, said = kind
        # By hand: json would take most of the time of planning half a million tensors.
        entries.append(f'{_string(name)}:{{{said},"data_offsets":[{position},{position + nbytes}]}}')
        relative[name] = position
        position += nbytes
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, {name: len(header) + at for name, at in relative.items()}, len(header) + position)
