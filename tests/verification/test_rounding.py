"""A receipt may say that a tensor was rounded; that its values are near is judged, whatever the receipt says."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp4cast
import helpers
from fp4cast.casting.nearest import encode
from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from fp4cast.formats import E2M1, E4M3, mxfp4_values, nvfp4_values, unpack
from fp4cast.verification.opened import open_both
from fp4cast.verification.receipt import Receipt, weight_digest
from fp4cast.verification.rounding import find_far
from helpers import edit, raw

VARIANTS = list({variant[:2]: variant for variant in helpers.VARIANTS}.values())  # activations change no weight
IDS = ["-".join(variant) for variant in VARIANTS]


def wide(source, path, seed=0):
    """A copy of a checkpoint in which the first blocks of every MXFP4 tensor lie 40 binades apart."""
    copy, rng = shutil.copytree(source, path), np.random.default_rng(seed)
    for pair in read_source(open_checkpoint(copy)).pairs.values():
        edit(copy, pair.codes.name, lambda data: data.__setitem__(slice(0, 256), rng.integers(0, 256, 256, np.uint8)))
        edit(copy, pair.scales.name, lambda data: data.__setitem__(slice(0, 16), rng.integers(90, 130, 16)))
    return copy


def written(source, destination, layout, activations):
    scales = 1.0 if activations == "w4a4" else None
    options = {"layout": layout, "activations": activations, "input_scales": scales}
    return fp4cast.convert(source, destination, inexact="nearest", **options)


@pytest.fixture
def forge(monkeypatch):
    """Make every receipt announce what is there, as an attacker would write it."""
    true_read = Receipt.read

    def forged(source, destination):
        monkeypatch.setattr(Receipt, "read", staticmethod(lambda _: Receipt()))
        rounded = {each.name: each.rounded_half_blocks for each in fp4cast.verify(source, destination).inexact}
        opened = open_both(source, destination, "config.json")
        tensors, names = opened.destination.tensors, opened.target.names
        digests = {module: weight_digest(names(module), tensors) for module in rounded}
        lie = replace(true_read(destination), rounded=rounded, digests=digests)
        monkeypatch.setattr(Receipt, "read", staticmethod(lambda _: lie))
        return [d for d in fp4cast.verify(source, destination).differences if d.kind == "values"]

    return forged


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS, ids=IDS)
def test_what_conversion_rounds_is_near(miniatures, tmp_path, kind, layout, activations):
    source = wide(miniatures[kind], tmp_path / "src")
    report = written(source, tmp_path / "dst", layout, activations)
    assert report.half_blocks["rounded"] > 100
    again = fp4cast.verify(source, tmp_path / "dst")
    assert (again.ok, again.exact, again.differences) == (True, False, ())


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS, ids=IDS)
def test_random_codes_under_a_forged_receipt_are_found(miniatures, tmp_path, forge, kind, layout, activations):
    source = wide(miniatures[kind], tmp_path / "src")
    written(source, tmp_path / "dst", layout, activations)
    opened = open_both(source, tmp_path / "dst", "config.json")
    name = opened.target.names(opened.selection.modules[0]).codes
    rng = np.random.default_rng(1)
    edit(tmp_path / "dst", name, lambda data: data.__setitem__(slice(None), rng.integers(0, 256, data.size)))
    (difference,) = forge(source, tmp_path / "dst")
    assert difference.name == name
    assert "are not those of least error; the first is half " in difference.detail


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_one_code_or_scale_beside_the_nearest_is_found(miniatures, tmp_path, forge, layout):
    source, destination = wide(miniatures["dense"], tmp_path / "src"), tmp_path / "dst"
    written(source, destination, layout, "w4a16")
    opened = open_both(source, destination, "config.json")
    names = opened.target.names("model.layers.1.mlp.down_proj")
    codes, scales = raw(destination, names.codes), raw(destination, names.block_scale)
    rounded, error = rounded_halves(opened, "model.layers.1.mlp.down_proj")
    assert len(rounded) > 4
    for half in rounded[::20]:
        byte = 8 * half + half % 8
        for moved in neighbours(int(codes[byte])):
            edit(destination, names.codes, lambda data, b=byte, m=moved: data.__setitem__(b, m))
            same = rounded_halves(opened, "model.layers.1.mlp.down_proj")[1][half] == error[half]
            found = [each.name for each in forge(source, destination)]
            assert found == ([] if same and (moved ^ codes[byte]) & 8 == 0 else [names.codes]), (half, byte, moved)
            edit(destination, names.codes, lambda data, b=byte: data.__setitem__(b, codes[b]))
        edit(destination, names.block_scale, lambda data, h=half: data.__setitem__(h, scales[h] ^ 1))
        assert {each.name for each in forge(source, destination)} == {names.codes}
        edit(destination, names.block_scale, lambda data, h=half: data.__setitem__(h, scales[h]))
    assert not forge(source, destination)


def rounded_halves(opened, module):
    """The half-blocks of a projection whose values are not the source's, and the squared errors of all."""
    pair, names = opened.source.pairs[module], opened.target.names(module)
    before, path = pair.codes.path.parent, opened.destination.path
    source = mxfp4_values(raw(before, pair.codes.name), raw(before, pair.scales.name), pair.bias)
    stored = float(raw(path, names.tensor_scale).view("<f4")[0])
    scale = 1.0 / stored if opened.target.form.reciprocal else stored
    values = nvfp4_values(raw(path, names.codes), raw(path, names.block_scale), scale)
    error = ((source - values) ** 2).reshape(-1, 16).sum(axis=1)
    return np.flatnonzero(error), error


def neighbours(byte):
    """The byte with its low code moved by one magnitude, or with its other sign."""
    code = byte & 15
    moved = {code ^ 8}
    moved |= {code + 1} if code & 7 < 7 else set()
    moved |= {code - 1} if code & 7 else set()
    return [byte & 0xF0 | each for each in moved]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(-30, 30), st.floats(2.0**-12, 2.0**12, width=32), st.booleans())
def test_the_bound_is_that_of_the_definition(seed, k, tensor_scale, reciprocal):
    """What `nearest` writes is not far, under any tensor scale; of random codes the error and the bound are right."""
    rng = np.random.default_rng(seed)
    seen = 1.0 / float(np.float32(1.0 / tensor_scale)) if reciprocal else tensor_scale
    codes = rng.integers(0, 256, (1, 16), np.uint8)
    codes[0, ::8] |= 0x07  # no half of zeros
    encoded = encode(codes, np.array([k + 127], np.uint8), Scaling(seen, None, k, k, 1, 0, verbatim=False))
    source, scales = codes.reshape(2, 8), encoded.block_scales.reshape(2)
    assert not find_far(source, np.array([k, k]), encoded.codes.reshape(2, 8), scales, seen)
    random = rng.integers(0, 256, (2, 8), np.uint8)
    for far in find_far(source, np.array([k, k]), random, scales, seen):
        values = E2M1.values[unpack(source[far.at])] * 2.0**k
        actual = E2M1.values[unpack(random[far.at])] * E4M3.values[scales[far.at]] * seen
        steps = (E4M3.values[1:0x7F] * seen)[:, None, None] * E2M1.values
        least = ((values[:, None] - steps) ** 2).min(axis=2).sum(axis=1).min()
        assert far.squared_error == pytest.approx(((values - actual) ** 2).sum())
        assert far.least == pytest.approx(least, abs=1e-12 * 4.0**k)


@pytest.mark.parametrize("scale", [0x00, 0x7F, 0x80, 0xFF])
def test_a_scale_that_is_not_positive_is_far(scale):
    source = np.full((1, 8), 0x71, np.uint8)
    assert find_far(source, np.array([0]), source, np.array([scale], np.uint8), 1.0)


def test_other_signs_and_values_out_of_nothing_are_far():
    zeros, one = np.zeros((1, 8), np.uint8), np.array([0x38], np.uint8)
    negative = np.full((1, 8), 0x88, np.uint8)
    assert not find_far(zeros, np.array([0]), zeros, one, 1.0)
    assert find_far(zeros, np.array([0]), negative, one, 1.0)
    assert find_far(zeros, np.array([0]), np.full((1, 8), 0x01, np.uint8), one, 1.0)
