"""Independent libraries read source and output, and see the same values, bit for bit."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import choose_target
from helpers import VARIANTS, raw, tensor_of
from models import static

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="the oracles need torch: ./dev test installs them")

TORCH = {"U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F32": "float32"}


def load(path, name):
    """One tensor by safe_open of torch; source codes and scales as uint8. A part of a tensor is read by us."""
    tensor = tensor_of(path, name)
    from safetensors import safe_open

    if name not in open_checkpoint(path).tensors:
        assert tensor.dtype == "U8"
        return torch.from_numpy(raw(path, name).reshape(tensor.shape).copy())
    with safe_open(tensor.path, "pt") as file:
        found = file.get_tensor(name)
    return found.view(torch.uint8) if tensor.dtype in ("I8", "F8_E8M0") else found


def pairs_of(path, layout="modelopt", activations="w4a16"):
    source = read_source(open_checkpoint(path))
    activations = activations if activations in source.family.activations else "w4a4"
    target = choose_target(source.family, layout, activations)
    return [(pair, target.names(pair.module)) for pair in source.pairs.values() if target.casts(pair)], target


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("kind", mini.KINDS)
def test_torch_opens_every_tensor_with_its_dtype(converted, kind):
    from safetensors import safe_open

    for shard in open_checkpoint(converted[kind]).shards.values():
        with safe_open(shard.path, "pt") as file:
            assert set(file.keys()) == set(shard.tensors)
            for name, tensor in shard.tensors.items():
                found = file.get_tensor(name)
                assert tuple(found.shape) == tensor.shape
                if tensor.dtype in TORCH:
                    assert found.dtype == getattr(torch, TORCH[tensor.dtype])


def modelopt_source(pair, path):
    from modelopt.torch.quantization.qtensor import MXFP4QTensor

    codes, scales = load(path, pair.codes.name), load(path, pair.scales.name)
    # The library knows one bias; a checkpoint with another is what it would read with corrected bytes.
    scales = (scales.int() + 127 - pair.bias).to(torch.uint8)
    shape = torch.Size((*scales.shape[:-1], scales.shape[-1] * 32))
    packed = codes.reshape(*scales.shape[:-1], -1)
    return MXFP4QTensor(shape, torch.float32, packed).dequantize(torch.float32, scale=scales, block_sizes=[32])


def modelopt_output(names, path, transposed):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    codes, scales, scale = (load(path, name) for name in names[:3])
    if transposed:
        codes = codes.transpose(-1, -2).contiguous()
        scales = scales.view(torch.uint8).transpose(-1, -2).contiguous().view(torch.float8_e4m3fn)
    shape = torch.Size((*codes.shape[:-1], codes.shape[-1] * 2))
    return NVFP4QTensor(shape, torch.float32, codes).dequantize(
        torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16}
    )


@pytest.mark.parametrize("kind", mini.KINDS)
def test_modelopt_reads_the_same_values(miniatures, converted, kind):
    pairs, target = pairs_of(miniatures[kind])
    for pair, names in pairs:
        source = modelopt_source(pair, miniatures[kind])
        output = modelopt_output(names, converted[kind], target.form.transposed)
        assert source.abs().max() > 0
        # Its table of NVFP4 values has no -0, so zeros are compared by `test_compressed_tensors...` and by us.
        assert torch.equal(source, output), pair.module


COMPRESSED = [kind for kind, *target in VARIANTS if target == ["compressed-tensors", "w4a16"]]


@pytest.fixture(scope="module")
def compressed(miniatures, tmp_path_factory):
    root = tmp_path_factory.mktemp("compressed")
    for kind in COMPRESSED:
        fp4cast.convert(miniatures[kind], root / kind, layout="compressed-tensors")
    return {kind: root / kind for kind in COMPRESSED}


def scheme(config):
    from compressed_tensors.quantization import QuantizationScheme

    section = config.get("quantization_config") or config["text_config"]["quantization_config"]
    return QuantizationScheme.model_validate(
        {k: v for k, v in section["config_groups"]["group_0"].items() if k != "format"}
    )


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_decompresses_to_the_same_bits(miniatures, compressed, kind):
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

    old, new = (scheme(json.loads((path / "config.json").read_text())) for path in (miniatures[kind], compressed[kind]))
    pairs, _ = pairs_of(miniatures[kind], "compressed-tensors")
    for pair, names in pairs:
        scales = (load(miniatures[kind], pair.scales.name).int() + 127 - pair.bias).to(torch.uint8)
        before = {"weight_packed": load(miniatures[kind], pair.codes.name), "weight_scale": scales}
        after = {
            "weight_packed": load(compressed[kind], names.codes),
            "weight_scale": load(compressed[kind], names.block_scale),
            "weight_global_scale": load(compressed[kind], names.tensor_scale),
        }
        source = MXFP4PackedCompressor.decompress(before, old)["weight"]
        output = NVFP4PackedCompressor.decompress(after, new)["weight"]
        same_bits(source, output)


@pytest.mark.filterwarnings("ignore")
def test_transformers_finds_the_scales_of_an_fp8_cache(miniatures, tmp_path):
    """With compressed-tensors, it leaves memory as it is where they are missing."""
    from transformers import AutoModelForCausalLM

    fp4cast.convert(miniatures["dense"], tmp_path, layout="compressed-tensors", kv_cache_qformat="fp8_cast")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for layer in model.model.layers:
        assert layer.self_attn.k_scale == layer.self_attn.v_scale == 1


def test_transformers_unpacks_gpt_oss_to_the_same_bits(miniatures, converted):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pairs, _ = pairs_of(miniatures["gpt-oss"])
    for pair, names in pairs:
        blocks, scales = load(miniatures["gpt-oss"], pair.codes.name), load(miniatures["gpt-oss"], pair.scales.name)
        source = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [E, K, N]
        values = modelopt_output(names, converted["gpt-oss"], transposed=True)
        assert torch.equal(source, values.transpose(1, 2).to(torch.bfloat16))


# --- ModelOpt's own export --------------------------------------------------------------------------------------------


def peer_export(source: Path, out: Path, activations: str) -> dict[str, float]:
    """Load a gpt-oss checkpoint as BF16, pin the closed form's amax, export; returns the amax of inputs by module."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    mtq.quantize(
        model, static(mtq.NVFP4_MLP_ONLY_CFG, activations == "w4a16"), lambda m: m(torch.arange(64)[None] % 256)
    )
    inputs = {}
    pairs, _ = pairs_of(source)
    for pair, _ in pairs:
        parent, leaf = pair.module.rsplit(".", 1)
        experts = model.get_submodule(parent)
        quantizer = getattr(experts, f"{leaf}_weight_quantizer")
        k = load(source, pair.scales.name).double() - 127
        quantizer.global_amax = torch.tensor(6 * 448 * 2.0 ** (k.max().item() - 8))
        amax = (6 * 2.0**k).repeat_interleave(2, dim=-1).reshape(quantizer._amax.shape)
        quantizer._amax.copy_(amax)
        if activations == "w4a4":
            inputs[pair.module] = float(getattr(experts, f"{leaf}_input_quantizer").amax)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf_checkpoint(model, export_dir=out)
    return inputs


@pytest.mark.parametrize("activations", ["w4a16", "w4a4"])
def test_gpt_oss_equals_modelopts_own_export(plain_miniatures, tmp_path, activations):
    source = plain_miniatures["gpt-oss"]
    inputs = peer_export(source, tmp_path / "peer", activations)
    fp4cast.convert(source, tmp_path / "ours", activations=activations, input_scales=inputs or None)
    peer, ours = open_checkpoint(tmp_path / "peer").tensors, open_checkpoint(tmp_path / "ours").tensors
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in peer.items()}
    minus_zeros = 0
    for name, tensor in peer.items():
        with File(tensor.path) as a, File(ours[name].path) as b:
            theirs, mine = a.read(tensor.start, tensor.nbytes), b.read(ours[name].start, tensor.nbytes)
        if tensor.dtype == "U8":  # they write +0 for -0
            low, high = mine & 0x0F == 0x08, mine & 0xF0 == 0x80
            minus_zeros += int(low.sum() + high.sum())
            mine = mine & ~np.where(low, 0x08, 0).astype(np.uint8) & ~np.where(high, 0x80, 0).astype(np.uint8)
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert minus_zeros > 0


@pytest.mark.parametrize("activations", ["w4a16", "w4a4"])
def test_gpt_oss_config_equals_modelopts_own_export(plain_miniatures, tmp_path, activations):
    source = plain_miniatures["gpt-oss"]
    peer_export(source, tmp_path / "peer", activations)
    scales = 1.0 if activations == "w4a4" else None
    fp4cast.convert(source, tmp_path / "ours", activations=activations, input_scales=scales)

    def documents(path):
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        beside = json.loads((path / "hf_quant_config.json").read_text())
        assert config.pop("producer")["name"] == beside.pop("producer")["name"]
        return config, beside

    assert documents(tmp_path / "ours") == documents(tmp_path / "peer")


# --- models that load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "dense-0.13"])
def test_transformers_loads_the_dense_model_and_sees_the_same_weights(miniatures, compressed, kind):
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        compressed[kind], dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    state = model.state_dict()
    pairs, _ = pairs_of(miniatures[kind], "compressed-tensors")
    for pair, _ in pairs:
        expected = modelopt_source(pair, miniatures[kind]).to(torch.bfloat16)
        assert torch.equal(state[f"{pair.module}.weight"].to(torch.bfloat16), expected), pair.module
