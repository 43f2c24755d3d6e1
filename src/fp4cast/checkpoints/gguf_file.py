"""The header of a GGUF file: metadata as raw bytes, and where each tensor lies; checked before anything is read.

The `gguf` package reads such files, too, and verification reads with it. It trusts lengths and counts, so a damaged
file may keep it busy for ever; and its writer orders metadata anew and drops empty strings. Hence a reader of our own,
which keeps the bytes. Layout: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fp4cast.checkpoints.byte_ranges import require_posix
from fp4cast.errors import CheckpointError, HeaderError
from fp4cast.extras import require

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_MOST_ALIGNMENT = 1 << 20
_VERSIONS = (2, 3)  # 1 had lengths of 32 bits
_MAX_HEADER = 1 << 30  # bytes; a vocabulary of a million tokens has a tenth of that
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# struct letters by GGUF's number of a value's type
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: its name.
        shape: GGUF's order, the contiguous dimension first.
        type: ggml's number of its type, 39 for MXFP4.
        start: its first byte in the file.
        nbytes: its size, without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the metadata.

    Attributes:
        type: GGUF's number of its type.
        start: where its bytes begin, relative to the metadata.
        content: a number or a string; None for an array.
    """

    type: int
    start: int
    content: Any


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors of a GGUF file.

    Attributes:
        path: the file.
        version: of the format.
        size: bytes of the file.
        metadata: all keys and values as they are stored.
        values: metadata by key.
        alignment: of each tensor's first byte.
        tensors: in the order of the file.
    """

    path: Path
    version: int
    size: int
    metadata: bytes
    values: dict[str, Value]
    alignment: int
    tensors: tuple[GgufTensor, ...] = field(repr=False)

    def value(self, key: str, default: Any = None) -> Any:
        """The number or string of a key; `default` where there is none."""
        found = self.values.get(key)
        return default if found is None else found.content

    def pad(self, nbytes: int) -> int:
        """`nbytes`, rounded up to the alignment."""
        return -(-nbytes // self.alignment) * self.alignment


def is_gguf(path: str | Path) -> bool:
    """Whether a path is named like a GGUF file, or is a file that begins like one."""
    try:
        here = Path(path)
        if here.suffix.lower() == SUFFIX:
            return not here.is_dir()
        if not here.is_file():
            return False
        with here.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def names_gguf(src: str | Path, dst: str | Path) -> bool:
    """Whether a conversion begins or ends with a GGUF file."""
    return is_gguf(src) or is_gguf(dst)


def type_sizes() -> dict[int, tuple[int, int]]:
    """(elements, bytes) of a block of each type, by ggml's number.

    Raises:
        MissingExtraError: the `gguf` package, which has the table, is not installed.
    """
    return {int(kind): sizes for kind, sizes in require("gguf", "gguf").GGML_QUANT_SIZES.items()}


def type_name(number: int) -> str:
    """The name of a type, "MXFP4" for 39."""
    return str(require("gguf", "gguf").GGMLQuantizationType(number).name)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: it cannot be opened.
        HeaderError: it is malformed, truncated, split in a way that is not understood, or of a type or version that
            the installed `gguf` does not know.
        MissingExtraError: the `gguf` package is not installed.
    """
    sizes = type_sizes()
    require_posix(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header(sizes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """Takes values one after another; never more than the file holds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size, self.at = os.fstat(file.fileno()).st_size, 0

    def wrong(self, what: str) -> HeaderError:
        return HeaderError(f"{self.path}: byte {self.at}: {what}. The file is damaged: download or convert it again.")

    def skip(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise self.wrong(f"{nbytes} bytes expected, {self.size - self.at} left")
        if self.at + nbytes > _MAX_HEADER:
            raise self.wrong(f"the header is larger than {_MAX_HEADER} bytes")
        self.at += nbytes
        self.file.seek(self.at)

    def take(self, nbytes: int) -> bytes:
        start = self.at
        self.skip(nbytes)
        self.file.seek(start)
        return self.file.read(nbytes)

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        start, data = self.at, self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.at = start
            raise self.wrong("a string is not UTF-8") from error

    def header(self, sizes: dict[int, tuple[int, int]]) -> GgufHeader:
        if (magic := self.take(4)) != MAGIC:
            raise self.wrong(f"begins with {magic!r}, expected {MAGIC!r}")
        version = self.number("I")
        if version not in _VERSIONS:
            raise HeaderError(
                f"{self.path}: GGUF version {version}; expected 2 or 3, little-endian. Convert the model again with a "
                "present llama.cpp."
            )
        tensors, keys = self.number("Q"), self.number("Q")
        first = self.at
        values = self._unique((self._key_value(first) for _ in range(keys)), "key")
        last = self.at
        alignment = values["general.alignment"].content if "general.alignment" in values else 32
        if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment!r}, expected a power of two up to {_MOST_ALIGNMENT}")
        infos = self._unique((self._info() for _ in range(tensors)), "tensor")
        placed = tuple(self._placed(infos, sizes, alignment))
        self.file.seek(first)
        return GgufHeader(self.path, version, self.size, self.file.read(last - first), values, alignment, placed)

    def _unique(self, items: Iterator[tuple[str, Any]], what: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, item in items:
            if name in found:
                raise self.wrong(f"the {what} {name[:100]!r} stands there twice")
            found[name] = item
        return found

    def _key_value(self, first: int) -> tuple[str, Value]:
        key, kind = self.text(), self.number("I")
        start = self.at - first
        if kind == _ARRAY:
            self._skip_array(key)
            return key, Value(kind, start, None)
        if kind != _STRING and kind not in _SCALARS:
            raise self.wrong(f"{key[:100]!r} has the unknown type {kind}")
        return key, Value(kind, start, self.text() if kind == _STRING else self.number(_SCALARS[kind]))

    def _skip_array(self, key: str) -> None:
        kind, length = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            raise self.wrong(f"{key[:100]!r} is an array of the type {kind}, expected numbers or strings")

    def _info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dimensions = self.text(), self.number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self.wrong(f"{name[:100]}: has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, (shape, self.number("I"), self.number("Q"))

    def _placed(self, infos: dict[str, Any], sizes: dict[int, tuple[int, int]], alignment: int) -> Iterator[GgufTensor]:
        """Tensors lie one after another, in the order of their names, as llama.cpp demands."""
        data, offset, end = -(-self.at // alignment) * alignment, 0, self.at
        for name, (shape, kind, stored) in infos.items():
            if kind not in sizes:
                raise HeaderError(
                    f"{self.path}: {name[:100]} is of type {kind}, which the installed gguf does not know; upgrade it: "
                    "pip install --upgrade gguf"
                )
            elements, nbytes = sizes[kind]
            if not all(shape) or shape[0] % elements:
                raise self.wrong(f"{name[:100]}: rows of {shape[0]} elements, expected a multiple of {elements}")
            if stored != offset:
                raise self.wrong(f"{name[:100]}: begins at {stored}, expected {offset}")
            total = math.prod(shape) // elements * nbytes
            end = data + offset + total
            if end > self.size:
                raise HeaderError(
                    f"{self.path}: {name[:100]} ends at byte {end}, but the file has {self.size}. It is truncated: "
                    "download it again."
                )
            yield GgufTensor(name, shape, kind, data + offset, total)
            offset += -(-total // alignment) * alignment
        if self.size > max(end, data + offset):
            raise HeaderError(f"{self.path}: {self.size - data - offset} bytes after the last tensor; expected none")
