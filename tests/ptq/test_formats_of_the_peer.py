"""Which layers the formats choose, and how the config names them, against ModelOpt's formats of the same names."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fp4cast.ptq import QFORMATS, attach, export, max_calibrate
from fp4cast.ptq.modules import quantized_weights
from models import TINY

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
TOKENS = torch.arange(16)[None]


def peer_rules(qformat):
    import modelopt.torch.quantization as mtq

    return {
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "nvfp4_mlp_only": mtq.NVFP4_MLP_ONLY_CFG,
        "nvfp4_omlp_only": mtq.NVFP4_OMLP_ONLY_CFG,
        "nvfp4_experts_only": mtq.NVFP4_EXPERTS_ONLY_CFG,
    }[qformat]


def chosen(make, qformat):
    """(what ModelOpt quantizes, what we do), by names of weights."""
    import modelopt.torch.quantization as mtq

    theirs, ours = make(), make()
    mtq.quantize(theirs, peer_rules(qformat), None)
    attach(ours, QFORMATS[qformat])
    quantizers = (n for n, q in theirs.named_modules() if n.endswith("weight_quantizer") and q.is_enabled)
    peer = {name.replace(".weight_quantizer", ".weight").removesuffix("_weight_quantizer") for name in quantizers}
    return peer, {name for name, *_ in quantized_weights(ours)}


def llama4():
    config = transformers.Llama4TextConfig(
        **TINY, intermediate_size=32, intermediate_size_mlp=96, num_hidden_layers=2, num_local_experts=4,
        interleave_moe_layer_step=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("qformat", ["nvfp4_mlp_only", "nvfp4_omlp_only", "nvfp4_experts_only"])
def test_llama4_s_mlps_are_mlps(qformat):
    peer, ours = chosen(llama4, qformat)
    linears = {
        f"model.layers.{mlp}.{leaf}_proj.weight"
        for mlp in ("0.feed_forward", "1.feed_forward.shared_expert")
        for leaf in ("gate", "up", "down")
    }
    banks = {f"model.layers.1.feed_forward.experts.{leaf}_proj" for leaf in ("gate_up", "down")}
    missed = {"nvfp4_mlp_only": linears, "nvfp4_omlp_only": linears | banks, "nvfp4_experts_only": set()}
    assert peer and ours - peer == missed[qformat] and peer <= ours


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_hidden_layers=1,
        layer_types=["linear_attention"], num_experts=4, num_experts_per_tok=2, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def test_qwen3_next_s_linear_attention():
    peer, ours = ({name for name in names if "linear_attn" in name} for names in chosen(qwen3_next, "nvfp4"))
    assert peer == ours and not any("in_proj_ba" in name for name in ours)
    assert any("in_proj_qkvz" in name for name in ours)


@pytest.mark.parametrize("qformat", ["nvfp4", "nvfp4_omlp_only"])
def test_phi3_is_exported_flat(tmp_path, qformat):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    size = {name: value for name, value in TINY.items() if name != "head_dim"}
    config = transformers.Phi3Config(**size, intermediate_size=96, num_hidden_layers=1, pad_token_id=0)
    transformers.Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype=torch.bfloat16) for _ in range(2)
    )
    mtq.quantize(theirs, peer_rules(qformat), lambda model: model(TOKENS))
    export_hf_checkpoint(theirs, export_dir=tmp_path / "peer")
    attach(ours, QFORMATS[qformat])
    max_calibrate(ours, lambda model: model(TOKENS))
    export(ours, tmp_path / "ours", tmp_path / "src")
    peer, config = (
        json.loads((tmp_path / each / "config.json").read_text())["quantization_config"] for each in ("peer", "ours")
    )
    assert config["quant_algo"] == peer["quant_algo"] == "NVFP4"
    kept = any("qkv_proj" in name for name in config["ignore"])
    assert kept == (qformat == "nvfp4_omlp_only")
