"""Mixtures of experts that transformers 5 holds in two tensors a layer [E, N, K], against ModelOpt's own export."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fp4cast
from fp4cast.ptq import QFORMATS, attach, export, max_calibrate
from fp4cast.ptq.flow import Options, quantize
from fp4cast.ptq.modules import QuantExperts
from models import TINY, pack, static, tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
TOKENS = torch.arange(6)[None] * 7  # few: most of 16 experts see none


def qwen3():
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=16,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
GROUPED = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SIZES = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def deepseek():
    config = transformers.DeepseekV3Config(**{**TINY, "num_key_value_heads": 4}, **SIZES, **MLA, **GROUPED)
    return transformers.DeepseekV3ForCausalLM(config)


def glm4():
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**TINY, **SIZES, **GROUPED))


@pytest.fixture(scope="module", params=[qwen3, deepseek, glm4], ids=lambda make: make.__name__)
def source(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("moe") / request.param.__name__
    model = request.param().to(torch.bfloat16)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # float32, as in published checkpoints
            value.data = value.float()
    model.save_pretrained(path)
    return path


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()


def calibrated(path, qformat, kept=False):
    model = load(path)
    attach(model, QFORMATS[qformat], static=kept)
    max_calibrate(model, lambda model: model(TOKENS))
    return model


def test_split_experts_compute_what_fused_ones_do(source):
    model, split = load(source), load(source)
    attach(split, QFORMATS["nvfp4_experts_only"])
    for quantizer in (each for each in split.modules() if hasattr(each, "disable")):
        quantizer.disable()
    assert any(isinstance(module, QuantExperts) for module in split.modules())
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.equal(split(TOKENS).logits, expected)
        assert torch.equal(copy.deepcopy(split)(TOKENS).logits, expected)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("qformat", ["nvfp4", "nvfp4_mlp_only"])
def test_an_export_equals_modelopt_s(source, tmp_path, qformat, kept):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    rules = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "nvfp4_mlp_only": mtq.NVFP4_MLP_ONLY_CFG}[qformat]
    model = load(source)
    mtq.quantize(model, static(rules, False) if kept else rules, lambda model: model(TOKENS))
    export_hf_checkpoint(model, export_dir=tmp_path / "peer")
    theirs = tensors(tmp_path / "peer")
    export(calibrated(source, qformat, kept), tmp_path / "ours", source)
    ours = tensors(tmp_path / "ours")
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    wrong = [name for name in theirs if not torch.equal(as_bytes(ours[name]), as_bytes(theirs[name]))]
    assert not wrong


def as_bytes(tensor):
    """A tensor's bytes; of packed codes, with code 8 as 0: for zeros, ModelOpt keeps no sign."""
    stored = tensor.contiguous().reshape(-1).view(torch.uint8)
    if tensor.dtype != torch.uint8:
        return stored
    low, high = stored & 0x0F, stored & 0xF0
    return torch.where(low == 8, 0, low) | torch.where(high == 0x80, 0, high)


def test_idle_experts_share_the_input_scale_of_their_layer(source):
    model = load(source)
    attach(model, QFORMATS["nvfp4_experts_only"])
    experts = next(module for module in model.modules() if isinstance(module, QuantExperts))
    routed = set()
    experts.register_forward_pre_hook(lambda _, args: routed.update(args[1].flatten().tolist()))
    max_calibrate(model, lambda model: model(TOKENS))
    assert 0 < len(routed) < 16
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        amax = {experts.get_submodule(f"{expert}.{leaf}").input_quantizer.amax.item() for expert in range(16)}
        assert len(amax) == 1


def test_the_flow_writes_weights_only(source, tmp_path):
    quantize(Options(source, tmp_path / "dst", "w4a16_nvfp4"))
    written = tensors(tmp_path / "dst")
    name = next(name for name in written if name.endswith("experts.15.down_proj.weight"))
    assert written[name].dtype == torch.uint8 and name.replace("weight", "input_scale") not in written


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_mxfp4_experts_are_cast(tmp_path, layout):
    (tmp_path / "moe").mkdir()
    keep = ("embed", "lm_head", "self_attn", "mlp.gate.")
    packed = pack(qwen3(), tmp_path / "moe", keep)
    options = Options(packed, tmp_path / "dst", "w4a16_nvfp4", cast_mxfp4_to_nvfp4=True, layout=layout)
    counts = quantize(options).exported.tensors
    assert (counts["exact"], counts["inexact"]) == (2 * 16 * 3, 0)
    fp4cast.convert(packed, tmp_path / "file", layout=layout)
    written, expected = tensors(tmp_path / "dst"), tensors(tmp_path / "file")
    for name in (name for name in expected if ".experts." in name):
        assert torch.equal(as_bytes(written[name]), as_bytes(expected[name])), name
