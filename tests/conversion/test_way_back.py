"""MXFP4 -> NVFP4 -> MXFP4: values always, bytes where a receipt proves them; what is no MXFP4 is refused."""

import base64
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy as safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.header import lay_out
from fp4cast.checkpoints.tiles import Limits
from fp4cast.conversion import outside
from fp4cast.conversion.job_array import convert_part, finish
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.errors import CheckpointError, DestinationError, InexactError, UnsupportedError, UsageError
from fp4cast.families.recognise import read_source
from fp4cast.verification.receipt import Receipt
from helpers import VARIANTS, call, edit, flip, interrupted, lossy, plain, raw, tree

BACK = ConvertOptions(to="mxfp4")
RECEIPT, INDEX = "fp4cast.json", "model.safetensors.index.json"
KINDS = ["gpt-oss", "deepseek-v4.1", "kimi-k3", "moe", "dense-0.13"]
RENAMED = {"gpt-oss-original", "mlx-mxfp4"}  # the Hub's names are all that comes back
KEPT = [each for each in VARIANTS if each[0] not in RENAMED]


def forth(source, path, layout="modelopt", activations=None):
    scales = 1.0 if activations == "w4a4" else None
    fp4cast.convert(source, path, layout=layout, activations=activations, input_scales=scales)
    return path


@pytest.fixture(scope="module")
def plain_ones(plain_miniatures, tmp_path_factory):
    """(kind, layout, activations) -> the conversion of a miniature of which nothing is lost."""
    root = tmp_path_factory.mktemp("forth")
    return {each: forth(plain_miniatures[each[0]], root / "-".join(each), *each[1:]) for each in VARIANTS}


def same_files(before, after):
    """The files in which two directories differ; the original's other formats are not carried along."""
    a, b = tree(before), tree(after)
    carried = {name for name in a if not name.startswith(("original/", "metal/"))}
    return sorted(name for name in carried | b.keys() if a.get(name) != b.get(name))


def values_of(path, other):
    """Whether two MXFP4 checkpoints are one NVFP4 checkpoint's originals."""
    return fp4cast.verify(path, other).exact


@pytest.mark.parametrize("variant", KEPT)
def test_every_byte_comes_back_where_no_code_was_shifted(plain_miniatures, plain_ones, tmp_path, variant):
    """Config, companions and shards; the index says the same in our words."""
    source = plain_miniatures[variant[0]]
    report = fp4cast.convert(plain_ones[variant], tmp_path / "back", to="mxfp4")
    assert (report.exact, report.original, report.verified, report.layout) == (True, True, True, "mxfp4")
    assert same_files(source, tmp_path / "back") == [RECEIPT, INDEX]
    indexes = [json.loads((path / INDEX).read_text()) for path in (source, tmp_path / "back")]
    assert indexes[0] == indexes[1]
    assert any("byte for byte the original: yes" in note for note in report.notes)
    assert any("input" in note and "dropped" in note for note in report.notes) == (variant[2] == "w4a4")
    assert report.to_json()["original"] is True


@pytest.mark.parametrize("variant", [each for each in VARIANTS if each[0] in RENAMED])
def test_of_other_names_every_value_comes_back(plain_ones, tmp_path, variant):
    nvfp4, back = plain_ones[variant], tmp_path / "back"
    report = fp4cast.convert(nvfp4, back, to="mxfp4")
    assert (report.exact, report.original, report.verified) == (True, None, True)
    assert any("byte for byte the original: unknown" in note for note in report.notes)
    assert fp4cast.inspect(back).family == {"mlx-mxfp4": "compressed-tensors"}.get(variant[0], "gpt-oss")
    again = forth(back, tmp_path / "again", *variant[1:])
    assert all((again / file).read_bytes() == (nvfp4 / file).read_bytes() for file in open_checkpoint(nvfp4).shards)


@pytest.mark.parametrize("kind", ["ling-3", "mimo-v2.6"])
def test_beside_fp8_nothing_but_the_receipt_says_what_the_original_was(plain_ones, tmp_path, kind):
    nvfp4 = shutil.copytree(plain_ones[next(each for each in VARIANTS if each[0] == kind)], tmp_path / "nvfp4")
    (nvfp4 / RECEIPT).unlink()
    with pytest.raises(UnsupportedError, match="NVFP4 beside FP8, and without the receipt"):
        fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")


@pytest.mark.parametrize("variant", KEPT)
def test_every_byte_comes_back_where_codes_were_shifted(miniatures, tmp_path, variant):
    """And where blocks of zeros have exponents outside of the window: the receipt holds them."""
    kind, *target = variant
    nvfp4 = forth(miniatures[kind], tmp_path / "nvfp4", *target)
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert (report.exact, report.original) == (True, True) and report.half_blocks["shifted"] > 0
    assert report.half_blocks == fp4cast.verify(miniatures[kind], nvfp4).half_blocks
    assert same_files(miniatures[kind], tmp_path / "back") == [RECEIPT, INDEX]
    assert values_of(tmp_path / "back", nvfp4)


@pytest.mark.parametrize("variant", KEPT)
def test_every_value_comes_back_where_codes_were_shifted_and_nothing_says_how(
    miniatures, tmp_path, variant, monkeypatch
):
    """As where there are too many blocks outside of the window: it is said, with the names."""
    monkeypatch.setattr(outside, "_LEAST", 0)
    kind, *target = variant
    nvfp4 = forth(miniatures[kind], tmp_path / "nvfp4", *target)
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert (report.exact, report.original) == (True, False)
    assert any("byte for byte the original: no: exponents of blocks outside" in note for note in report.notes)
    assert fp4cast.verify(nvfp4, tmp_path / "back").exact
    (nvfp4 / RECEIPT).unlink()  # it counts the shifted half-blocks, of which there are none any more
    assert values_of(tmp_path / "back", nvfp4) and values_of(miniatures[kind], nvfp4)
    again = forth(tmp_path / "back", tmp_path / "again", *target)
    shards = {name: digest for name, digest in tree(nvfp4).items() if name.endswith(".safetensors")}
    assert shards.items() <= tree(again).items()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_receipt_the_family_s_own_config_comes_back(plain_miniatures, plain_ones, tmp_path, kind):
    variant = next(each for each in VARIANTS if each[0] == kind)
    nvfp4 = shutil.copytree(plain_ones[variant], tmp_path / "nvfp4")
    for name in (RECEIPT, "README.md", "README.svg"):  # without a receipt, a card is somebody's own
        (nvfp4 / name).unlink()
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert report.exact and report.original is None
    assert any("byte for byte the original: unknown" in note for note in report.notes)
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (plain_miniatures[kind], tmp_path / "back")
    )
    found = [config.get("text_config", {}).pop("quantization_config", None) for config in (before, after)]
    if found == [None, None]:
        found = [config.pop("quantization_config") for config in (before, after)]
    assert before == after
    assert found[0]["quant_method"] == found[1]["quant_method"] and found[0].get("format") == found[1].get("format")
    if kind in ("gpt-oss", "deepseek-v4.1"):
        assert found[0] == found[1]
    if kind != "dense-0.13":  # that its exponents had another bias, only the original's config says
        assert {"config.json", RECEIPT, INDEX} >= set(same_files(plain_miniatures[kind], tmp_path / "back"))
    again = forth(tmp_path / "back", tmp_path / "again", *variant[1:])
    assert all((again / file).read_bytes() == (nvfp4 / file).read_bytes() for file in open_checkpoint(nvfp4).shards)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["gpt-oss", "deepseek-v4", "moe"]),
    st.builds(
        Limits,
        tile_bytes=st.sampled_from([256, 5000, 1 << 20]),
        tile_rows=st.sampled_from([1, 7, 64]),
        band_rows=st.sampled_from([1, 5, 256]),
        write_bytes=st.sampled_from([100, 7000]),
        encode_blocks=st.sampled_from([3, 1000]),
        scan_bytes=st.sampled_from([16, 4000]),
    ),
    st.sampled_from([1, 3]),
)
def test_no_byte_depends_on_how_the_work_is_cut(converted, tmp_path_factory, kind, limits, jobs):
    root = tmp_path_factory.mktemp("cut")
    fp4cast.convert(converted[kind], root / "whole", to="mxfp4", verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LIMITS", limits)
        fp4cast.convert(converted[kind], root / "cut", to="mxfp4", jobs=jobs)
    assert tree(root / "whole") == tree(root / "cut")


def test_half_blocks_under_different_scales_become_one_block(plain_ones, tmp_path):
    """As other tools write them: codes change, and the writer and the witness count them alike."""
    nvfp4 = shutil.copytree(plain_ones["dense", "modelopt", "w4a16"], tmp_path / "nvfp4")
    name = "model.layers.0.mlp.down_proj.weight"
    edit(nvfp4, name, lambda codes: codes.__setitem__(slice(0, 16), [0x44] * 8 + [0x22] * 8))  # 2 and 1
    edit(nvfp4, f"{name}_scale", lambda scales: scales.__setitem__(slice(0, 2), [0x38, 0x40]))  # 1 and 2
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert report.exact and report.half_blocks["shifted"] == 1 and report.original is False
    assert any("shards of the source are not as they were written" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["gpt-oss", "moe"])
def test_what_no_mxfp4_block_holds_is_refused_with_its_name(plain_ones, tmp_path, kind):
    nvfp4 = shutil.copytree(plain_ones[kind, "modelopt", "w4a16"], tmp_path / "nvfp4")
    module = {"gpt-oss": "model.layers.1.mlp.experts.down_proj", "moe": "model.layers.1.mlp.experts.2.up_proj"}[kind]
    name = f"{module}_weight_scale" if kind == "gpt-oss" else f"{module}.weight_scale"
    rows = 96 if kind == "gpt-oss" else 1  # block 2 of the first row: its second half, where channels come last
    edit(nvfp4, name, lambda scales: scales.__setitem__(5 * rows, 0x3D))
    with pytest.raises(InexactError, match=r"1 of \d+ NVFP4 weights hold values that no MXFP4 block has") as caught:
        fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert f"{module}: 1 of" in str(caught.value)
    assert "block 2: expected magnitudes of E2M1 times one power of two, got" in str(caught.value)
    assert "1.625" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["nvfp4"]


def test_a_rounded_cast_is_refused(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    fp4cast.convert(source, tmp_path / "nvfp4", inexact="nearest")
    report = fp4cast.verify(source, tmp_path / "nvfp4")
    assert report.tensors["inexact"] == 1
    try:
        back = fp4cast.convert(tmp_path / "nvfp4", tmp_path / "back", to="mxfp4")
    except InexactError as error:
        assert "experts.0.down_proj" in str(error)
    else:  # what it was rounded to is MXFP4, too: that comes back, and is not called the original
        assert back.original is False and any("experts.0.down_proj" in note for note in back.notes)


def damage(path, name, what):
    """Write a shard of one tensor less, or of another dtype or shape, in the place of `name`'s."""
    tensor = open_checkpoint(path).tensors[name]
    tensors = list(open_checkpoint(path).shards[tensor.path.name].tensors.values())
    data = {each.name: raw(path, each.name).tobytes() for each in tensors}
    kept = [
        (each.name, *(what if each.name == name else (each.dtype, each.shape)))
        for each in tensors
        if what is not None or each.name != name
    ]
    layout = lay_out(kept, {"format": "pt"})
    body = b"".join(data[each] for each in sorted(layout.offsets, key=layout.offsets.__getitem__))
    tensor.path.write_bytes(layout.header + body)
    if what is None:
        index = json.loads((path / INDEX).read_text())
        del index["weight_map"][name]
        (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("tensor", "what", "message"),
    [
        ("weight", None, "expected '.*weight' in one of the shards"),
        ("weight_scale", None, "expected '.*weight_scale' in one of the shards"),
        ("weight_scale_2", None, "expected '.*weight_scale_2' in one of the shards"),
        ("weight_scale", ("U8", (64, 6)), "expected .*F8_E4M3"),
        ("weight_scale", ("F8_E4M3", (32, 12)), "expected "),
        ("weight_scale_2", ("U8", (4,)), "expected one F32 for the whole weight"),
    ],
)
def test_damage_is_named(plain_ones, tmp_path, tensor, what, message):
    nvfp4 = shutil.copytree(plain_ones["dense", "modelopt", "w4a16"], tmp_path / "nvfp4")
    damage(nvfp4, f"model.layers.1.mlp.down_proj.{tensor}", what)
    with pytest.raises(CheckpointError, match=message) as caught:
        fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_a_useless_tensor_scale_is_refused(plain_ones, tmp_path):
    nvfp4 = shutil.copytree(plain_ones["dense", "modelopt", "w4a16"], tmp_path / "nvfp4")
    edit(nvfp4, "model.layers.1.mlp.down_proj.weight_scale_2", lambda data: data.__setitem__(slice(0, 4), 0))
    with pytest.raises(InexactError, match=r"down_proj.weight_scale_2 .* is 0\.0; expected a positive normal"):
        fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")


def test_what_is_no_nvfp4_is_refused(miniatures, tmp_path):
    with pytest.raises(UnsupportedError, match="holds no NVFP4 weights, so there is no way back"):
        fp4cast.convert(miniatures["moe"], tmp_path / "back", to="mxfp4")
    with pytest.raises(UsageError, match="--to must be nvfp4 or mxfp4, got 'mxfp8'"):
        fp4cast.convert(miniatures["moe"], tmp_path / "back", to="mxfp8")


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "compressed-tensors"},
        {"activations": "w4a16"},
        {"inexact": "nearest"},
        {"input_scales": 1.0},
        {"kv_cache_qformat": "fp8_cast"},
    ],
)
def test_options_of_the_other_direction_are_refused(plain_ones, tmp_path, options):
    with pytest.raises(UsageError, match="--to mxfp4 knows no"):
        fp4cast.convert(plain_ones["moe", "modelopt", "w4a16"], tmp_path / "back", to="mxfp4", **options)


def test_scales_of_the_cache_are_dropped(plain_miniatures, tmp_path):
    source = plain_miniatures["dense"]
    fp4cast.convert(source, tmp_path / "nvfp4", layout="compressed-tensors", kv_cache_qformat="fp8_cast")
    report = fp4cast.convert(tmp_path / "nvfp4", tmp_path / "back", to="mxfp4")
    assert report.original and any("k_scale" in note for note in report.notes)
    assert same_files(source, tmp_path / "back") == [RECEIPT, INDEX]


def test_the_source_s_card_has_its_own_name_again(plain_miniatures, tmp_path):
    source = shutil.copytree(plain_miniatures["moe"], tmp_path / "src")
    (source / "README.md").write_text("The original's card.\n")
    nvfp4 = forth(source, tmp_path / "nvfp4")
    assert (nvfp4 / "README.source.md").is_file()
    fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert same_files(source, tmp_path / "back") == [RECEIPT, INDEX]
    fp4cast.convert(source, tmp_path / "bare", card=False)
    fp4cast.convert(tmp_path / "bare", tmp_path / "again", to="mxfp4")
    assert same_files(source, tmp_path / "again") == [RECEIPT, INDEX]


def test_an_edited_config_keeps_its_edit(plain_miniatures, plain_ones, tmp_path):
    nvfp4 = shutil.copytree(plain_ones["kimi-k3", "modelopt", "w4a16"], tmp_path / "nvfp4")
    config = json.loads((nvfp4 / "config.json").read_text())
    config["text_config"]["rope_theta"] = 7
    (nvfp4 / "config.json").write_text(json.dumps(config))
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert report.original is False and any("config.json was edited since" in note for note in report.notes)
    before = json.loads((plain_miniatures["kimi-k3"] / "config.json").read_text())
    before["text_config"]["rope_theta"] = 7
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before


def test_a_misplaced_quantization_config_is_named(plain_ones, tmp_path):
    nvfp4 = shutil.copytree(plain_ones["moe", "modelopt", "w4a16"], tmp_path / "nvfp4")
    config = json.loads((nvfp4 / "config.json").read_text())
    (nvfp4 / "config.json").write_text(json.dumps({**config, "text_config": {"quantization_config": 3}}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: text_config.quantization_config is '3', expected an object"
    ):
        fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")


def test_a_receipt_with_a_text_that_no_file_holds(plain_ones, tmp_path):
    nvfp4 = shutil.copytree(plain_ones["moe", "modelopt", "w4a16"], tmp_path / "nvfp4")
    forged(nvfp4, config="\ud800")
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert report.exact and report.original is False


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"original": {"config": "{", "headers": 3, "lost": {}}}'])
def test_a_damaged_receipt_promises_nothing(plain_ones, tmp_path, text):
    nvfp4 = shutil.copytree(plain_ones["moe", "modelopt", "w4a16"], tmp_path / "nvfp4")
    (nvfp4 / RECEIPT).write_text(text)
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert report.exact and report.original is None


def forged(nvfp4, **changes):
    """Write the receipt anew, with another original."""
    receipt = Receipt.read(nvfp4)
    original = replace(receipt.original, **changes)
    (nvfp4 / RECEIPT).write_bytes(replace(receipt, original=original).to_bytes())


MODULE = "model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    "text",
    [
        "?",
        "AAAA",
        base64.b64encode(b"\xff" * 8 + b"\3").decode(),  # a run of 2^32 - 1 blocks as far apart
        base64.b64encode(b"\1\0\0\0\1\0\0\0\xff").decode(),  # NaN
        base64.b64encode(b"\1\0\0\0\0\0\0\0\3").decode(),  # a block before the first
        outside.Outside(np.array([1 << 30]), np.array([3], np.uint8)).encode(1 << 31),
        outside.Outside(np.array([0, 5]), np.array([3, 254], np.uint8)).encode(100),  # no exponents of these blocks
    ],
)
def test_a_receipt_that_does_not_fit_changes_no_value(converted, tmp_path, text):
    nvfp4 = shutil.copytree(converted["moe"], tmp_path / "nvfp4")
    forged(nvfp4, outside={**Receipt.read(nvfp4).original.outside, MODULE: text})
    report = fp4cast.convert(nvfp4, tmp_path / "back", to="mxfp4")
    assert (report.exact, report.original) == (True, False)
    assert any(MODULE in note for note in report.notes)


def test_a_source_whose_headers_say_no_format_comes_back(tmp_path):
    """As the library safetensors writes it."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {"lm.up_proj.weight_packed": codes.reshape(8, -1), "lm.up_proj.weight_scale": scales}
    (tmp_path / "src").mkdir()
    safetensors.save_file({**tensors, "lm.norm.weight": np.ones(8, np.float16)}, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text('{"quantization_config":{"quant_method":"compressed-tensors"}}')
    forth(tmp_path / "src", tmp_path / "nvfp4")
    report = fp4cast.convert(tmp_path / "nvfp4", tmp_path / "back", to="mxfp4")
    assert report.original is True
    assert same_files(tmp_path / "src", tmp_path / "back") == [RECEIPT]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 9_999), st.integers(0, 254), max_size=60), st.data())
def test_exponents_survive_as_a_text(known, data):
    numbers = np.array(sorted(known), np.int64)
    every = outside.Outside(numbers, np.array([known[number] for number in numbers.tolist()], np.uint8))
    text = every.encode(10_000)
    if not known:
        assert text == ""
        return
    found = outside.decode(text, 10_000)
    np.testing.assert_array_equal(found.numbers, every.numbers)
    np.testing.assert_array_equal(found.exponents, every.exponents)
    start, rows = data.draw(st.integers(0, 9_000)), data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, 50))
    width = data.draw(st.integers(1, stride))
    part = found.within(start, rows, width, stride)
    whole = {row * width + i: start + row * stride + i for row in range(rows) for i in range(width)}
    expected = {place: known[number] for place, number in whole.items() if number in known}
    assert dict(zip(part.numbers.tolist(), part.exponents.tolist(), strict=True)) == expected
    assert outside.decode(text, max(known)) is None


# --- the byte path ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(converted, tmp_path):
    fp4cast.convert(converted["gpt-oss"], tmp_path / "whole", to="mxfp4")
    interrupted(converted["gpt-oss"], tmp_path / "back", 0.7, to="mxfp4")
    assert not (tmp_path / "back").exists()
    report = fp4cast.convert(converted["gpt-oss"], tmp_path / "back", to="mxfp4", resume=True)
    assert any("1 of 2 shards had been finished before" in note for note in report.notes)
    assert tree(tmp_path / "back") == tree(tmp_path / "whole")


def test_what_is_complete_is_compared_and_not_written_again(converted, tmp_path):
    fp4cast.convert(converted["moe"], tmp_path / "back", to="mxfp4")
    report = fp4cast.convert(converted["moe"], tmp_path / "back", to="mxfp4")
    assert report.exact and report.bytes["written"] == 0
    name = "model.layers.0.mlp.experts.1.up_proj.weight_packed"
    flip(open_checkpoint(tmp_path / "back").tensors[name], 77)
    with pytest.raises(DestinationError, match="pass --overwrite to write it again"):
        fp4cast.convert(converted["moe"], tmp_path / "back", to="mxfp4")
    assert fp4cast.convert(converted["moe"], tmp_path / "back", to="mxfp4", overwrite=True).exact


@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_a_job_array(converted, tmp_path, parts):
    fp4cast.convert(converted["gpt-oss"], tmp_path / "whole", to="mxfp4")
    for part in range(1, parts + 1):
        convert_part(converted["gpt-oss"], tmp_path / "back", part, parts, BACK)
    assert finish(converted["gpt-oss"], tmp_path / "back", BACK).exact
    assert tree(tmp_path / "back") == tree(tmp_path / "whole")


# --- the witness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def returned(converted, tmp_path_factory):
    """kind -> what its conversion becomes again."""
    root = tmp_path_factory.mktemp("returned")
    for kind in mini.KINDS:
        fp4cast.convert(converted[kind], root / kind, to="mxfp4")
    return root


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_found(converted, returned, data):
    """But for the exponents of blocks of zeros, which no value tells."""
    kind = data.draw(st.sampled_from(mini.KINDS))
    tensors = open_checkpoint(returned / kind).tensors
    name = data.draw(st.sampled_from(sorted(tensors)))
    bit = data.draw(st.integers(0, 8 * tensors[name].nbytes - 1))
    flip(tensors[name], bit)
    try:
        report = fp4cast.verify(converted[kind], returned / kind)
    finally:
        flip(tensors[name], bit)
    family = read_source(open_checkpoint(returned / kind)).family
    codes = name.removesuffix(family.scales.text) + family.codes.text  # whose values are others then
    if report.ok:
        block = raw(returned / kind, codes).reshape(-1, 16)[bit // 8]
        assert not (block & 0x77).any()
    else:
        assert {difference.name for difference in report.differences} & {name, codes}


@pytest.mark.parametrize(
    ("file", "change", "kind"),
    [
        ("config.json", lambda text: text.replace("mxfp4-pack", "nvfp4-pack"), "config"),
        ("config.json", lambda text: text.replace('"vocab_size": 256', '"vocab_size": 255'), "config"),
        ("hf_quant_config.json", lambda _: "{}", "config"),
        (INDEX, lambda text: text.replace('"total_size": ', '"total_size": 1'), "index"),
        ("LICENSE", lambda _: "another", "file"),
        ("more.safetensors", lambda _: "another", "unexpected"),
    ],
)
def test_a_changed_document_is_found(converted, returned, tmp_path, file, change, kind):
    back = shutil.copytree(returned / "dense", tmp_path / "back")
    path = back / file
    path.write_text(change(path.read_text() if path.exists() else ""))
    report = fp4cast.verify(converted["dense"], back, strict=True)
    assert not report.ok
    assert (file, kind) in {(each.name, each.kind) for each in report.differences}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight_packed"])
def test_a_missing_tensor_is_found(converted, returned, tmp_path, name):
    back = shutil.copytree(returned / "dense", tmp_path / "back")
    damage(back, name, None)
    try:
        report = fp4cast.verify(converted["dense"], back)
    except CheckpointError as error:
        assert name in str(error)
    else:
        assert (name, "missing") in {(each.name, each.kind) for each in report.differences}


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command(plain_ones, miniatures, tmp_path):
    nvfp4 = plain_ones["gpt-oss", "modelopt", "w4a4"]
    found = call("convert", nvfp4, tmp_path / "back", "--to", "mxfp4")
    assert found.exit_code == 0
    text = plain(found.output)
    assert "byte for byte the original: yes" in text and "every value equals the source's" in text
    assert "mxfp4" in text
    document = json.loads(call("verify", nvfp4, tmp_path / "back", "--json").stdout)
    assert (document["ok"], document["exact"], document["layout"]) == (True, True, "mxfp4")
    assert (document["source"], document["destination"]) == (str(nvfp4), str(tmp_path / "back"))
    wrong = call("convert", miniatures["moe"], tmp_path / "other", "--to", "mxfp4", "--json")
    assert wrong.exit_code == 1 and "no way back" in json.loads(wrong.stdout)["error"]["message"]
