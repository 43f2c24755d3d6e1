"""Models that are spread over devices: where their modules go, and that accelerate's hooks lose no calibration."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import dispatch_model, init_empty_weights

from models import TINY

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny"
TOKENS = torch.arange(24).reshape(2, 12)
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import UsageError
from fp4cast.ptq import QFORMATS, Options, attach, max_calibrate, quantize
from fp4cast.ptq.attention import attach_kv_cache
from fp4cast.ptq.devices import place
from fp4cast.ptq.load import empty_model, load_model
from fp4cast.ptq.quantizer import TensorQuantizer

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")


def llama(layers=2):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=layers)
    ).eval()


def gpt_oss():
    return load_model(open_checkpoint(FIXTURE), "cpu", attn_implementation="eager")


def mixture():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def amaxes(model):
    attach(model, QFORMATS["nvfp4"], static=True)
    attach_kv_cache(model)
    max_calibrate(model, lambda m: m(input_ids=TOKENS))
    return {name: module.amax for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}


@pytest.mark.parametrize("make", [llama, gpt_oss, mixture])
def test_hooks_of_accelerate_do_not_hide_activations(make):
    expected = amaxes(make())
    hooked = make()
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    found = amaxes(hooked)
    assert found.keys() == expected.keys() and any(amax is not None for amax in expected.values())
    for name, amax in expected.items():
        assert (amax is None and found[name] is None) or torch.equal(amax, found[name]), name


@pytest.fixture
def gpus(monkeypatch):
    """Claim that the machine has GPUs with so much free memory: where modules go depends on nothing else."""

    def claim(*free):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 1 << 40))

    return claim


def large():
    with init_empty_weights(include_buffers=False):
        return llama(layers=12)


def size(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def loads(model, placement):
    """Bytes by device."""
    found = {}
    for name, device in placement.items():
        found[device] = found.get(device, 0) + size(model.get_submodule(name))
    return found


def test_a_model_that_fits_runs_on_one_device(gpus):
    model = large()
    gpus(2 * size(model), 2 * size(model))
    assert place(model, "cpu", 0.8, False) == "cpu"
    assert place(model, "cuda", 0.8, False) == "cuda"
    assert place(model, "cuda:1", 0.8, True) == "cuda:1"


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_that_does_not_fit_in_one_gpu_is_spread(gpus, sequential):
    model = large()
    room = size(model) * 9 // 10
    gpus(room, room)
    placement = place(model, "cuda", 1.0, sequential)
    used = loads(model, placement)
    assert set(used) == {0, 1} and sum(used.values()) == size(model) and max(used.values()) <= room
    assert (used[0] > 2 * used[1]) == sequential
    # No layer is split, for its residual sum needs both ends on one device.
    assert all(f"model.layers.{i}" in placement for i in range(12))


@pytest.mark.parametrize(("device", "free"), [("cuda", (0.4, 0.4)), ("cuda", (0.9,)), ("cuda:1", (2.0, 0.9))])
def test_a_model_that_fits_nowhere_is_refused_before_it_is_loaded(gpus, device, free):
    model = large()
    gpus(*(int(part * size(model)) for part in free))
    with pytest.raises(
        UsageError, match=r"weights take .* GiB, and 100% of the GPUs' free memory is .*low_memory_mode"
    ):
        place(model, device, 1.0, False)


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_share_is_above_0_and_at_most_1(tmp_path, share):
    with pytest.raises(UsageError, match=r"--gpu_max_mem_percentage .*: expected a share, above 0, at most 1"):
        quantize(Options(FIXTURE, tmp_path / "out", "w4a16_nvfp4", gpu_max_mem_percentage=share))


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("sequential", [False, True])
def test_two_gpus_write_what_one_writes(tmp_path, sequential):
    text = tmp_path / "text.txt"
    text.write_text("\n".join("The quick brown fox jumps over the lazy dog." for _ in range(8)))
    few = {"cast_mxfp4_to_nvfp4": True, "dataset": str(text), "calib_size": 8, "calib_seq": 32, "batch_size": 4}
    share = 0.9 * size(empty_model(open_checkpoint(FIXTURE))) / torch.cuda.mem_get_info(0)[0]
    quantize(Options(FIXTURE, tmp_path / "one", "nvfp4_mlp_only", device="cuda:0", **few))
    both = {"gpu_max_mem_percentage": share, "use_seq_device_map": sequential, "device": "cuda"}
    torch.cuda.reset_peak_memory_stats(1)
    done = quantize(Options(FIXTURE, tmp_path / "two", "nvfp4_mlp_only", **both, **few))
    assert done.exact and torch.cuda.max_memory_allocated(1) > 0
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
