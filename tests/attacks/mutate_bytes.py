"""Damage to bytes, without regard to what they mean."""

import random
from collections.abc import Callable

from attacks.starts import Special

_LONGEST = 64  # bytes that one change inserts or overwrites


def _flip(rng: random.Random, data: bytes, at: int, _: bytes) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(rng: random.Random, data: bytes, at: int, _: bytes) -> bytes:
    count = rng.randrange(1, _LONGEST)
    return data[:at] + bytes([rng.choice((0, 255, 127, rng.randrange(256)))]) * count + data[at + count :]


def _truncate(_: random.Random, data: bytes, at: int, __: bytes) -> bytes:
    return data[:at]


def _insert(rng: random.Random, data: bytes, at: int, _: bytes) -> bytes:
    return data[:at] + rng.randbytes(rng.randrange(1, _LONGEST)) + data[at:]


def _delete(rng: random.Random, data: bytes, at: int, _: bytes) -> bytes:
    return data[:at] + data[at + rng.randrange(1, _LONGEST) :]


def _append(rng: random.Random, data: bytes, _: int, __: bytes) -> bytes:
    return data + rng.randbytes(rng.randrange(1, _LONGEST))


def _splice(rng: random.Random, data: bytes, at: int, other: bytes) -> bytes:
    return data[:at] + other[rng.randrange(len(other) + 1) :]


def _token(rng: random.Random, data: bytes, at: int, _: bytes) -> bytes:
    """Replace the character at a place by one that means something to a parser."""
    return data[:at] + rng.choice(b'{}[]:,"\\0-+.eE \n\xff\x00').to_bytes(1, "little") + data[at + 1 :]


_WAYS: tuple[Callable[[random.Random, bytes, int, bytes], bytes], ...] = (
    _flip, _flip, _set, _truncate, _insert, _delete, _append, _splice, _token, _token,
)  # fmt: skip


def change_bytes(rng: random.Random, data: bytes, other: bytes | Special) -> bytes:
    """Damage some bytes once or twice, mostly near their beginning, where headers are."""
    for _ in range(rng.choice((1, 1, 2))):
        if not data:
            return rng.randbytes(rng.randrange(20))
        near = min(len(data), rng.choice((8, 16, 4096, len(data))))
        data = rng.choice(_WAYS)(rng, data, rng.randrange(near), other if isinstance(other, bytes) else b"")
    return data
