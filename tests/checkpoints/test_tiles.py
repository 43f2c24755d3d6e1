"""Tiles cover every block of a bank once, whatever the sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.tiles import Limits, Tiling

SIZES = (st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4000), st.integers(1, 20))


def tilings(experts, rows, blocks, tile_bytes, tile_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LIMITS", Limits(tile_bytes=tile_bytes, tile_rows=tile_rows))
        return Tiling.of(experts, rows, blocks)


@given(*SIZES)
def test_tiles_cover_a_bank_once(experts, rows, blocks, tile_bytes, tile_rows):
    tiling = tilings(experts, rows, blocks, tile_bytes, tile_rows)
    seen = np.zeros((experts, rows, blocks), int)
    for i in range(len(tiling)):
        tile = tiling[i]
        seen[tile.expert, tile.top : tile.bottom, tile.first : tile.last] += 1
        assert tile.rows * tile.width * 16 <= max(tile_bytes, 16 * min(rows, tile_rows))
    assert (seen == 1).all()


def test_real_experts_are_one_tile_of_bands_that_stay_in_the_cache():
    tiling = Tiling.of(32, 5760, 90)
    assert (len(tiling), tiling[0].rows, tiling[0].width) == (32, 5760, 90)
    assert tiling.band_rows * tiling.width * 16 <= Limits().band_bytes
