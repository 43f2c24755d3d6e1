"""MLX's mxfp4 becomes MLX's nvfp4, which has no tensor scale: exactly, or not at all."""

import json

import numpy as np
import pytest

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import DestinationError, InexactError, ScaleError, UnsupportedError, UsageError
from fp4cast.formats import mxfp4_values, nvfp4_values
from fp4cast.miniatures.draft import write_checkpoint
from helpers import call, edit, raw, tree

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
AFFINE = {"group_size": 64, "bits": 8}
UP, DOWN = "model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.mlp.down_proj"


def make(path, *, low=-9, high=8, mode=MXFP4, **sections):
    """A bank of experts and a projection in mxfp4, the scales of one in another shard; one in affine, and a norm."""
    rng = np.random.default_rng(0)

    def packed(*shape):
        codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
        scales = rng.integers(low + 127, high + 128, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
        return ("U32", codes.view("<u4")), ("U8", scales)

    (up, up_scales), (down, down_scales) = packed(4, 8, 96), packed(8, 64)
    q = "model.layers.0.self_attn.q_proj"
    affine = {f"{q}.weight": ("U32", rng.integers(0, 99, (8, 16), dtype=np.uint32))}
    affine |= {f"{q}.{leaf}": ("BF16", rng.integers(0, 99, (8, 1)).astype(np.uint16)) for leaf in ("scales", "biases")}
    one = {f"{UP}.weight": up, f"{DOWN}.weight": down, f"{DOWN}.scales": down_scales, **affine}
    two = {f"{UP}.scales": up_scales, "model.norm.weight": ("BF16", np.full(8, 0x3F80, np.uint16))}
    quantization = mode | {q: AFFINE} | sections
    files = {"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": two}
    config = {"model_type": "qwen3_moe", "quantization": quantization, "quantization_config": quantization}
    write_checkpoint(path, files, config)
    (path / "tokenizer.json").write_text("{}")
    return path


def values(path, module, bits):
    scales = open_checkpoint(path).tensors[f"{module}.scales"]
    codes, found = raw(path, f"{module}.weight"), raw(path, f"{module}.scales").reshape(scales.shape)
    codes = codes.reshape(*scales.shape[:-1], -1)
    return mxfp4_values(codes, found) if bits == 32 else nvfp4_values(codes, found, 1.0)


def convert(source, destination, **options):
    return fp4cast.convert(source, destination, layout="mlx", **options)


def test_every_value_stays(tmp_path):
    source, destination = make(tmp_path / "a"), tmp_path / "b"
    report = convert(source, destination)
    assert report.exact and report.verified and report.ok and report.layout == "mlx"
    assert report.tensors == {"cast": 2, "exact": 2, "inexact": 0, "copied": 4}
    assert report.half_blocks == {"verbatim": 2 * (4 * 8 * 3 + 8 * 2), "shifted": 0, "rounded": 0}
    before, after = open_checkpoint(source), open_checkpoint(destination)
    assert {name: (t.dtype, t.path.name) for name, t in before.tensors.items()} == {
        name: (t.dtype, t.path.name) for name, t in after.tensors.items()
    }
    for module in (UP, DOWN):
        assert np.array_equal(values(source, module, 32), values(destination, module, 16))
        assert np.array_equal(raw(source, f"{module}.weight"), raw(destination, f"{module}.weight"))
        assert after.tensors[f"{module}.scales"].shape[-1] == 2 * before.tensors[f"{module}.scales"].shape[-1]
    for key in ("quantization", "quantization_config"):
        assert after.config[key] == NVFP4 | {"model.layers.0.self_attn.q_proj": AFFINE}
    assert (destination / "tokenizer.json").exists()
    assert fp4cast.verify(source, destination, strict=True).exact
    assert call("verify", destination).exit_code == 0  # by the receipt alone


def test_modules_that_the_config_names_one_by_one(tmp_path):
    source = make(tmp_path / "a", mode=AFFINE, **{UP: MXFP4, DOWN: MXFP4})
    assert convert(source, tmp_path / "b").exact
    section = open_checkpoint(tmp_path / "b").config["quantization"]
    assert (section[UP], section[DOWN], section["bits"]) == (NVFP4, NVFP4, 8)
    with pytest.raises(UnsupportedError, match=f"says 'affine' of {DOWN}"):
        convert(make(tmp_path / "c", mode=AFFINE, **{UP: MXFP4}), tmp_path / "d")


def test_codes_are_shifted_where_that_is_exact(tmp_path):
    source = make(tmp_path / "a")

    def plant(name, first, value):
        edit(source, name, lambda data: data.__setitem__(slice(first, first + len(value)), value))

    plant(f"{DOWN}.weight", 0, np.full(16, 0x66, np.uint8))  # 4 * 2^-11 = 1 * 2^-9
    plant(f"{DOWN}.scales", 0, np.array([127 - 11], np.uint8))
    report = convert(source, tmp_path / "b")
    assert report.exact and report.half_blocks["shifted"] == 2
    assert np.array_equal(values(source, DOWN, 32), values(tmp_path / "b", DOWN, 16))


def test_what_is_not_exact_is_refused_with_its_block(tmp_path):
    source = make(tmp_path / "a")
    edit(source, f"{UP}.weight", lambda data: data.__setitem__(slice(16 * 40, 16 * 41), 0x17))
    edit(source, f"{UP}.scales", lambda data: data.__setitem__(40, 127 - 10))
    with pytest.raises(InexactError, match=rf"{UP}: block 40 needs S of 2\^-1 or less"):
        convert(source, tmp_path / "b")
    with pytest.raises(InexactError, match=r"needs S of 2\^[1-3] or more"):
        convert(make(tmp_path / "c", low=9, high=11), tmp_path / "b")
    edit(source, f"{UP}.scales", lambda data: data.__setitem__(40, 255))
    with pytest.raises(ScaleError, match="block 40"):
        convert(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize(
    ("name", "at", "kind"),
    [
        (f"{UP}.weight", 5, "values"),
        (f"{UP}.scales", 3, "values"),
        (f"{DOWN}.scales", 31, "values"),
        ("model.norm.weight", 0, "bytes"),
        ("model.layers.0.self_attn.q_proj.scales", 2, "bytes"),
    ],
)
def test_a_changed_bit_is_found(tmp_path, name, at, kind):
    source = make(tmp_path / "a")
    convert(source, tmp_path / "b")
    for bit in (0, 3, 7):
        edit(tmp_path / "b", name, lambda data, bit=bit: data.__setitem__(at, data[at] ^ (1 << bit)))
        report = fp4cast.verify(source, tmp_path / "b")
        changed = name.replace("scales", "weight") if kind == "values" else name
        assert [(each.name, each.kind) for each in report.differences] == [(changed, kind)], bit
        assert not report.exact
        edit(tmp_path / "b", name, lambda data, bit=bit: data.__setitem__(at, data[at] ^ (1 << bit)))


def test_a_changed_config_is_found(tmp_path):
    source = make(tmp_path / "a")
    convert(source, tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    whole = json.loads(path.read_text())
    for change in (
        {"quantization": whole["quantization"] | {"group_size": 32}},
        {"quantization": whole["quantization"] | {UP: AFFINE}},
        {"quantization_config": MXFP4},
        {"model_type": "llama"},
    ):
        path.write_text(json.dumps(whole | change))
        assert {each.kind for each in fp4cast.verify(source, tmp_path / "b").differences} == {"config"}
    path.write_text(json.dumps(whole))
    (tmp_path / "b" / "tokenizer.json").write_text("[]")
    report = fp4cast.verify(source, tmp_path / "b")
    assert report.ok and [each.kind for each in report.differences] == ["file"]


def test_destinations(tmp_path):
    source = make(tmp_path / "a")
    convert(source, tmp_path / "b", jobs=1)
    with pytest.raises(DestinationError, match="--overwrite"):
        convert(source, tmp_path / "b")
    before = tree(tmp_path / "b")
    convert(source, tmp_path / "b", overwrite=True, jobs=3)
    assert tree(tmp_path / "b") == before

    def stop(phase, *_):
        if phase == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "c", progress=stop, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_not_for_mlx(tmp_path, miniatures):
    with pytest.raises(UnsupportedError, match="no MLX mxfp4"):
        convert(miniatures["moe"], tmp_path / "b")
    stored = {"x.weight": ("U32", np.array(0, "<u4")), "x.scales": ("U8", np.array(0, np.uint8))}
    write_checkpoint(tmp_path / "scalars", {"model.safetensors": stored}, {})
    with pytest.raises(UnsupportedError, match="no MLX mxfp4"):
        convert(tmp_path / "scalars", tmp_path / "b")
    source = make(tmp_path / "a")
    for option in ({"inexact": "nearest"}, {"activations": "w4a4"}, {"resume": True}, {"kv_cache_qformat": "fp8_cast"}):
        with pytest.raises(UsageError, match=f"{next(iter(option))}: no option for MLX"):
            convert(source, tmp_path / "b", **option)


def test_the_command_line(tmp_path):
    source = make(tmp_path / "a")
    shown = json.loads(call("convert", source, tmp_path / "b", "--layout", "mlx", "--dry-run", "--json").stdout)
    assert not (tmp_path / "b").exists()
    done = json.loads(call("convert", source, tmp_path / "b", "--layout", "mlx", "--json").stdout)
    assert done["exact"] and done["serve"].startswith("mlx_lm.server --model ")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir() if path.name != "fp4cast.json"}
    assert shown["files"] == sizes | {"fp4cast.json": None}
    assert "Marlin" not in call("verify", source, tmp_path / "b").output
    assert call("convert", source, tmp_path / "c", "--layout", "mlx", "--shards", "1/2").exit_code == 2
