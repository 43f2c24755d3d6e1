"""Where a tile lies, which the writer and the verifier each find out by themselves."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fp4cast
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.tiles import Limits, Tiling
from fp4cast.conversion import writer
from fp4cast.errors import VerificationError

SIZES = (st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4000), st.integers(1, 20))


@given(*SIZES, st.sampled_from([1, 2, 16]))
def test_a_tile_lies_where_numpy_says(experts, rows, blocks, tile_bytes, tile_rows, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LIMITS", Limits(tile_bytes=tile_bytes, tile_rows=tile_rows))
        tiling = Tiling.of(experts, rows, blocks)
    number = np.arange(experts * rows * blocks).reshape(experts, rows, blocks)
    offset = np.arange(experts * blocks * size * rows).reshape(experts, blocks * size, rows)
    for i in range(len(tiling)):
        tile = tiling[i]
        inside = number[tile.expert, tile.top : tile.bottom, tile.first : tile.last].reshape(-1)
        found = writer.block_number(tiling, tile, np.arange(tile.rows * tile.width))
        np.testing.assert_array_equal(found, inside)
        assert writer.turned_offset(tiling, tile, size) == offset[tile.expert, tile.first * size, tile.top]


def reversed_experts(place):
    return lambda tiling, tile, last: place(tiling, replace(tile, expert=tiling.experts - 1 - tile.expert), last)


@pytest.mark.parametrize("name", ["turned_offset", "block_number"])
def test_a_writer_that_takes_the_wrong_expert_is_found(plain_miniatures, tmp_path, monkeypatch, name):
    monkeypatch.setattr(writer, name, reversed_experts(getattr(writer, name)))
    with pytest.raises(VerificationError, match="hold other values than the source"):
        fp4cast.convert(plain_miniatures["gpt-oss"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
