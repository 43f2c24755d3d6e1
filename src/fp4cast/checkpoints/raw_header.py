"""The JSON text of a safetensors header: where it ends, how large it may be, and its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

from fp4cast.checkpoints.instead import LFS_POINTER
from fp4cast.checkpoints.json_files import Bounds
from fp4cast.errors import HeaderError

# The bytes are the reference implementation's limit. Kimi-K3 has half a million tensors in all its shards; a million of
# them are read from one: each an object with two arrays, four keys and, in four dimensions, seven commas.
HEADER = Bounds(100_000_000, 3_001_000, 4_001_000, 8_000_000)


def header_bytes(path: Path, size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The JSON text of a header, wherever the file is.

    Args:
        path: the file, which errors name.
        size: its bytes.
        read: returns bytes of the file, given the first and how many.

    Raises:
        HeaderError: there is none.
    """
    prefix = read(0, min(8, size))
    if len(prefix) < 8:
        raise HeaderError(f"{path}: {size} bytes are too short for a safetensors file: download it again")
    if LFS_POINTER.startswith(prefix):
        raise HeaderError(
            f"{path}: is a Git LFS pointer, not the weights. Fetch them with `git lfs pull` there, or download "
            "the model again with `hf download`."
        )
    length = int.from_bytes(prefix, "little")
    if length > min(HEADER.nbytes, size - 8):
        raise HeaderError(
            f"{path}: the header claims {length} bytes, but the file has {size} "
            f"(and at most {HEADER.nbytes} are allowed). "
            "It is truncated or not a safetensors file: download it again."
        )
    header = read(8, length)
    if len(header) != length:
        raise HeaderError(f"{path}: expected a header of {length} bytes, got {len(header)}")
    return header


def digest_of_header(*parts: bytes) -> str:
    """The digest of a header, given its parts: all bytes before the first tensor."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
