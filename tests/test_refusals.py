"""Every refusal of a checkpoint names the file, or the directory, that it is about."""

import json
import shutil

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import INDEX, naming, open_checkpoint
from fp4cast.errors import CheckpointError, InexactError, UsageError
from helpers import edit, lossy

CODES, SCALES = mini.mxfp4(np.random.default_rng(0), (1, 8, 64))
PACKED, SCALE = CODES.reshape(8, 32), SCALES.reshape(8, 2)
BF16 = ("BF16", np.zeros((8, 64), np.uint16))


def pair(module="m.up_proj", packed=PACKED, scale=SCALE, scale_dtype="U8"):
    return {f"{module}.weight_packed": ("U8", packed), f"{module}.weight_scale": (scale_dtype, scale)}


def without(tensors, ending):
    return {name: value for name, value in tensors.items() if not name.endswith(ending)}


# Tensors that no conversion takes.
TENSORS = {
    "nothing to cast": {"m.weight": BF16},
    "NVFP4 already": {"m.weight": ("U8", PACKED), "m.weight_scale": ("F8_E4M3", SCALE), "m.weight_scale_2": BF16},
    "FP8": {"m.weight": ("F8_E4M3", PACKED), "m.weight_scale_inv": BF16},
    "gpt-oss's original layout": {"block.0.mlp.mlp1_weight.blocks": ("U8", PACKED)},
    "codes without scales": pair() | without(pair("n.up_proj"), "_scale"),
    "scales without codes": pair() | without(pair("n.up_proj"), "_packed"),
    "scales of another shape": pair(scale=SCALE[:, :1]),
    "codes of three dimensions": pair(packed=PACKED[None], scale=SCALE[None]),
    "empty codes": pair(packed=PACKED[:0], scale=SCALE[:0]),
    "scales of another dtype": pair(scale=np.zeros((8, 2), np.uint16), scale_dtype="BF16"),
    "a scale that is NaN": pair(scale=np.full((8, 2), 255, np.uint8)),
    "a name that is taken": pair() | {"m.up_proj.weight": BF16},
    "a name that no header can hold": {"__metadata___blocks": ("U8", CODES), "__metadata___scales": ("U8", SCALES)},
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(tmp_path, what):
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": TENSORS[what]}, {})
    works = [lambda: fp4cast.convert(tmp_path / "src", tmp_path / "dst")]
    if not what.startswith("a name"):  # which only a plan looks at
        works.append(lambda: fp4cast.inspect(tmp_path / "src"))
    for work in works:
        with pytest.raises(CheckpointError) as caught:
            work()
        assert str(tmp_path / "src") in str(caught.value)


def text(name, content):
    return lambda path: (path / name).write_text(content)


def config(**keys):
    return lambda path: (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | keys)
    )


def index(change):
    def edited(path):
        document = json.loads((path / INDEX).read_text())
        change(document)
        (path / INDEX).write_text(json.dumps(document))

    return edited


def shard(change):
    def edited(path):
        first = sorted(path.glob("*.safetensors"))[0]
        first.write_bytes(change(first.read_bytes()))

    return edited


# Damage to a source or a destination.
DAMAGE = {
    "no config": lambda path: (path / "config.json").unlink(),
    "no JSON": text("config.json", "{"),
    "a list": text("config.json", "[]"),
    "very many objects": text("config.json", '{"a": [' + "{}," * 1_100_000 + "{}]}"),
    "a deep config": text("config.json", '{"a": ' * 500 + "0" + "}" * 500),
    "no weights": lambda path: [file.unlink() for file in [*path.glob("*.safetensors"), path / INDEX] if file.exists()],
    "a missing shard": lambda path: sorted(path.glob("*.safetensors"))[0].unlink(),
    "an index that is a list": text(INDEX, "[]"),
    "an empty index": index(lambda document: document.update(weight_map={})),
    "an index that leaves": index(lambda document: document["weight_map"].update(x="../x.safetensors")),
    "an index with another tensor": index(lambda d: d["weight_map"].update(x=next(iter(d["weight_map"].values())))),
    "an index with less": index(lambda document: document["weight_map"].popitem()),
    "a short shard": shard(lambda data: data[:-1]),
    "a long shard": shard(lambda data: data + b"x"),
    "an empty shard": shard(lambda _: b""),
    "a header that is no JSON": shard(lambda data: data[:8] + b"x" + data[9:]),
    "a dtype": shard(lambda data: data.replace(b'"U8"', b'"Z8"', 1)),
    "a link": lambda path: (path / "tokenizer.json").symlink_to("/etc/hostname"),
    "groups": config(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"group_0": 5}}),
    "an expression": config(quantization_config={"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                                                 "config_groups": {}, "ignore": ["re:("]}),
    "no claim": config(quantization_config={"quant_method": "other"}),
    "another claim": config(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(miniatures, converted, tmp_path, what):
    for side, made in (("src", miniatures["dense"]), ("dst", converted["dense"])):
        path = shutil.copytree(made, tmp_path / side)
        DAMAGE[what](path)
    source, destination = tmp_path / "src", tmp_path / "dst"
    attempts = [
        (source, lambda: fp4cast.inspect(source)),
        (source, lambda: fp4cast.convert(source, tmp_path / "new")),
        (source, lambda: fp4cast.convert(source, tmp_path / "new", layout="compressed-tensors", overwrite=True)),
        (destination, lambda: fp4cast.verify(miniatures["dense"], destination)),
    ]
    refused = 0
    for path, work in attempts:
        try:
            work()
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error), error
    assert refused


def test_options_that_do_not_fit_a_checkpoint(miniatures, tmp_path):
    for kind, options in (
        ("deepseek-v4", {}),
        ("gpt-oss", {"layout": "compressed-tensors"}),
        ("kimi-k3", {"layout": "nvfp4"}),
    ):
        with pytest.raises(UsageError) as caught:
            fp4cast.convert(miniatures[kind], tmp_path / "dst", **options)
        assert str(miniatures[kind]) in str(caught.value) or "unknown layout" in str(caught.value)


def test_a_checkpoint_that_is_not_exact(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    with pytest.raises(InexactError) as caught:
        fp4cast.convert(source, tmp_path / "dst")
    assert str(caught.value).startswith(f"{source}: 1 of ")


def test_a_scale_that_is_nan_names_its_shard(miniatures, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    name = "model.layers.0.mlp.experts.0.down_proj.weight_scale"
    edit(source, name, lambda data: data.__setitem__(0, 255))
    with pytest.raises(CheckpointError) as caught:
        fp4cast.inspect(source)
    assert str(open_checkpoint(source).tensors[name].path) in str(caught.value)


def test_an_error_from_deep_down_is_given_the_name_once(tmp_path):
    for message in ("the model has no layers", f"{tmp_path / 'config.json'}: is odd"):
        with pytest.raises(CheckpointError) as caught, naming(tmp_path):
            raise CheckpointError(message)
        assert str(caught.value).count(str(tmp_path)) == 1
