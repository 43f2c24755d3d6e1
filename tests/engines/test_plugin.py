"""What the plugin for vLLM does in plain torch; tests/oracles/test_vllm.py has the rest, inside of vLLM."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from fp4cast.errors import CheckpointError, UsageError
from fp4cast.vllm import banks, experts, filled, register

pytestmark = pytest.mark.oracle
EXPERTS, HIDDEN = 4, 64


def bank(kind, gate_up, inner):
    """What a checkpoint holds, every byte another: the output channel last."""
    outputs, inputs = (2 * inner, HIDDEN) if gate_up else (HIDDEN, inner)
    if kind == "bias":
        return torch.arange(EXPERTS * outputs, dtype=torch.float32).view(EXPERTS, outputs)
    packed = {"codes": 2, "block_scale": 16}[kind]
    shape = EXPERTS, inputs // packed, outputs
    numbers = torch.arange(EXPERTS * inputs // packed * outputs) % 251
    return numbers.to(torch.uint8).view(shape).view(torch.float8_e4m3fn if kind == "block_scale" else torch.uint8)


def parameter(stored, kind):
    """A parameter of a rank with more room than any part needs."""
    if kind == "bias":
        return torch.nn.Parameter(torch.zeros(EXPERTS, 512), requires_grad=False)
    return torch.nn.Parameter(torch.zeros(EXPERTS, 512, 256, dtype=stored.dtype), requires_grad=False)


def part(gate_up, inner, ranks=1, rank=0, of=None):
    return banks.Part(of, *banks.share(inner, ranks, rank), inner, HIDDEN, rank == 0, gate_up)


@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("kind", ["codes", "block_scale", "bias"])
@pytest.mark.parametrize(("inner", "ranks"), [(96, 1), (96, 2), (48, 2), (96, 4), (80, 8)])
def test_the_ranks_together_hold_the_bank(kind, gate_up, inner, ranks):
    stored, parts = bank(kind, gate_up, inner), []
    for rank in range(ranks):
        own, held = part(gate_up, inner, ranks, rank), parameter(stored, kind)
        banks.fill(held, stored, own, kind)
        region = banks.filled_region(held.data, kind == "bias", banks._PACKED[kind], own)
        assert held.data.view(torch.uint8).sum() == region.contiguous().view(torch.uint8).sum()  # padding is zeros
        parts.append(region.float())
    if kind == "bias" and not gate_up:
        assert torch.equal(sum(parts), stored)  # one rank adds it
    else:
        together = torch.cat(parts, 1 if gate_up else 2)
        expected = stored.float() if kind == "bias" else stored.float().transpose(1, 2)
        assert torch.equal(together.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("places", [[0, 1, -1, -1], [-1, 0, -1, 1], [1, -1, 0, -1]])
def test_an_expert_parallel_rank_holds_its_experts_in_its_own_order(places):
    stored = bank("codes", True, 96)
    own = part(True, 96, of=banks.local_experts(torch.tensor(places), EXPERTS))
    held = torch.nn.Parameter(torch.zeros(2, 512, 256, dtype=torch.uint8), requires_grad=False)
    banks.fill(held, stored, own, "codes")
    for expert, place in enumerate(places):
        if place >= 0:
            assert torch.equal(held[place, :192, : HIDDEN // 2], stored[expert].T)


def test_one_scalar_serves_all_experts_and_so_does_one_for_each():
    held = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    own = part(True, 96, of=[3, 1])
    banks.fill(held, torch.tensor(0.5), own, "scalar")
    assert held.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    banks.fill(held, torch.tensor([0.0, 1.0, 2.0, 3.0]), own, "scalar")
    assert held.tolist() == [[3.0, 3.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="one number"):
        banks.fill(held, torch.ones(3), replace_experts(own), "scalar")


def replace_experts(own):
    return banks.Part(None, own.start, own.stop, own.inner, own.hidden, own.first, own.gate_up)


@pytest.mark.parametrize("kind", ["codes", "block_scale", "bias"])
def test_another_shape_is_an_error(kind):
    with pytest.raises(ValueError, match=r"expected \[experts, "):
        banks.fill(parameter(bank(kind, True, 96), kind), bank(kind, True, 96)[:, :-1], part(True, 96), kind)


def test_an_intermediate_size_between_blocks_is_an_error():
    with pytest.raises(ValueError, match="multiple of 16"):
        banks.share(100, 2, 0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_mxfp4_is_divided_as_vllm_divides_it(ranks):
    """`_load_weights_mxfp4` of vLLM 0.26 and 0.32, model_executor/models/gpt_oss.py."""
    each = -(-(2880 // 32) // ranks) * 32
    for rank in range(ranks):
        assert banks.share(2880, ranks, rank, 32) == (rank * each, min((rank + 1) * each, 2880))


class Theirs:
    """As much of vLLM's method for NVFP4 experts as ours needs."""

    def __init__(self, quant_config, moe_config):
        self.quant_config, self.moe = quant_config, moe_config
        self.nvfp4_backend = SimpleNamespace(value="MARLIN")

    def maybe_roundup_sizes(self, hidden_size, inner, *_):
        return hidden_size, inner

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, **_):
        for name, rows, columns in (
            ("w13", 2 * intermediate_size_per_partition, hidden_size),
            ("w2", hidden_size, intermediate_size_per_partition),
        ):
            for suffix, packed, dtype in (("", 2, torch.uint8), ("_scale", 16, torch.float8_e4m3fn)):
                data = torch.full((num_experts, rows, columns // packed), 7, dtype=torch.uint8).view(dtype)
                layer.register_parameter(f"{name}_weight{suffix}", torch.nn.Parameter(data, requires_grad=False))
        scale = torch.nn.Parameter(torch.full((num_experts,), 2.0**-10), requires_grad=False)
        layer.register_parameter("w2_weight_scale_2", scale)

    def process_weights_after_loading(self, layer):
        layer.w2_weight_scale_2.data.mul_(2.0**119)


@pytest.fixture
def engine(monkeypatch):
    """The modules of vLLM that ours asks for."""

    def fake(name, **attributes):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    mapper = SimpleNamespace(orig_to_new_suffix={})
    model = type("GptOssForCausalLM", (), {"hf_to_vllm_mapper": mapper, "load_weights": lambda *_: set()})
    for package in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"):
        fake(package, __path__=[])
    for package in ("vllm.model_executor.layers.quantization", "vllm.model_executor.layers.quantization.utils"):
        fake(package, __path__=[])
    fake("vllm.model_executor.models.gpt_oss", GptOssForCausalLM=model)
    fake("vllm.model_executor.layers.quantization.utils.marlin_utils", marlin_permute_bias=lambda bias: bias.flip(0))
    experts._vllm_does_it.cache_clear()
    yield SimpleNamespace(mapper=mapper, model=model)
    experts._vllm_does_it.cache_clear()


def layer_config(**changed):
    given = {"has_bias": True, "moe_backend": "auto", "num_experts": EXPERTS, "hidden_dim_unpadded": 2880}
    return SimpleNamespace(**(given | {"intermediate_size": 2880, "tp_size": 1, "tp_rank": 0} | changed))


def test_experts_with_biases_get_our_method_and_all_others_theirs(engine):
    choose = experts.Choice(Theirs)
    ours = choose(quant_config=None, moe_config=(config := layer_config()))
    assert isinstance(ours, experts.BiasedExperts) and isinstance(ours, Theirs) and config.moe_backend == "marlin"
    assert "ModelOpt" in type(ours).__name__  # vLLM's loader looks for it
    assert hasattr(engine.model.load_weights, "fp4cast")
    plain = choose(quant_config=None, moe_config=layer_config(has_bias=False))
    assert type(plain) is Theirs and plain.moe.moe_backend == "auto"


def test_it_steps_back_where_vllm_maps_the_names_itself(engine):
    engine.mapper.orig_to_new_suffix[".gate_up_proj_weight_scale"] = ".w13_weight_scale"
    assert type(experts.Choice(Theirs)(quant_config=None, moe_config=layer_config())) is Theirs
    assert not hasattr(engine.model.load_weights, "fp4cast")


@pytest.mark.usefixtures("engine")
def test_a_backend_that_drops_biases_is_refused():
    with pytest.raises(UsageError, match="flashinfer_cutlass"):
        experts.Choice(Theirs)(quant_config=None, moe_config=layer_config(moe_backend="flashinfer_cutlass"))


@pytest.mark.usefixtures("engine")
def test_sizes_are_padded_as_for_mxfp4_and_biases_prepared_for_marlin():
    config = layer_config()
    method = experts.Choice(Theirs)(quant_config=None, moe_config=config)
    assert method.maybe_roundup_sizes(2880, 1440, torch.bfloat16, None) == (3072, 1536)
    layer = torch.nn.Module()
    layer.moe_config = config
    method.create_weights(layer, EXPERTS, 3072, 2944, torch.bfloat16, weight_loader=print)
    assert layer.w13_bias.shape == (EXPERTS, 2 * 2944) and layer.w2_bias.shape == (EXPERTS, 3072)
    assert not layer.w13_weight.any() and not layer.w2_weight_scale.view(torch.uint8).any()
    views = {name: region(getattr(layer, name)) for name, region in layer.fp4cast_regions.items()}
    assert views["w13_weight"].shape == (EXPERTS, 5760, 1440) and views["w2_weight_scale"].shape == (EXPERTS, 2880, 180)
    layer.w2_bias.data[:, 0] = layer.w13_bias.data[:, 0] = 1.5
    method.process_weights_after_loading(layer)
    assert layer.w2_bias[0, -1] == 1.5 * 2.0**-109 and layer.w13_bias[0, -1] == 1.5  # only w2's is divided


def model_of(**parameters):
    layer, model = torch.nn.Module(), torch.nn.Module()
    for name, value in parameters.items():
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    model.add_module("layer", layer)
    return model, layer


def config_of(algorithm):
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": []}
    return SimpleNamespace(hf_config=SimpleNamespace(quantization_config=section))


def nvfp4_layer():
    return model_of(
        weight=torch.zeros(4, 8, dtype=torch.uint8),
        weight_scale=torch.zeros(4, 1, dtype=torch.float8_e4m3fn),
        weight_scale_2=torch.zeros(2),
        input_scale=torch.zeros(2),
        bias=torch.zeros(4, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2", "input_scale", "bias"])
def test_what_was_not_loaded_is_named(name):
    model, layer = nvfp4_layer()
    to_fill = filled.to_fill(model, config_of("NVFP4"))
    for other, value in layer.named_parameters():
        if other != name:
            value.data.view(torch.uint8).zero_()
    with pytest.raises(CheckpointError, match=rf"layer\.{name}: nothing in the checkpoint filled it"):
        filled.check(to_fill)
    getattr(layer, name).data.flatten()[0] = 1.0
    with pytest.raises(CheckpointError, match=rf"layer\.{name}\[1"):
        filled.check(to_fill)
    getattr(layer, name).data.copy_(torch.ones_like(getattr(layer, name).float()))
    filled.check(to_fill)


def test_codes_are_missing_where_a_whole_projection_is_empty():
    model, layer = nvfp4_layer()
    layer.output_partition_sizes = [1, 3]
    to_fill = filled.to_fill(model, config_of("W4A16_NVFP4"))
    for name, value in layer.named_parameters():
        value.data.view(torch.uint8).fill_(0xFF if name == "weight" else 0)
    layer.weight.data[0] = 0  # the first of two projections
    with pytest.raises(CheckpointError, match=r"layer\.weight: nothing in the checkpoint filled it"):
        filled.check(to_fill)
    layer.weight.data[3, 7] = 0  # rows of -6 alone are weights like others
    filled.check(to_fill)
    bank = torch.full((3, 4, 8), 0xFF, dtype=torch.uint8)
    bank[0, 2, 0] = bank[2] = 0
    assert filled.is_empty(bank).tolist() == [False, True, False]


def test_a_w4a16_checkpoint_has_no_input_scales_and_others_are_left_alone():
    model, layer = nvfp4_layer()
    names = {name for name, _ in filled.to_fill(model, config_of("W4A16_NVFP4"))}
    assert names == {"layer.weight", "layer.weight_scale", "layer.weight_scale_2", "layer.bias"}
    model, layer = nvfp4_layer()
    for config in (config_of("FP8"), SimpleNamespace(hf_config=SimpleNamespace())):
        assert filled.to_fill(model, config) == []
    assert not layer.bias.isnan().any()
    model, _ = model_of(weight_scale=torch.zeros(4))  # FP8: one scale
    assert filled.to_fill(model, config_of("NVFP4")) == []


def test_without_vllm_it_says_that_it_does_nothing(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "fp4cast does nothing" in caplog.text
