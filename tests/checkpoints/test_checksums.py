"""Checksums of files: the same however the work is shared, and of every byte."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fp4cast.checkpoints import checksums
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.checksums import Checksum, checksum, checksum_of_bytes, checksum_of_path


def definition(data, piece=checksums.PIECE_BYTES):
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(each).digest() for each in pieces)).hexdigest()


def test_the_definition_does_not_drift(tmp_path):
    """Receipts last for years: a known file has a known checksum, in one piece and in two."""
    (tmp_path / "f").write_bytes(b"fp4cast")
    assert checksum_of_path(tmp_path / "f") == Checksum(7, "242643c6b4c15e57bd45b1293b06ad26")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65536, 70001])
def test_paths_bytes_and_threads_agree(tmp_path, monkeypatch, size):
    monkeypatch.setattr(checksums, "PIECE_BYTES", 1 << 14)
    monkeypatch.setattr(checksums, "_STEP_BYTES", 1 << 12)
    data = bytes(i * i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(data)
    expected = Checksum(size, definition(data, 1 << 14))
    seen = []
    with File(tmp_path / "f") as file, ThreadPoolExecutor(3) as pool:
        assert checksum(file, pool.map, seen.append) == expected
    assert sum(seen) == size
    assert checksum_of_path(tmp_path / "f") == checksum_of_bytes(data) == expected


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_bit_counts(data, draw):
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    other = bytearray(data)
    other[bit // 8] ^= 1 << bit % 8
    assert checksum_of_bytes(data) != checksum_of_bytes(bytes(other))
