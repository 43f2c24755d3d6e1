"""Quantizers, formats and calibration, on transformers' own small models; two ranks with gloo."""

import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import distributed, multiprocessing, nn

from fp4cast.errors import QuantizerError, ShapeError, UnsupportedError, UsageError
from fp4cast.kernels import static_blockwise_fp4_fake_quant
from fp4cast.ptq import (
    QFORMATS,
    NVFP4StaticQuantizer,
    TensorQuantizer,
    attach,
    find_qformat,
    max_calibrate,
    promote_nvfp4_static_quantizers,
    set_expert_quantizer_amax,
)
from fp4cast.ptq.modules import quantized_weights

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, layer_types=None,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens():
    return torch.arange(24).reshape(2, 12) % 64


def run(model):
    model(tokens())


def enabled(model):
    return {name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and module.is_enabled}


def test_a_quantizer_rounds_calibrates_and_rests():
    x = torch.randn(4, 32)
    quantizer = TensorQuantizer()
    assert not torch.equal(quantizer(x), x)
    quantizer.disable()
    assert quantizer(x) is x
    quantizer.enable()
    quantizer.enable_calib()
    assert quantizer(x) is x and torch.equal(quantizer(2 * x), 2 * x)
    quantizer.disable_calib()
    assert quantizer.amax == 2 * x.abs().max()
    assert torch.equal(quantizer(x), quantizer(x.reshape(8, 16)).reshape(4, 32))
    quantizer.reset_amax()
    assert quantizer.amax is None


def test_a_static_quantizer_keeps_the_amax_of_each_block_and_is_promoted():
    weight = torch.randn(6, 64)
    model = nn.ModuleDict(
        {"a": TensorQuantizer(static=True), "b": TensorQuantizer(), "c": TensorQuantizer(static=True)}
    )
    model["c"].disable()
    for quantizer in model.values():
        quantizer.collect(weight)
    assert model["a"].amax.shape == (24, 1)
    assert promote_nvfp4_static_quantizers(model) == 1 and promote_nvfp4_static_quantizers(model) == 0
    promoted = model["a"]
    assert isinstance(promoted, NVFP4StaticQuantizer) and promoted.global_amax == weight.abs().max()
    promoted.global_amax = torch.tensor(9.0)
    assert torch.equal(promoted(weight), static_blockwise_fp4_fake_quant(weight, promoted.amax, torch.tensor(9.0)))
    with pytest.raises(ShapeError, match="expected one number"):
        promoted.global_amax = torch.ones(2)
    with pytest.raises(ShapeError, match="calibrate first"):
        NVFP4StaticQuantizer.promote(TensorQuantizer(static=True))
    with pytest.raises(ShapeError, match=r"expected \(24, 1\), as calibrated before"):
        promoted.collect(torch.randn(3, 64))
    with pytest.raises(ShapeError, match="whole blocks of 16"):
        TensorQuantizer(static=True).collect(torch.randn(3, 40))


def test_amax_stays_in_fp32_and_survives_a_state_dict():
    quantizer = TensorQuantizer(static=True)
    quantizer.collect(torch.randn(4, 32))
    quantizer = NVFP4StaticQuantizer.promote(quantizer)
    before = quantizer.amax.clone()
    quantizer.to(torch.bfloat16).half()
    assert quantizer.amax.dtype == quantizer.global_amax.dtype == torch.float32
    assert torch.equal(quantizer.amax, before)
    fresh = NVFP4StaticQuantizer()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.amax, before) and fresh.global_amax == quantizer.global_amax
    assert TensorQuantizer().state_dict() == {}


EXPERTS = {
    f"model.layers.{i}.mlp.experts.{weight}_{side}_quantizer"
    for i in range(2)
    for weight in ("gate_up_proj", "down_proj")
    for side in ("weight", "input")
}


@pytest.mark.parametrize(("name", "some", "none"), [
    ("nvfp4", "self_attn.q_proj.weight", "router"),
    ("nvfp4_mlp_only", "mlp.experts.down_proj_input", "self_attn"),
    ("nvfp4_experts_only", "mlp.experts.gate_up_proj_weight", "self_attn"),
    ("nvfp4_omlp_only", "self_attn.o_proj.weight", "q_proj"),
    ("nvfp4_mlp_weight_only", "mlp.experts.down_proj_weight", "input_quantizer"),
    ("nvfp4_mlp_weight_only", "mlp.experts.gate_up_proj_weight", "self_attn"),
    ("w4a16_nvfp4", "self_attn.k_proj.weight", "input_quantizer"),
])  # fmt: skip
def test_formats_on_gpt_oss(name, some, none):
    model = gpt_oss()
    assert attach(model, QFORMATS[name]) == len(enabled(model))
    assert any(some in each for each in enabled(model))
    for word in (none, "lm_head", "embed", "router"):
        assert not [each for each in enabled(model) if word in each], word
    weights = {each for each in EXPERTS if "weight" in each}
    assert weights <= enabled(model)
    assert (enabled(model) == EXPERTS) == (name in ("nvfp4_mlp_only", "nvfp4_experts_only"))


def test_formats_on_a_dense_model():
    model = llama()
    assert attach(model, QFORMATS["nvfp4_mlp_only"]) == 2 * 3 * 2
    with pytest.raises(UnsupportedError, match="matches nvfp4_experts_only: nothing would be quantized"):
        attach(llama(), QFORMATS["nvfp4_experts_only"])


def test_only_one_known_format_is_taken():
    assert find_qformat("nvfp4") is QFORMATS["nvfp4"]
    for wrong in ("fp8", "int4_awq", "nvfp4_awq", ""):
        with pytest.raises(UsageError, match="unknown qformat"):
            find_qformat(wrong, cast=True)
    with pytest.raises(UsageError, match="expected one qformat with --cast_mxfp4_to_nvfp4, got 2: nvfp4, fp8"):
        find_qformat("nvfp4,fp8", cast=True)


@pytest.mark.parametrize("make", [gpt_oss, llama])
def test_disabled_quantizers_change_nothing(make):
    model, plain = make(), make()
    attach(model, QFORMATS["nvfp4"])
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    assert torch.allclose(model(tokens()).logits, plain(tokens()).logits, atol=1e-6)


def test_llama4_experts():
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

    torch.manual_seed(0)
    config = Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=3)
    holder = nn.ModuleDict({"mlp.experts".replace(".", "_"): Llama4TextExperts(config)})
    (experts,) = holder.values()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 32)
    before = experts(x)
    attach(holder, QFORMATS["w4a16_nvfp4"], static=True)
    max_calibrate(holder)
    rounded = {
        name: static_blockwise_fp4_fake_quant(weight, quantizer.amax, quantizer.global_amax).transpose(-1, -2)
        for name, quantizer, weight in quantized_weights(holder)
    }
    assert len(rounded) == 2
    after = experts(x)
    assert not torch.equal(after, before)
    for name in ("gate_up_proj", "down_proj"):
        getattr(experts, name).data = rounded[f"mlp_experts.{name}"].contiguous()
        getattr(experts, f"{name}_weight_quantizer").disable()
    assert torch.allclose(experts(x), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [gpt_oss, llama])
def test_weights_are_calibrated_without_a_forward_pass(make):
    model = make()
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model, distributed_sync=False)
    for name, quantizer, weight in quantized_weights(model):
        assert isinstance(quantizer, NVFP4StaticQuantizer), name
        assert torch.equal(quantizer.amax[:, 0], weight.reshape(-1, 16).abs().amax(1))
        assert quantizer.global_amax >= quantizer.amax.max()


def test_siblings_share_a_global_amax():
    model = llama()
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model)
    layer = model.model.layers[0]
    for parent, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
        modules = [getattr(parent, name) for name in names]
        largest = max(module.weight.abs().max() for module in modules)
        assert all(module.weight_quantizer.global_amax == largest for module in modules)
    assert layer.mlp.down_proj.weight_quantizer.global_amax == layer.mlp.down_proj.weight.abs().max()


def test_inputs_are_observed_on_the_unquantized_model():
    model, seen = gpt_oss(), {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "lm_head" not in name:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().max()}))
    run(model)
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model, run)
    for name, amax in seen.items():
        assert model.get_submodule(name).input_quantizer.amax == pytest.approx(float(amax), rel=1e-5)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_input_quantizer.amax > 0 and experts.down_proj_input_quantizer.amax > 0
    assert not any(module.calibrating for module in model.modules() if isinstance(module, TensorQuantizer))
    assert torch.isfinite(model(tokens()).logits).all()


def test_promotion_happens_on_every_way_out():
    model = llama()
    attach(model, QFORMATS["nvfp4"], static=True)
    with pytest.raises(RuntimeError, match="no data"):
        max_calibrate(model, lambda _: (_ for _ in ()).throw(RuntimeError("no data")))
    assert all(isinstance(quantizer, NVFP4StaticQuantizer) for _, quantizer, _ in quantized_weights(model))
    with pytest.raises(UnsupportedError, match="attach a qformat first"):
        max_calibrate(llama())


def test_experts_without_tokens_take_the_amax_of_the_group():
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    attach(layers, QFORMATS["nvfp4"])
    assert set_expert_quantizer_amax([]) == []
    layers[1].input_quantizer.amax = torch.tensor([[1.0], [5.0]])  # by block: reduced first
    layers[2].input_quantizer.amax = torch.tensor(3.0)
    layers[3].input_quantizer._amax = torch.empty((), device="meta")
    assert set_expert_quantizer_amax(layers) == [layers[0], layers[3]]
    assert [float(layer.input_quantizer.amax.max()) for layer in layers] == [5, 5, 3, 5]
    for layer in layers:
        layer.input_quantizer.reset_amax()
    largest = max(layer.weight.abs().max() for layer in layers)
    assert set_expert_quantizer_amax(layers) == list(layers)
    assert set_expert_quantizer_amax(layers) == []
    assert all(layer.input_quantizer.amax == largest for layer in layers)


class Mixture(nn.Module):
    """Experts in a list, of which each token takes the first or the second; the third is idle."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(3))

    def forward(self, x):
        return torch.cat([self.experts[0]["up_proj"](x[:2]), self.experts[1]["up_proj"](x[2:])])


def test_calibration_gives_idle_experts_what_the_others_saw():
    model, x = nn.ModuleDict({"mlp": Mixture()}), torch.randn(4, 32)
    attach(model, QFORMATS["nvfp4_experts_only"])
    max_calibrate(model, lambda model: model["mlp"](x))
    seen = [float(expert["up_proj"].input_quantizer.amax) for expert in model["mlp"].experts]
    assert seen == [float(x[:2].abs().max()), float(x[2:].abs().max()), float(x.abs().max())]


def test_calibrating_again_starts_afresh():
    model = llama()
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model, lambda m: m(tokens()))
    first = {name: None if amax is None else amax.clone() for name, amax in amaxes(model).items()}
    weights = [(quantizer, quantizer.global_amax.clone()) for _, quantizer, _ in quantized_weights(model)]
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.amax is not None:
            module.amax = module.amax * 7
            if isinstance(module, NVFP4StaticQuantizer):
                module.global_amax = module.global_amax * 7
    max_calibrate(model, lambda m: m(tokens()))
    for name, amax in amaxes(model).items():
        assert (amax is None and first[name] is None) or torch.equal(amax, first[name])
    assert all(torch.equal(quantizer.global_amax, before) for quantizer, before in weights)


def test_a_state_dict_goes_into_a_model_that_was_only_attached():
    model, fresh = llama(), llama()
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model, lambda m: m(tokens()))
    attach(fresh, QFORMATS["nvfp4"], static=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    for (_, one, _), (_, other, _) in zip(quantized_weights(model), quantized_weights(fresh), strict=True):
        assert type(other) is NVFP4StaticQuantizer and torch.equal(one.global_amax, other.global_amax)


def test_a_quantized_model_can_be_saved_and_loaded_whole(tmp_path):
    for model in (llama(), gpt_oss()):
        attach(model, QFORMATS["nvfp4"], static=True)
        max_calibrate(model, lambda m: m(tokens()))
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_attaching_twice_or_in_vain_changes_nothing():
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match="nothing would be quantized"):
        attach(model, QFORMATS["nvfp4_experts_only"])
    assert {name: type(module) for name, module in model.named_modules()} == before
    attach(model, QFORMATS["nvfp4"])
    with pytest.raises(UnsupportedError, match="has quantizers already"):
        attach(model, QFORMATS["nvfp4"])


def test_the_head_stays_whatever_its_name():
    model = llama()
    model.output_layer = model.lm_head
    model.get_output_embeddings = lambda: model.output_layer
    del model.lm_head
    attach(model, QFORMATS["nvfp4"])
    assert not any("output_layer" in name for name, *_ in quantized_weights(model))


def test_experts_that_would_silently_stay_are_refused():
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_bias = torch.nn.Parameter(torch.zeros(4, 32))  # which a list of experts would lose
    words = "layers.0.mlp.experts.gate_up_proj: nvfp4 quantizes it, but Qwen3MoeExperts is not supported"
    with pytest.raises(UnsupportedError, match=words):
        attach(model, QFORMATS["nvfp4"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("static", [True, False])
def test_weights_that_are_no_numbers_are_refused_by_name(value, static):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    attach(model, QFORMATS["w4a16_nvfp4"], static=static)
    with pytest.raises(QuantizerError, match=r"layers.1.mlp.up_proj.weight: holds NaN or infinity"):
        max_calibrate(model)


def test_weights_on_the_meta_device_do_not_stop_the_others():
    model = llama()
    attach(model, QFORMATS["w4a16_nvfp4"], static=True)
    model.model.layers[0].self_attn.q_proj.to("meta")
    max_calibrate(model)
    others = [quantizer for name, quantizer, _ in quantized_weights(model) if "q_proj" not in name]
    assert all(quantizer.global_amax > 0 for quantizer in others)


def amaxes(model):
    return {name: module.amax for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}


def rank(number, directory, backend):
    device = f"cuda:{number}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{directory}/store", rank=number, world_size=2)
    calibrated = calibrate_alone(number, device, distributed_sync=True)
    calibrated |= calibrate_mixture(number, device)
    torch.save(calibrated, f"{directory}/{number}")
    distributed.destroy_process_group()
    # Gloo's threads may drop their last tensor while the interpreter ends, and abort: pytorch/pytorch#179291.
    os._exit(0)


def calibrate_alone(number, device, **options):
    """Amax by quantizer of what one rank is given."""
    model = llama().to(device)
    attach(model, QFORMATS["nvfp4"], static=True)
    data = (tokens() + 30 * number).to(device) if number else tokens().to(device)
    max_calibrate(model, lambda m: m(data), **options)
    return {name: amax if amax is None else amax.cpu() for name, amax in amaxes(model).items()}


def calibrate_mixture(number, device):
    """Amax of experts of which rank 0 runs the first alone, rank 1 the second alone."""
    model = nn.ModuleDict({"mlp": Mixture()}).to(device)
    attach(model, QFORMATS["nvfp4_experts_only"])
    x = torch.full((1, 32), 2.0 + number, device=device)
    max_calibrate(model, lambda model: model["mlp"].experts[number]["up_proj"](x))
    return {f"expert {i}": model["mlp"].experts[i]["up_proj"].input_quantizer.amax.cpu() for i in range(3)}


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes two GPUs")


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_two_ranks_end_with_the_same_amax(tmp_path, backend):
    multiprocessing.spawn(rank, (str(tmp_path), backend), nprocs=2)
    first, second = (torch.load(tmp_path / str(number)) for number in range(2))
    device = "cuda" if backend == "nccl" else "cpu"
    alone = [calibrate_alone(number, device, distributed_sync=False) for number in range(2)]
    # What one rank alone has seen counts for both; what none has seen takes the largest.
    assert [float(ranked.pop(f"expert {i}")) for ranked in (first, second) for i in range(3)] == [2.0, 3.0, 3.0] * 2
    differ = 0
    for name, amax in first.items():
        if amax is None:
            continue
        assert torch.equal(amax, second[name])
        assert torch.allclose(amax, torch.maximum(alone[0][name], alone[1][name]), rtol=1e-5)
        differ += not torch.equal(alone[0][name], alone[1][name])
    assert differ > 0


def test_global_amax_is_a_number_a_tensor_or_nothing():
    quantizer = NVFP4StaticQuantizer()
    quantizer.amax = torch.ones(4, 1)
    for given in (3, 3.0, torch.tensor(3.0), torch.tensor([[3.0]], dtype=torch.float64)):
        quantizer.global_amax = given
        assert quantizer.global_amax.shape == () and quantizer.global_amax.dtype == torch.float32
        assert quantizer.global_amax == 3 and "_global_amax" in quantizer.state_dict()
    quantizer.global_amax = None
    assert quantizer.global_amax is None and "_global_amax" not in quantizer.state_dict()
    with pytest.raises(ValueError, match=r"global_amax \(2,\): expected one number"):
        quantizer.global_amax = torch.ones(2)


def test_the_projections_of_one_bank_are_one_group():
    bank = nn.Module()
    bank.first, bank.second = (TensorQuantizer() for _ in range(2))
    bank.second.amax = torch.tensor(2.0)
    assert set_expert_quantizer_amax(bank, quantizer_attrs=["first", "second"]) == [bank]
    assert bank.first.amax == 2
    assert set_expert_quantizer_amax([bank], quantizer_attrs="first") == []
