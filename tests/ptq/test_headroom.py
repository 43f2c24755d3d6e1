"""Activation amax with headroom: against ModelOpt's own calibrator, exact percentiles, and both commands."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import QuantizerError, UsageError
from fp4cast.kernels import dynamic_fp4_fake_quant
from fp4cast.ptq import QFORMATS, Headroom, TensorQuantizer, attach, max_calibrate
from fp4cast.ptq.data import open_dataset, split, tokenize
from fp4cast.ptq.headroom import BlockHistogram, _bins, _percentile
from fp4cast.ptq.layerwise.calibrate import calibrate
from fp4cast.ptq.load import load_model, load_tokenizer
from fp4cast.ptq.model_weights import input_amax
from helpers import call, plain
from models import TINY, pack

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny"
TEXT = str(FIXTURE / "calibration.txt")
FEW = {"dataset": TEXT, "calib_size": 6, "calib_seq": 64, "batch_size": 3, "device": "cpu"}
WORDS = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
SEEDS = st.integers(0, 2**32 - 1)
PERCENTILES = st.floats(0.01, 100)


def batches(path):
    samples = tokenize(open_dataset(TEXT), load_tokenizer(open_checkpoint(path)), FEW["calib_size"], FEW["calib_seq"])
    return split(samples, FEW["batch_size"])


def activations(seed):
    """Up to three batches whose rows lie up to tens of binades apart, some of them zeros, some in BF16."""
    random = torch.Generator().manual_seed(seed)
    spread, width = torch.rand(2, generator=random).tolist()
    for _ in range(1 + seed % 3):
        rows = int(torch.randint(1, 120, (), generator=random))
        x = torch.randn(rows, 16 + int(100 * width), generator=random)
        x *= torch.exp2((40 * spread * torch.randn(rows, 1, generator=random)).clamp(-90, 90))
        x *= torch.rand(rows, 1, generator=random) > (seed % 5) / 5
        yield x.bfloat16() if seed % 2 else x


def both(batches, **numbers):
    """The amax that ModelOpt's calibrator finds, and ours."""
    from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator

    theirs, ours = NVFP4ActHeadroomCalibrator(**numbers), BlockHistogram()
    for batch in batches:
        theirs.collect(batch)
        ours.add(batch)
    return theirs.compute_amax(), Headroom(**numbers).amax(ours)


# --- the rule ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SEEDS, PERCENTILES, st.one_of(PERCENTILES, st.sampled_from([99.99, 100.0])), st.floats(1e-3, 28671))
def test_it_is_modelopt_s_bit_for_bit(seed, anchor, upper, rho):
    for numbers in ({}, {"anchor_percentile": anchor, "upper_percentile": upper, "rho": rho}):
        theirs, ours = both(activations(seed), **numbers)
        assert float(ours) == (0 if theirs is None else float(theirs)) and ours.dtype == torch.float32


def test_one_loud_block_is_clipped_as_modelopt_clips_it():
    """Of many blocks; the anchor does not count what is a million times smaller than the upper end."""
    x = torch.ones(40_000, 16)
    x[7], x[8:2000] = 1e9, 1e-8
    theirs, ours = both([x])
    assert torch.equal(ours, theirs) and float(ours) < 2e4
    theirs, ours = both([x], upper_percentile=100.0)
    assert torch.equal(ours, theirs) and float(ours) > 1e13  # all others are too small to count for the anchor


def test_every_bf16_number_lies_in_modelopt_s_bin():
    from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator

    numbers = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    assert torch.equal(_bins(numbers), NVFP4ActHeadroomCalibrator()._bin_index(torch.log2(numbers)))


@settings(max_examples=100, deadline=None)
@given(SEEDS, PERCENTILES)
def test_a_percentile_is_exact_to_half_a_bin(seed, percentile):
    """Against NumPy's, of the block amax themselves."""
    random = np.random.default_rng(seed)
    blocks = np.exp2(random.normal(0, 4, random.integers(1, 3000))).astype(np.float32)
    seen = BlockHistogram()
    seen.add(torch.from_numpy(blocks)[:, None] * torch.ones(16))
    exact = np.percentile(blocks, percentile, method="inverted_cdf")
    assert abs(np.log2(_percentile(seen.counts, percentile) / exact)) <= 0.5 * 80 / 512 + 1e-5
    assert float(Headroom(anchor_percentile=100, upper_percentile=100, rho=1e-3).amax(seen)) == blocks.max()


def test_what_was_not_seen_has_the_plain_maximum():
    seen = BlockHistogram()
    assert float(Headroom().amax(seen)) == 0
    for x in (torch.zeros(0, 32), torch.zeros(3, 32)):
        seen.add(x)
        assert float(Headroom().amax(seen)) == 0 and seen.counts is None
    seen.add(torch.tensor([[1.0, float("nan")] + [2.0] * 30]))
    assert int(seen.counts.sum()) == 1 and Headroom().amax(seen).isnan()


@pytest.mark.parametrize(
    ("loud_blocks", "lost"), [(20, {"max": 1.0, "headroom": 1.0}), (1, {"max": 1.0, "headroom": 0})]
)
def test_a_quiet_expert_starves_beside_a_loud_one_unless_that_is_rare(loud_blocks, lost):
    """Parts of 20,000 blocks of the quiet one that round to zeros under a scale that both share; none under its own."""
    quiet, loud = torch.rand(20_000, 16) + 0.5, torch.full((loud_blocks, 16), 2.0**24)
    shared, alone = BlockHistogram(), BlockHistogram()
    for histogram, inputs in ((shared, (quiet, loud)), (alone, (quiet,))):
        for x in inputs:
            histogram.add(x)

    def flushed(amax):
        return float((dynamic_fp4_fake_quant(quiet, amax) == 0).all(dim=1).float().mean())

    assert {"max": flushed(shared.largest), "headroom": flushed(Headroom().amax(shared))} == lost
    assert flushed(alone.largest) == flushed(Headroom().amax(alone)) == 0


def test_merged_histograms_are_those_of_all_data():
    whole, parts = BlockHistogram(), BlockHistogram()
    for batch in activations(11):
        part = BlockHistogram()
        for histogram in (whole, part):
            histogram.add(batch)
        parts.merge(part)
    parts.merge(BlockHistogram())
    assert torch.equal(parts.counts, whole.counts) and torch.equal(parts.largest, whole.largest)


@pytest.mark.parametrize(
    "numbers",
    [{"rho": 0}, {"rho": 28672}, {"anchor_percentile": 0}, {"upper_percentile": 100.1}, {"rho": float("nan")}],
)
def test_numbers_out_of_range(numbers):
    with pytest.raises(UsageError, match=f"{next(iter(numbers))}: expected more than 0 and .*, got"):
        Headroom(**numbers)


# --- in a model -------------------------------------------------------------------------------------------------------


def qwen3():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=64,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    keep = ("embed", "lm_head", "self_attn", "mlp.gate.")
    return pack(qwen3(), tmp_path_factory.mktemp("headroom"), keep)


def calibrated(path, qformat="nvfp4_mlp_only", headroom=None, **options):
    """Input amax by module of a whole model in memory."""
    model = load_model(open_checkpoint(path), "cpu")
    attach(model, QFORMATS[qformat], **options)
    run = batches(path)
    max_calibrate(model, lambda model: [model.base_model(input_ids=b, use_cache=False) for b in run], headroom=headroom)
    return input_amax(model)


def modelopt_amax(model, run):
    """Amax by input quantizer after ModelOpt's own calibration with headroom."""
    import modelopt.torch.quantization as mtq

    rules = mtq.NVFP4_DEFAULT_CFG | {"algorithm": {"method": "nvfp4_act_headroom"}}
    with warnings.catch_warnings(action="ignore"):
        mtq.quantize(model, rules, lambda model: [model(input_ids=batch, use_cache=False) for batch in run])
    named = ((name, module) for name, module in model.named_modules() if name.endswith("input_quantizer"))
    return {name: float(module.amax) for name, module in named if module.is_enabled and module.amax is not None}


def test_all_inputs_of_gpt_oss_have_modelopt_s_amax():
    theirs = modelopt_amax(load_model(open_checkpoint(FIXTURE), "cpu"), batches(FIXTURE))
    ours = calibrated(FIXTURE, "nvfp4", Headroom())
    separator = {True: "_input_quantizer", False: ".input_quantizer"}
    assert ours == {name: theirs[name + separator["experts" in name]] for name in ours} and len(ours) == 24
    assert not set(ours.items()) & set(calibrated(FIXTURE, "nvfp4").items())


def test_experts_that_share_a_quantizer_have_modelopt_s_amax(moe):
    model = transformers.AutoModelForCausalLM.from_pretrained(moe.parent / "bf16", dtype=torch.bfloat16)
    theirs = modelopt_amax(model, batches(moe))
    ours = calibrated(moe, headroom=Headroom())
    for layer in range(2):
        bank = f"model.layers.{layer}.mlp.experts"
        for leaf, shared in (("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj")):
            found = {ours[f"{bank}.{expert}.{leaf}"] for expert in range(64)}
            assert found == {theirs[f"{bank}.{shared}_input_quantizer"]}


class Lists(nn.Module):
    """Experts as a list of linear layers, each run on rows of another size."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(3))

    def forward(self, x):
        return [expert["up_proj"](x * 10**i) for i, expert in enumerate(list(self.experts)[:2])]


@pytest.mark.parametrize(("per", "same"), [("bank", True), ("expert", False), (None, False)])
def test_a_list_of_experts_may_share_a_quantizer(per, same):
    """The third expert sees no token."""
    model = nn.ModuleDict({"mlp": Lists()})
    attach(model, QFORMATS["nvfp4_experts_only"], input_scales_per=per)
    max_calibrate(model, lambda model: model["mlp"](torch.ones(4, 32)))
    found = [expert["up_proj"].input_quantizer.amax.item() for expert in model["mlp"].experts]
    assert found == [10.0 if same else 1.0, 10.0, 10.0]
    assert len({id(each) for each in model.modules() if isinstance(each, TensorQuantizer)}) == (4 if same else 6)


def test_an_input_of_zeros_is_refused_with_headroom_too():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 32)})})
    attach(model, QFORMATS["nvfp4_mlp_only"])
    max_calibrate(model, lambda model: model["mlp"]["up_proj"](torch.zeros(4, 32)), headroom=Headroom())
    with pytest.raises(QuantizerError, match="was zero on all calibration data"):
        input_amax(model)


# --- both commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headroom", [None, Headroom(), Headroom(upper_percentile=100, rho=100)])
@pytest.mark.parametrize("per", ["bank", "expert"])
def test_layer_by_layer_and_in_memory_are_the_same(moe, tmp_path, headroom, per):
    found = calibrate(moe, tmp_path / "amax.json", act_headroom=headroom, input_scales_per=per, **FEW)
    assert found.amax == calibrated(moe, headroom=headroom, input_scales_per=per)
    distinct = len({value for name, value in found.amax.items() if "layers.0" in name and "down_proj" in name})
    assert found.idle > 0 and (distinct == 1 if per == "bank" else distinct > 2)


@pytest.mark.parametrize("per", [None, "bank"])
def test_experts_in_one_tensor_are_pooled(tmp_path, per):
    found = calibrate(FIXTURE, tmp_path / "amax.json", act_headroom=Headroom(), input_scales_per=per, **FEW)
    assert found.amax == calibrated(FIXTURE, headroom=Headroom())


def test_experts_in_one_tensor_cannot_have_a_scale_each(tmp_path):
    ptq = ("ptq", "--model", FIXTURE, "--qformat", "nvfp4_mlp_only", "--export_path", tmp_path / "dst")
    for command in (ptq, ("calibrate", FIXTURE, "--out", tmp_path / "amax.json")):
        result = call(*command, *WORDS, "--input-scales-per", "expert")
        assert result.exit_code == 2 and "one input scale in every layout" in " ".join(plain(result.stderr).split())
    assert not list(tmp_path.iterdir())


def test_the_commands_offer_it_in_both_spellings(tmp_path):
    names = [tmp_path / f"{i}.json" for i in range(3)]
    for out, words in zip(names, ([], ["--act-headroom"], ["--nvfp4_act_headroom"]), strict=True):
        done = call("calibrate", FIXTURE, "--out", out, *WORDS, *words)
        assert done.exit_code == 0 and ("s; amax with headroom" in plain(done.stdout)) == bool(words)
    plainly, first, second = (json.loads(out.read_text()) for out in names)
    assert first == second != plainly
    args = ["--model", FIXTURE, "--qformat", "nvfp4_mlp_only", "--export_path", tmp_path / "dst", "--act_headroom"]
    done = call("ptq", *args, "--cast_mxfp4_to_nvfp4", *WORDS, "--json")
    rules = {"anchor_percentile": 1.0, "upper_percentile": 99.99, "rho": 16384.0, "none_left": 0}
    assert done.exit_code == 0 and json.loads(done.stdout)["act_headroom"] == rules
    assert (
        call("convert", FIXTURE, tmp_path / "file", "--activations", "w4a4", "--input-scales", names[1]).exit_code == 0
    )
    written = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("dst", "file")]
    assert written[0] == written[1]


def test_the_documented_table_is_the_measured_one():
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks/results/ptq/headroom.json").read_text())
    text = (root / "docs/ptq.md").read_text()
    for row in found["rows"]:
        cells = (row["rule"], f"{row['tokens']:,} tokens", f"{row['flushed']:,}", f"{row['saturated']:,}")
        assert f"| {' | '.join(cells)} | {row['snr_db']:.2f} dB | {row['perplexity']:.2f} |" in text
    by = {(row["tokens"], row["rule"]): row for row in found["rows"]}
    assert not any(row["flushed"] for row in found["rows"])
    for tokens in (8235, 128):
        bank, expert = (by[tokens, f"max, per {each}"] for each in ("bank", "expert"))
        assert expert["saturated"] > bank["saturated"] > by[tokens, "headroom, per bank"]["saturated"] == 0
    chance = found["chance"]["perplexity"]
    assert f"moves from {min(chance):.2f} to {max(chance):.2f} by chance" in " ".join(text.split())
    assert max(found["chance"]["snr_db"]) - min(found["chance"]["snr_db"]) < 0.02


def test_inputs_whose_blocks_span_too_much_are_counted(tmp_path):
    """As ModelOpt warns of them: one projection of the fixture; with a small rho, all inputs of experts."""
    args = ["--model", FIXTURE, "--qformat", "nvfp4", "--export_path", tmp_path / "dst", "--act_headroom"]
    text = " ".join(plain(call("ptq", *args, "--cast_mxfp4_to_nvfp4", *WORDS).stdout).split())
    assert "amax with headroom, but for 1 inputs whose blocks span too much" in text
    found = calibrate(FIXTURE, tmp_path / "amax.json", act_headroom=Headroom(rho=1), **FEW)
    assert found.to_json()["act_headroom"]["none_left"] == 8


def test_weights_alone_have_no_activations_to_scale(tmp_path):
    args = ["--model", FIXTURE, "--qformat", "w4a16_nvfp4", "--export_path", tmp_path / "dst"]
    result = call("ptq", *args, "--act_headroom", "--input_scales_per", "bank")
    assert result.exit_code == 2 and "so drop --act_headroom, --input_scales_per" in plain(result.stderr)
