"""The cast into a model: real transformers models of real (small) checkpoints, against what `convert` writes."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np

import checkpoints
import fp4cast
from fp4cast.errors import InexactError, QuantizerError, ScaleError, ShapeError, UnsupportedError, UsageError
from fp4cast.formats import mxfp4_values
from fp4cast.kernels import quantize_nvfp4, static_blockwise_fp4_fake_quant
from fp4cast.miniatures import make
from fp4cast.ptq import (
    QFORMATS,
    TensorQuantizer,
    apply_to_model,
    attach,
    build_amax_map,
    compute_amax_for_mxfp4,
    compute_global_amax_for_scales,
    compute_per_block_amax_for_mxfp4,
    max_calibrate,
    quantizer_name_from_blocks_key,
)
from fp4cast.ptq.cast import count_lossless
from fp4cast.ptq.modules import quantized_weights
from models import (
    load_gpt_oss,
    spoil,
    tensors,
)

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make("gpt-oss", tmp_path_factory.mktemp("cast") / "gpt-oss")


def quantized(path, qformat="nvfp4_mlp_only"):
    model = load_gpt_oss(path)
    attach(model, QFORMATS[qformat], static=True)
    max_calibrate(model)
    return model


def check_written(model, directory):
    """Codes, block scales and tensor scales of a model's weights are those of a directory, byte for byte."""
    written, count = tensors(directory), 0
    for name, quantizer, weight in quantized_weights(model):
        codes, scales, tensor_scale = quantize_nvfp4(weight.contiguous(), quantizer.global_amax, quantizer.amax)
        assert torch.equal(codes.transpose(-1, -2), written[name]), name
        assert torch.equal(scales.transpose(-1, -2), written[f"{name}_weight_scale"].view(torch.uint8)), name
        assert tensor_scale == written[f"{name}_weight_scale_2"], name
        count += 1
    assert count == 4


def test_every_weight_is_rounded_to_itself(source):
    model = quantized(source)
    plain = {name: weight.clone() for name, _, weight in quantized_weights(model)}
    # Without the cast, requantizing loses something.
    assert any(not torch.equal(quantizer(weight), weight) for _, quantizer, weight in quantized_weights(model))
    addresses = [quantizer.amax.data_ptr() for _, quantizer, _ in quantized_weights(model)]
    applied = apply_to_model(model, source)
    assert len(applied) == 4 and all(facts["pct_lossless"] == 100 for facts in applied.values())
    for name, quantizer, weight in quantized_weights(model):
        rounded = quantizer(weight)
        assert torch.equal(rounded, plain[name]), name
        assert torch.equal(rounded.signbit(), plain[name].signbit()), name
    assert addresses == [quantizer.amax.data_ptr() for _, quantizer, _ in quantized_weights(model)]


def test_logits_of_cast_weights_are_the_source_s_bit_for_bit(source):
    tokens = torch.arange(20)[None]
    model, plain = quantized(source, "w4a16_nvfp4"), load_gpt_oss(source)
    attach(plain, QFORMATS["w4a16_nvfp4"])
    for each in (model, plain):
        for name, module in each.named_modules():
            if isinstance(module, TensorQuantizer) and (each is plain or "experts" not in name):
                module.disable()
    uncast = model(tokens).logits
    apply_to_model(model, source)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not torch.equal(model(tokens).logits, uncast)
    assert torch.equal(load_gpt_oss(source)(tokens).logits, plain(tokens).logits)


def test_codes_and_scales_are_those_that_convert_writes(source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst")
    model = quantized(source)
    apply_to_model(model, source)
    check_written(model, tmp_path / "dst")


def test_nearest_is_that_of_convert_too(tmp_path):
    path = make("gpt-oss", tmp_path / "src")
    spoil(path, "model.layers.0.mlp.experts.down_proj", spread=20)
    with pytest.raises(InexactError, match="down_proj"):
        apply_to_model(quantized(path), path)
    fp4cast.convert(path, tmp_path / "dst", inexact="nearest")
    model = quantized(path)
    applied = apply_to_model(model, path, inexact="nearest")
    facts = applied["model.layers.0.mlp.experts.down_proj_weight_quantizer"]
    assert facts["n_lossless_blocks"] == facts["n_total_blocks"] - 1
    check_written(model, tmp_path / "dst")


def test_the_map_says_what_the_checkpoint_is(source):
    found = build_amax_map(source)
    domains = {f"{domain.name}_weight_quantizer": domain.scaling for domain in fp4cast.inspect(source).domains}
    assert set(found) == set(domains) and len(found) == 4
    for name, facts in found.items():
        assert set(facts) == {
            "global_amax", "k_min", "k_max", "m", "n_total_blocks", "n_lossless_blocks", "n_zero_blocks",
            "n_out_of_range_blocks", "pct_lossless",
        }  # fmt: skip
        assert facts["global_amax"] == 2688 * 2.0 ** facts["m"]
        scaling = domains[name]
        assert (facts["k_min"], facts["k_max"], facts["m"]) == (scaling.k_min, scaling.k_max, scaling.m)


def test_the_counts_of_gpt_oss_20b_are_those_of_the_original(tmp_path):
    """Its true shapes, as files with holes: the scales are read, the codes never."""
    checkpoints.write(tmp_path / "src", checkpoints.CASES["gpt-oss-20b"](24, 1.0), sparse=True)
    assert count_lossless(build_amax_map(tmp_path / "src")) == {
        "tensors": 48, "of_tensors": 48, "blocks": 597_196_800, "of_blocks": 597_196_800
    }  # fmt: skip


def test_codes_are_not_read_where_scales_are_enough(tmp_path, monkeypatch):
    path = make("gpt-oss", tmp_path / "src", traps=False)
    model = quantized(path)
    monkeypatch.setattr("fp4cast.checkpoints.byte_ranges.File.gather", lambda *_: pytest.fail("codes were read"))
    assert len(apply_to_model(model, path)) == 4 and len(build_amax_map(path)) == 4


def test_a_model_that_does_not_belong_is_refused_and_not_changed(source):
    model = quantized(source)
    experts = model.model.layers[1].mlp.experts
    kept = [quantizer.amax.clone() for _, quantizer, _ in quantized_weights(model)]
    right, name = experts.down_proj_weight_quantizer, "model.layers.1.mlp.experts.down_proj_weight_quantizer"
    experts.down_proj_weight_quantizer = TensorQuantizer()
    words = "expected an enabled, calibrated NVFP4StaticQuantizer, got TensorQuantizer"
    with pytest.raises(QuantizerError, match=f"down_proj_blocks .*{name}.*{words}"):
        apply_to_model(model, source)
    del experts.down_proj_weight_quantizer
    words = "which GptOssForCausalLM does not have; it has model.layers.0.mlp.experts.gate_up_proj_weight_quantizer"
    with pytest.raises(QuantizerError, match=f"down_proj_blocks .*{name}, {words}"):
        apply_to_model(model, source)
    experts.down_proj_weight_quantizer = right
    right._amax = right._amax[:-1]
    with pytest.raises(QuantizerError, match=f"{name}: 2303 blocks of 16, but .*down_proj_blocks .* has 2304"):
        apply_to_model(model, source)
    for before, (_, quantizer, _) in zip(kept[:-1], quantized_weights(model), strict=False):
        assert torch.equal(before, quantizer.amax)
    with pytest.raises(QuantizerError, match="it has no static quantizer"):
        apply_to_model(load_gpt_oss(source), source)


def test_another_checkpoint_of_the_same_shapes_is_refused(source, tmp_path):
    other = make("gpt-oss", tmp_path / "other", seed=1)
    model = quantized(source)
    kept = [quantizer.amax.clone() for _, quantizer, _ in quantized_weights(model)]
    with pytest.raises(
        QuantizerError, match=r"block \d+ of the model's weight reaches .*; expected the checkpoint that"
    ):
        apply_to_model(model, other)
    assert all(torch.equal(a, q.amax) for a, (_, q, _) in zip(kept, quantized_weights(model), strict=True))
    apply_to_model(model, source)
    apply_to_model(model, source)  # again: what was set does not count, the weights do


def test_a_weight_of_another_orientation_is_refused(source):
    model = quantized(source)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.reshape(experts.down_proj.shape[0], 64, -1))
    with pytest.raises(
        QuantizerError, match=r"down_proj_weight_quantizer: quantizes \[.*\] in blocks, but .* holds \["
    ):
        apply_to_model(model, source)


def test_a_checkpoint_without_mxfp4_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    attach(model, QFORMATS["nvfp4"], static=True)
    max_calibrate(model)
    with pytest.raises(UnsupportedError):
        apply_to_model(model, tmp_path)


def test_names():
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert quantizer_name_from_blocks_key(f"{name}_blocks") == f"{name}_weight_quantizer"
    for wrong in (name, f"{name}_scales", "_blocks"):
        with pytest.raises(UnsupportedError, match="ends in _blocks"):
            quantizer_name_from_blocks_key(wrong)


def test_the_closed_forms():
    scales = torch.tensor([[120, 110, 103]], dtype=torch.uint8)
    top, info = compute_global_amax_for_scales(scales)
    assert top == 2688 * 2.0 ** (120 - 127 - 8)
    assert (info["k_min"], info["k_max"], info["m"]) == (-24, -7, -15)
    assert info["n_total_blocks"] == info["n_lossless_blocks"] == 3 and info["n_out_of_range_blocks"] == 0
    blocks = torch.full((1, 3, 16), 0x77, dtype=torch.uint8)
    amax = compute_per_block_amax_for_mxfp4(blocks, scales)
    assert amax.shape == (1, 6)
    assert amax[0].tolist() == [6 * 2.0 ** (b - 127) for b in (120, 120, 110, 110, 103, 103)]
    # A block of 4 only, 18 binades down: its codes are halved, under twice the scale.
    poor = torch.tensor([0x77, 0x66], dtype=torch.uint8)[:, None].repeat(1, 16)
    shifted = compute_per_block_amax_for_mxfp4(poor, torch.tensor([120, 102], dtype=torch.uint8))
    assert shifted.tolist() == [6 * 2.0**-7] * 2 + [6 * 2.0**-24] * 2
    with pytest.raises(ShapeError, match="expected a last axis of 16 bytes"):
        compute_per_block_amax_for_mxfp4(torch.zeros(1, 3, 8, dtype=torch.uint8), scales)
    with pytest.raises(ValueError, match="leading dimensions differ"):
        compute_per_block_amax_for_mxfp4(blocks[:, :2], scales)
    with pytest.raises(ShapeError, match="empty"):
        compute_per_block_amax_for_mxfp4(blocks[:, :0], scales[:, :0])
    with pytest.raises(ShapeError, match="expected uint8"):
        compute_global_amax_for_scales(scales.float())
    with pytest.raises(ScaleError, match="255"):
        compute_global_amax_for_scales(torch.tensor([3, 255], dtype=torch.uint8))
    with pytest.raises(ScaleError, match="no global amax in float32"):
        compute_global_amax_for_scales(torch.tensor([254], dtype=torch.uint8))
    with pytest.raises(ShapeError, match="empty"):
        compute_global_amax_for_scales(torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(UsageError, match="exponents -25 to -7 span 18 binades, so that codes decide"):
        compute_global_amax_for_scales(torch.tensor([120, 102], dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["zeros on top", "poor on top", "poor below", "inside"])
def test_both_amax_of_one_call_belong_together(kind):
    """Exact tensors, half of which scales alone would decide wrongly: the quantizer gives back every value."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        scales = rng.integers(104, 121, (2, 3, 4), dtype=np.uint8)
        codes = rng.integers(0, 256, (2, 3, 4, 16), dtype=np.uint8)
        place = tuple(rng.integers(0, size) for size in scales.shape)
        other = {"zeros on top": (0x08, 130), "poor on top": (0x11, 122), "poor below": (0x66, 102)}.get(kind)
        if other:
            codes[place], scales[place] = other
        made = compute_amax_for_mxfp4(torch.from_numpy(codes), torch.from_numpy(scales))
        assert made.per_block.shape == (2, 3, 8) and made.global_amax.shape == ()
        assert made.info["n_lossless_blocks"] == made.info["n_total_blocks"] == 24
        weights = torch.from_numpy(mxfp4_values(codes.reshape(2, 3, -1), scales)).float()
        quantized = static_blockwise_fp4_fake_quant(weights, made.per_block, made.global_amax)
        assert torch.equal(quantized, weights)


def test_the_scales_alone_would_round_most_of_these():
    """The original's two functions, the first of which takes the largest scale byte for the largest block."""
    rng, rounded = np.random.default_rng(2), 0
    for number in range(100):
        scales, codes = rng.integers(104, 121, (4, 4), dtype=np.uint8), rng.integers(0, 256, (4, 4, 16), dtype=np.uint8)
        codes[1, 2], scales[1, 2] = ((0x08, 130), (0x11, 122))[number % 2]  # zeros; 0.5 alone
        made = compute_amax_for_mxfp4(torch.from_numpy(codes), torch.from_numpy(scales))
        assert made.info["n_lossless_blocks"] == 16
        k, top = scales.astype(np.float64) - 127, float(scales.max()) - 127
        largest = np.abs(mxfp4_values(codes, scales[..., None])).max(-1)
        theirs = np.where(k >= top - 17, 6 * 2.0**k, largest).repeat(2, axis=-1)
        weights = torch.from_numpy(mxfp4_values(codes.reshape(4, -1), scales)).float()
        amax, whole = torch.from_numpy(theirs).float(), torch.tensor(2688 * 2.0 ** (top - 8))
        rounded += not torch.equal(static_blockwise_fp4_fake_quant(weights, amax, whole), weights)
    assert rounded > 60


def test_the_facts_count_what_is_lost():
    scales = torch.tensor([120, 0, 100, 101], dtype=torch.uint8)
    codes = torch.full((4, 16), 0x71, dtype=torch.uint8)  # 0.5 beside 6: no room for a shift
    codes[1] = 0
    info = compute_amax_for_mxfp4(codes, scales).info
    assert (info["n_total_blocks"], info["n_zero_blocks"]) == (4, 1)
    assert info["n_lossless_blocks"] < 4 and info["n_out_of_range_blocks"] >= 4 - info["n_lossless_blocks"]
    assert info["pct_lossless"] == 25.0 * info["n_lossless_blocks"]


def test_a_quantizer_outside_of_known_modules_is_refused(source):
    """Promoted and of the right size, but nothing quantizes a weight with it."""
    model = quantized(source)
    experts = model.model.layers[0].mlp.experts
    bank = torch.nn.Module()
    bank.down_proj_weight_quantizer = experts.down_proj_weight_quantizer
    bank.gate_up_proj_weight_quantizer = experts.gate_up_proj_weight_quantizer
    model.model.layers[0].mlp.experts = bank
    with pytest.raises(QuantizerError, match=r"layers.0.mlp.experts.*no known module quantizes a weight with it"):
        apply_to_model(model, source)
