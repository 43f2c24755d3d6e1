"""The pieces of a shard cover every byte of it once."""

import pytest

from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.tiles import Limits
from fp4cast.conversion.plan import ConvertOptions, make_plan
from fp4cast.conversion.recipe import CodesOf, Constant, CopyOf
from fp4cast.conversion.tasks import pieces

W4A4 = ConvertOptions(activations="w4a4", input_scales=1.0)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "moe"])
def test_pieces_cover_a_shard_once_and_in_order(miniatures, monkeypatch, kind, size):
    monkeypatch.setattr(tiles, "LIMITS", Limits(write_bytes=size))
    for shard in make_plan(miniatures[kind], W4A4 if kind == "deepseek-v4" else ConvertOptions()).shards:
        position, reached = len(shard.layout.header), {}
        for piece in pieces(shard):
            for task in piece:
                first, _ = reached.get(task.offset, (0, None))
                assert task.first == first
                if task.offset not in reached:
                    assert task.offset == position
                    position += whole(task.step)[1]
                reached[task.offset] = (task.last, task.step)
        assert position == shard.layout.size
        for last, step in reached.values():
            assert last == whole(step)[0]


def whole(step):
    """(units, bytes) of all that a step gives."""
    if isinstance(step, CopyOf):
        return step.nbytes, step.nbytes
    if isinstance(step, Constant):
        return 1, len(step.data)
    blocks = step.pair.blocks
    return len(step.pair.tiling) if step.transposed else blocks, blocks * (16 if isinstance(step, CodesOf) else 2)
