"""The witness finds everything that is wrong, and only that."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.header import lay_out
from fp4cast.errors import CheckpointError, UnsupportedError
from fp4cast.families.recognise import read_source
from fp4cast.layouts import patterns
from fp4cast.verification.files import verify_files
from fp4cast.verification.opened import open_both
from helpers import edit, flip, lossy, options, raw, tree


def kinds_of(report):
    return {difference.kind for difference in report.differences}


@pytest.fixture
def copy(converted, tmp_path):
    return lambda kind: shutil.copytree(converted[kind], tmp_path / kind)


@pytest.mark.parametrize("kind", mini.KINDS)
def test_what_convert_writes_verifies(miniatures, converted, kind):
    report = fp4cast.verify(miniatures[kind], converted[kind])
    assert (report.ok, report.exact, report.differences) == (True, True, ())
    assert report.half_blocks["shifted"] > 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint so small that every bit of it can be flipped: verbatim, shifted and zero blocks."""
    root = tmp_path_factory.mktemp("tiny")
    codes = np.array([[0x71] * 16, [0x44] * 16, [0x80] * 16, [0x00] * 16, [0x12] * 16], np.uint8)
    scales = np.array([[125], [125 - 19], [200], [120], [118]], np.uint8)
    tensors = {
        "lm.down_proj.weight_packed": ("U8", codes),
        "lm.down_proj.weight_scale": ("U8", scales),
        "lm.norm.weight": ("BF16", np.arange(4, dtype=np.uint16)),
    }
    mini.write_checkpoint(root / "src", {"model-1.safetensors": tensors}, {})
    for layout in ("modelopt", "compressed-tensors"):
        report = fp4cast.convert(root / "src", root / layout, layout=layout)
        assert report.half_blocks == {"verbatim": 8, "shifted": 2, "rounded": 0}
    return root


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_every_single_flipped_bit_is_found(tiny, layout):
    for tensor in open_checkpoint(tiny / layout).tensors.values():
        for bit in range(8 * tensor.nbytes):
            flip(tensor, bit)
            report = fp4cast.verify(tiny / "src", tiny / layout, jobs=1)
            assert not report.ok, (tensor.name, bit)
            assert not report.exact
            flip(tensor, bit)
    assert fp4cast.verify(tiny / "src", tiny / layout).exact


def named(source, destination, tensor):
    """What a difference may be called that a change of this tensor makes: after its weight, or after the receipt."""
    opened = open_both(source, destination, "config.json")
    weights = [set(opened.target.names(module)) for module in opened.selection.modules]
    names = next((names for names in weights if tensor.name in names), {tensor.name})
    return names | {"fp4cast.json"} if "input_" in tensor.name else names


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_anywhere_is_found_in_every_family(miniatures, converted, data):
    kind = data.draw(st.sampled_from(mini.KINDS))
    tensors = open_checkpoint(converted[kind]).tensors
    tensor = tensors[data.draw(st.sampled_from(sorted(tensors)))]
    bit = data.draw(st.integers(0, 8 * tensor.nbytes - 1))
    flip(tensor, bit)
    try:
        report = fp4cast.verify(miniatures[kind], converted[kind])
    finally:
        flip(tensor, bit)
    assert {difference.name for difference in report.differences} & named(miniatures[kind], converted[kind], tensor)


def test_every_flipped_bit_of_a_rounded_tensor_is_found(miniatures, tmp_path):
    """No source value pins down a rounded half-block, so its bytes are recognised by their digest."""
    source = lossy(miniatures, tmp_path)
    fp4cast.convert(source, tmp_path / "dst", inexact="nearest")
    report = fp4cast.verify(source, tmp_path / "dst")
    assert (report.ok, report.exact) == (True, False)
    tensors = open_checkpoint(tmp_path / "dst").tensors
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    for tensor, bits in ((tensors[name], range(128, 256, 5)), (tensors[f"{name}_scale"], range(16, 32))):
        for bit in bits:
            flip(tensor, bit)
            assert not fp4cast.verify(source, tmp_path / "dst").ok, (tensor.name, bit)
            flip(tensor, bit)


def test_a_rounded_tensor_that_no_receipt_announces_is_a_difference(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    fp4cast.convert(source, tmp_path / "dst", inexact="nearest")
    (tmp_path / "dst" / "fp4cast.json").unlink()
    report = fp4cast.verify(source, tmp_path / "dst")
    assert not report.ok
    (difference,) = report.differences
    assert difference.kind == "values"
    assert "2 half-blocks hold other values than the source; the first is element" in difference.detail


def test_a_difference_says_where_and_by_how_much(miniatures, copy):
    destination = copy("kimi-k3")
    name = "language_model.model.layers.2.block_sparse_moe.experts.1.w1.weight"
    flip(open_checkpoint(destination).tensors[name], 8 * 40 + 2)
    (difference,) = fp4cast.verify(miniatures["kimi-k3"], destination).differences
    assert difference.name == name
    assert "element 16 of block 2: expected " in difference.detail


def test_the_position_is_right_in_a_transposed_bank(miniatures, copy):
    destination = copy("gpt-oss")
    tensor = open_checkpoint(destination).tensors["model.layers.0.mlp.experts.down_proj"]  # [4, 48, 96]
    expert, column, row = 2, 21, 70
    flip(tensor, 8 * ((expert * 48 + column) * 96 + row))
    (difference,) = fp4cast.verify(miniatures["gpt-oss"], destination).differences
    block = (expert * 96 + row) * 3 + column // 16
    assert f"element {2 * (column % 16)} of block {block}: " in difference.detail


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "moe"])
def test_a_wrong_sign_of_zero_is_a_difference(miniatures, copy, kind):
    destination = copy(kind)
    codes = next(t for t in open_checkpoint(destination).tensors.values() if t.dtype == "U8")
    zeros = np.flatnonzero(raw(destination, codes.name) & 0x0F == 0)
    flip(codes, 8 * int(zeros[0]) + 3)
    assert kinds_of(fp4cast.verify(miniatures[kind], destination)) == {"values"}


def rewrite(path, change):
    """Rewrite one shard with other tensors: name -> (dtype, array)."""
    shard = next(iter(open_checkpoint(path).shards.values()))
    tensors = {n: (t.dtype, raw(path, n).reshape(-1), t.shape) for n, t in shard.tensors.items()}
    change(tensors)
    placed = lay_out(((n, d, s) for n, (d, _, s) in tensors.items()), shard.metadata)
    order = sorted(tensors, key=lambda n: placed.offsets[n])
    shard.path.write_bytes(placed.header + b"".join(tensors[n][1].tobytes() for n in order))
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != shard.path.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.path.name)
    index_path.write_text(json.dumps(index))
    total = sum(t.nbytes for t in open_checkpoint(path).tensors.values())
    index["metadata"]["total_size"] = total
    index_path.write_text(json.dumps(index))


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.pop(NORM), "missing"),
        (lambda t: t.update(extra=("U8", np.zeros(3, np.uint8), (3,))), "unexpected"),
        (lambda t: t.update({NORM: ("F16", t[NORM][1], t[NORM][2])}), "dtype"),
        (lambda t: t.update({NORM: ("BF16", t[NORM][1], (1, *t[NORM][2]))}), "shape"),
    ],
)
def test_missing_unexpected_and_mistyped_tensors(miniatures, copy, change, kind):
    destination = copy("dense")
    rewrite(destination, change)
    assert kinds_of(fp4cast.verify(miniatures["dense"], destination)) == {kind}


def test_a_shard_that_the_index_does_not_name_is_unexpected(miniatures, copy):
    destination = copy("dense")
    shutil.copy(destination / "model-00001-of-00002.safetensors", destination / "model-stray.safetensors")
    assert kinds_of(fp4cast.verify(miniatures["dense"], destination)) == {"unexpected"}


def test_the_report_of_a_nan_is_valid_json(miniatures, copy):
    destination = copy("dense")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    edit(destination, name, lambda data: data.__setitem__(0, 0x7F))
    document = json.dumps(fp4cast.verify(miniatures["dense"], destination).to_json(), allow_nan=False)
    assert json.loads(document)["inexact"][0]["mse"] is None


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def quantization(config):
    return config["quantization_config"]


CONFIG_FAULTS = {
    "another width": ("moe", "config.json", lambda d: d.update(hidden_size=65), "config"),
    "another number of bits": (
        "moe",
        "config.json",
        lambda d: quantization(d)["config_groups"]["group_0"]["weights"].update(num_bits=5),
        "config",
    ),
    "another version": ("moe", "hf_quant_config.json", lambda d: d["producer"].update(version="9"), "config"),
    "total_size": ("moe", "model.safetensors.index.json", lambda d: d["metadata"].update(total_size=1), "index"),
    "a layer is not listed": ("moe", "config.json", lambda d: quantization(d)["quantized_layers"].popitem(), "config"),
    "another algorithm": (
        "moe",
        "hf_quant_config.json",
        lambda d: d["quantization"].update(quant_algo="FP8"),
        "config",
    ),
    "no group size": ("gpt-oss", "hf_quant_config.json", lambda d: d["quantization"].pop("group_size"), "config"),
    "an empty document": ("gpt-oss", "hf_quant_config.json", lambda d: d.clear(), "config"),
    "a forgotten router": ("gpt-oss", "config.json", lambda d: quantization(d)["ignore"].pop(2), "config"),
    "an ignored expert": ("gpt-oss", "config.json", lambda d: quantization(d)["ignore"].append("experts"), "config"),
    "a left manifest": (
        "kimi-k3",
        "config.json",
        lambda d: d["text_config"].update(quantization_config={"quant_method": "compressed-tensors"}),
        "config",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_documents_that_disagree_are_differences(miniatures, copy, fault):
    kind, file, change, expected = CONFIG_FAULTS[fault]
    destination = copy(kind)
    edit_json(destination / file, change)
    assert kinds_of(fp4cast.verify(miniatures[kind], destination)) == {expected}


def test_a_missing_hf_quant_config_is_a_difference(miniatures, copy):
    destination = copy("moe")
    (destination / "hf_quant_config.json").unlink()
    assert kinds_of(fp4cast.verify(miniatures["moe"], destination)) == {"config"}


COMPANIONS = {
    "deleted": ("LICENSE", lambda p: p.unlink()),
    "edited": ("LICENSE", lambda p: p.write_text("another licence")),
    "added": ("added.py", lambda p: p.write_text("pass")),
    "weights in another format": ("consolidated.pth", lambda p: p.write_bytes(b"weights")),
}


@pytest.mark.parametrize("change", COMPANIONS)
def test_a_companion_that_differs_is_named_and_fails_only_under_strict(miniatures, copy, change):
    destination = copy("dense")
    name, edit_file = COMPANIONS[change]
    edit_file(destination / name)
    report = fp4cast.verify(miniatures["dense"], destination)
    assert report.ok and report.exact
    assert [(each.name, each.kind, each.area) for each in report.differences] == [(name, "file", "companions")]
    strict = fp4cast.verify(miniatures["dense"], destination, strict=True)
    assert strict.exact and not strict.ok


@pytest.mark.parametrize("name", ["README.md", "README.svg", "README.source.md"])
@pytest.mark.parametrize("change", [lambda p: p.write_text("# Our model"), lambda p: p.unlink(missing_ok=True)])
def test_the_card_is_nobodys_business(miniatures, copy, change, name):
    destination = copy("dense")
    change(destination / name)
    for report in (
        fp4cast.verify(miniatures["dense"], destination, strict=True),
        verify_files(destination, strict=True),
    ):
        assert report.ok and not report.differences


def test_a_wrong_document_leaves_the_verdict_on_the_weights_alone(miniatures, copy):
    destination = copy("moe")
    (destination / "hf_quant_config.json").unlink()
    report = fp4cast.verify(miniatures["moe"], destination)
    assert report.exact and not report.ok
    assert report.to_json()["verdicts"] == {"weights": True, "documents": False, "companions": True}


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 2.0**-140])
@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
def test_scales_that_no_engine_survives_are_differences(miniatures, copy, suffix, value):
    destination = copy("deepseek-v4")
    name = f"layers.0.ffn.experts.0.w2.{suffix}"
    edit(destination, name, lambda data: data.__setitem__(slice(None), np.array([value], "<f4").view(np.uint8)))
    report = fp4cast.verify(miniatures["deepseek-v4"], destination)
    assert name in {d.name for d in report.differences}
    assert {d.name for d in report.differences} <= {name, "fp4cast.json"}


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("kind", ["gpt-oss", "dense"])
def test_nan_and_negative_block_scales_are_never_equal(miniatures, copy, kind, byte):
    """255 is also what "no scale is the same" looks like: the zero blocks with byte 200 must not hide it."""
    destination = copy(kind)
    zero = next(iter(read_source(open_checkpoint(miniatures[kind])).pairs.values()))
    name = f"{zero.module}_weight_scale" if kind == "gpt-oss" else f"{zero.module}.weight_scale"
    source = raw(miniatures[kind], zero.scales.name).reshape(zero.scales.shape)
    at = np.argwhere(source == 200)[0]
    position = at[0] * source.shape[1] * 2 + at[1] * 2
    if kind == "gpt-oss":  # [E, K/16, N]
        position = (at[0] * source.shape[2] * 2 + at[2] * 2) * source.shape[1] + at[1]
    edit(destination, name, lambda data: data.__setitem__(int(position), byte))
    report = fp4cast.verify(miniatures[kind], destination)
    assert not report.ok
    assert any(f"{name}: 1 block scales are NaN or negative" in str(d) for d in report.differences)


def test_merged_projections_with_different_input_scales_are_a_difference(miniatures, copy):
    destination = copy("deepseek-v4")
    name = "layers.0.ffn.experts.2.w3.input_scale"
    edit(destination, name, lambda data: data.__setitem__(slice(None), np.array([2.0], "<f4").view(np.uint8)))
    details = [d.detail for d in fp4cast.verify(miniatures["deepseek-v4"], destination).differences]
    assert any("engines merge them" in detail for detail in details)
    assert any("not those that the conversion wrote" in detail for detail in details)


def test_another_checkpoint_is_not_the_same(converted, tmp_path):
    other = mini.make("moe", tmp_path / "other", seed=1)
    report = fp4cast.verify(other, converted["moe"])
    assert not report.exact
    assert report.tensors["exact"] == 0


def test_a_destination_that_is_not_nvfp4_is_an_error(miniatures):
    with pytest.raises(UnsupportedError, match="describes no NVFP4 checkpoint"):
        fp4cast.verify(miniatures["moe"], miniatures["moe"])


def test_a_destination_without_config_is_an_error(miniatures, copy):
    destination = copy("moe")
    (destination / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fp4cast.verify(miniatures["moe"], destination)


@pytest.mark.parametrize("pattern", ["re:([a-z0-9_.]+)+!", "re:(.|.)*!", "re:a{99999999999999999}", "re:" + "(" * 5000])
def test_hostile_patterns_are_refused_before_anything_is_written(miniatures, tmp_path, pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    edit_json(source / "config.json", lambda d: quantization(d)["ignore"].append(pattern))
    with pytest.raises(CheckpointError, match=r"config\.json: the config ignores"):
        fp4cast.convert(source, tmp_path / "dst", layout="compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert fp4cast.convert(source, tmp_path / "dst").exact, "the modelopt layout has no patterns"


def test_a_source_that_ignores_its_own_codes_is_refused_before_anything_is_written(miniatures, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    edit_json(source / "config.json", lambda d: quantization(d)["ignore"].append(r"re:.*experts\.1\.up_proj"))
    with pytest.raises(CheckpointError, match=r"`ignore` means model\.layers\.0\.mlp\.experts\.1\.up_proj, which"):
        fp4cast.convert(source, tmp_path / "dst", layout="compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: quantization(d).update(quant_method=[]),
        lambda d: quantization(d).update(quant_algo={}),
        lambda d: quantization(d).update(quantized_layers=[1]),
        lambda d: quantization(d).update(quantized_layers={"a": {"quant_algo": []}}),
        lambda d: d.update(quantization_config=[]),
        lambda d: d.update(quantization_config={"quant_method": "compressed-tensors", "format": []}),
    ],
)
def test_a_config_of_the_wrong_types_is_an_error_not_a_crash(miniatures, copy, change):
    destination = copy("moe")
    edit_json(destination / "config.json", change)
    with pytest.raises(UnsupportedError, match="describes no NVFP4"):
        fp4cast.verify(miniatures["moe"], destination)


def test_verify_writes_nothing(miniatures, converted):
    before = tree(converted["moe"])
    fp4cast.verify(miniatures["moe"], converted["moe"])
    assert tree(converted["moe"]) == before


@pytest.mark.parametrize("kind", [kind for kind in mini.KINDS if not options(kind)])
def test_plain_miniatures_fit_marlin_and_trapped_ones_do_not(plain_miniatures, miniatures, converted, tmp_path, kind):
    report = fp4cast.convert(plain_miniatures[kind], tmp_path / "dst")
    assert report.marlin_exact
    assert not fp4cast.verify(miniatures[kind], converted[kind]).marlin_exact


def zeroed(source, path, modules):
    """A copy of a checkpoint in which some projections hold nothing but zeros, of either sign."""
    copy = shutil.copytree(source, path)
    for module in modules:
        edit(copy, f"{module}.weight_packed", lambda data: data.__setitem__(slice(None), 0x80))
    return copy


def doubled(path, module):
    edit(
        path, f"{module}.weight_scale_2", lambda data: data.__setitem__(slice(None), (data.view("<f4") * 2).view("u1"))
    )


def test_tensors_of_zeros_are_named_because_their_scales_are_free(miniatures, tmp_path):
    down, gate, up = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up"))
    source = zeroed(miniatures["dense"], tmp_path / "src", [down, gate])
    report = fp4cast.convert(source, tmp_path / "dst")
    expected = f"1 tensor holds only zeros, so its tensor scale is free: {down}.weight_scale_2"
    assert report.notes == (expected,), "gate_proj shares the scale of up_proj, which holds values"
    doubled(tmp_path / "dst", down)
    assert fp4cast.verify(source, tmp_path / "dst").notes == (expected,)
    doubled(tmp_path / "dst", gate)
    assert not fp4cast.verify(source, tmp_path / "dst").ok
    source = zeroed(source, tmp_path / "src2", [up])
    (note,) = fp4cast.convert(source, tmp_path / "dst2").notes
    assert note.startswith("3 tensors hold only zeros, so their tensor scales are free: ")
    doubled(tmp_path / "dst2", up)
    assert not fp4cast.verify(source, tmp_path / "dst2").ok, "engines merge it with gate_proj"


def test_a_bank_of_zeros_is_named_too(miniatures, tmp_path):
    source = shutil.copytree(miniatures["gpt-oss"], tmp_path / "src")
    name = "model.layers.0.mlp.experts.down_proj"
    edit(source, f"{name}_blocks", lambda data: data.__setitem__(slice(None), 0))
    assert fp4cast.convert(source, tmp_path / "dst").notes == (
        f"1 tensor holds only zeros, so its tensor scale is free: {name}_weight_scale_2",
    )
