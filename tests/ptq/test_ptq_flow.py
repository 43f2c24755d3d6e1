"""`fp4cast ptq` and the shell entry, on the trained model; what is refused is refused before a model is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers.processors import TemplateProcessing

import fp4cast
from fp4cast.errors import CheckpointError, DatasetError, MissingExtraError, UsageError
from fp4cast.miniatures import make
from fp4cast.ptq import Options, data, flow, quantize
from fp4cast.ptq.load import load_model
from helpers import (
    call,
    contents,
    plain,
)

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "gpt-oss-tiny"
TEXT = str(FIXTURE / "calibration.txt")
FEW = ["--dataset", TEXT, "--calib_size", "6", "--calib_seq", "64"]


def test_the_command_writes_what_convert_writes(tmp_path):
    args = ["--pyt_ckpt_path", FIXTURE, "--qformat", "nvfp4_mlp_only", "--export_path", tmp_path / "dst"]
    result = call("ptq", *args, "--cast_mxfp4_to_nvfp4", *FEW, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["exact"] and found["cast"] == 8 and found["activations"] == "w4a4" and not found["inexact"]
    assert found["calibration"] == {"samples": 6, "tokens": 6 * 64, "batch_size": 6}
    assert set(found["seconds"]) == {"load", "calibrate", "cast", "export"} and found["peak_memory"]["host"] > 1e8
    scales = input_scales(tmp_path / "dst")
    assert len(scales) == 8
    assert found["serve"].startswith(f"vllm serve {tmp_path / 'dst'}   # vLLM 0.")
    fp4cast.convert(FIXTURE, tmp_path / "file", activations="w4a4", input_scales=scales)
    assert contents(tmp_path / "dst") == contents(tmp_path / "file")


def input_scales(directory):
    """Amax by module, from the input scales of a checkpoint."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("_input_scale")]  # noqa: SIM118
        return {name.removesuffix("_input_scale"): float(file.get_tensor(name)) * 2688 for name in names}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_dense_mxfp4_model(tmp_path, layout):
    from models import TINY, pack

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=2)
    source = pack(transformers.LlamaForCausalLM(config), tmp_path, ("embed", "lm_head"))
    options = Options(source, tmp_path / "dst", "w4a16_nvfp4", cast_mxfp4_to_nvfp4=True, layout=layout)
    assert quantize(options).exact
    fp4cast.convert(source, tmp_path / "file", layout=layout)
    assert contents(tmp_path / "dst") == contents(tmp_path / "file")


def test_modern_spellings_and_words_for_people(tmp_path):
    args = ["--pyt-ckpt-path", FIXTURE, "--qformat", "w4a16_nvfp4", "--export-path", tmp_path / "dst"]
    result = call("ptq", *args, "--cast-mxfp4-to-nvfp4", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    text = plain(result.stdout)
    assert "exact: all 8 MXFP4 tensors keep every value" in text and "24 quantized" in text
    assert text.splitlines()[-1].startswith(
        "next  not known: no row of docs/engines.md says which engine serves gpt-oss with more than its MXFP4 "
        "weights quantized; those about the modelopt layout: vLLM 0.26.0 "
    )
    assert (tmp_path / "dst/config.json").exists() and (tmp_path / "dst/tokenizer.json").exists()


def test_lists_on_the_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(flow, "load_model", lambda *args: seen.append(load_model(*args)) or seen[0])
    args = ["--model", FIXTURE, "--qformat", "nvfp4_experts_only", "--export_path", tmp_path / "dst", "--no-verbose"]
    args += ["--dataset", f"{TEXT},{TEXT}", "--calib_seq", "16", "--attn_implementation", "eager", "--skip_generate"]
    args += ["--export_fmt", "hf", "--inference_tensor_parallel", "8", "--sparsity_fmt=dense", "--device", "cpu"]
    wrong = call("ptq", *args, "--calib_size", "2,x")
    assert wrong.exit_code == 2 and "got '2,x'" in plain(wrong.stderr) and not seen
    result = call("ptq", *args, "--calib_size", "2,3", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["calibration"] == {"samples": 5, "tokens": 80, "batch_size": 5}
    assert seen[0].config._attn_implementation == "eager"


def test_without_the_cast_the_loss_is_told(tmp_path):
    args = ["--pyt_ckpt_path", FIXTURE, "--qformat", "nvfp4_experts_only", "--export_path", tmp_path / "dst"]
    result = call("ptq", *args, *FEW, "--batch_size", "2")
    assert result.exit_code == 0, result.stderr
    text = plain(result.stdout)
    assert "requantized; of 8 MXFP4 tensors, 0 kept every value" in text and "6 samples, 384 tokens; 2 together" in text
    assert "SNR" in text and text.splitlines()[-1].startswith(f"next  vllm serve {tmp_path / 'dst'}   # vLLM 0.")


def test_a_model_that_no_row_is_about_has_no_known_server(bf16, tmp_path):
    done = quantize(Options(bf16, tmp_path / "dst", "w4a16_nvfp4"))
    assert done.to_json()["serve"].startswith(
        "not known: no row of docs/engines.md says which engine serves this model; "
    )
    assert "modelopt layout: vLLM 0." in done.exported.serve


def run_shell(*args, cwd, **env):
    """The shell entry, with this Python."""
    env = os.environ | {"PYTHON": sys.executable} | env
    command = [ROOT / "scripts/huggingface_example.sh", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_shell_entry_as_modelopts_users_call_it(tmp_path):
    spaced = tmp_path / "gpt-oss 0.1"
    spaced.symlink_to(FIXTURE)
    args = ["--model", spaced, "--quant", "nvfp4_experts_only", "--cast_mxfp4_to_nvfp4", "--calib_dataset", TEXT]
    args += ["--calib=2", "--calib_seq", "16", "--tp", "8", "--pp", "2", "--tasks", "quant", "--sparsity", "dense"]
    args += [
        "--low_memory_mode",
        "--no-verbose",
        "--inexact",
        "nearest",
        "--device",
        "cpu",
        "--attn_implementation",
        "eager",
    ]
    done = run_shell(*args, cwd=ROOT, ROOT_SAVE_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "saved_models_gpt-oss_0_1_nvfp4_experts_only"
    assert " ".join(done.stdout.split()) == f"wrote {made}"
    assert fp4cast.verify(FIXTURE, made).exact


def test_the_shell_entry(tmp_path):
    args = ["--model", FIXTURE, "--quant=nvfp4_mlp_only", "--cast_mxfp4_to_nvfp4", "--dataset", TEXT, "--calib", "3"]
    args += ["--calib_seq", "32", "--calib_batch_size", "3", "--device", "cpu", "--kv_cache_quant", "fp8"]
    done = run_shell(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "KV cache     FP8 with calibrated scales" in plain(done.stdout)
    report = fp4cast.verify(FIXTURE, tmp_path / "saved_models_gpt-oss-tiny_nvfp4_mlp_only_kv_fp8")
    assert report.exact and report.kv_cache_qformat == "fp8"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--quant", "nvfp4"], "--model is missing"),
        (["--model", "x"], "--quant is missing"),
        (["--model", "x", "--quant"], "--quant needs a value"),
        (["--model", "x", "--quant", "nvfp4", "--dataset", "--cast_mxfp4_to_nvfp4"], "--dataset needs a value"),
        (["--model", "x", "--quant", "nvfp4", "--nosuch", "8"], "unknown option: --nosuch"),
        (["--model", "x", "--quant", "nvfp4", "--nosuch"], "unknown option: --nosuch"),
        (["--tasks", "quant,mmlu"], "--tasks quant,mmlu: nothing is evaluated here"),
        (["--sparsity=sparsegpt"], "--sparsity sparsegpt: weights are not made sparse"),
        (["x"], "unexpected argument: x"),
    ],
)
def test_the_shell_entry_refuses(args, words):
    done = subprocess.run([ROOT / "scripts/huggingface_example.sh", *args], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr
    helped = subprocess.run([ROOT / "scripts/huggingface_example.sh", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--cast_mxfp4_to_nvfp4" in helped.stdout


# --- refused before anything is loaded --------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(flow, "load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bf16")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


W4A4, W4A16 = {"qformat": "nvfp4_mlp_only", "dataset": TEXT}, {"qformat": "w4a16_nvfp4"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**W4A4, "qformat": "fp8"}, "unknown qformat 'fp8'"),
        ({**W4A4, "qformat": "int4_awq", "cast_mxfp4_to_nvfp4": True}, "'int4_awq' with --cast_mxfp4_to_nvfp4"),
        ({**W4A4, "qformat": "nvfp4,fp8", "cast_mxfp4_to_nvfp4": True}, "expected one qformat with --cast_.*, got 2"),
        ({**W4A4, "dataset": None}, "quantizes activations, which needs text .* Pass --dataset FILE"),
        ({**W4A4, "dataset": []}, "quantizes activations, which needs text"),
        ({**W4A16, "dataset": TEXT}, "nothing is calibrated, so drop --dataset"),
        ({**W4A16, "calib_size": 3, "calib_seq": 4}, "so drop --calib_size, --calib_seq"),
        ({**W4A4, "calib_size": 0}, "--calib_size: expected at least 1, got 0"),
        ({**W4A4, "calib_size": [3, 0]}, "--calib_size: expected at least 1, got 0"),
        ({**W4A4, "calib_size": [3, 4]}, "expected one size for each of 1 datasets, got 2"),
        ({**W4A4, "calib_size": []}, "expected one size for each of 1 datasets, got 0"),
        ({**W4A4, "batch_size": -1}, "--batch_size: expected at least 0, got -1"),
        ({**W4A4, "inexact": "nearest"}, "--inexact nearest belongs to --cast_mxfp4_to_nvfp4"),
        ({**W4A4, "inexact": "maybe"}, "inexact must be 'fail' or 'nearest'"),
        ({**W4A4, "device": "tpu"}, "unknown device 'tpu'|expected cpu, cuda"),
        ({**W4A4, "device": "meta"}, "device 'meta': expected cpu, cuda"),
        ({**W4A4, "device": "cuda:99"}, "'cuda:99': this machine has . CUDA devices; try --device cpu"),
        ({**W4A4, "layout": "compressed-tensors"}, "no engine reads gpt-oss in the compressed-tensors layout"),
        ({**W4A4, "layout": "gguf"}, "unknown layout 'gguf'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        quantize(Options(FIXTURE, tmp_path / "dst", **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model")
def test_an_attention_that_transformers_lacks(tmp_path):
    with pytest.raises(CheckpointError, match=r"attn_implementation=.nosuch.+ is not supported"):
        quantize(Options(FIXTURE, tmp_path / "dst", "w4a16_nvfp4", attn_implementation="nosuch"))


@pytest.mark.usefixtures("no_model")
def test_a_cast_of_what_is_no_mxfp4(bf16, tmp_path):
    with pytest.raises(UsageError, match=r"of an MXFP4 checkpoint, but .*BF16"):
        quantize(Options(bf16, tmp_path / "dst", "w4a16_nvfp4", cast_mxfp4_to_nvfp4=True))


@pytest.fixture(scope="module")
def mxfp4_dense(tmp_path_factory):
    """A dense model, all of whose linear layers are MXFP4."""
    from models import TINY, pack

    llama = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=1)
    return pack(transformers.LlamaForCausalLM(llama), tmp_path_factory.mktemp("mxfp4"), ("embed", "lm_head"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize(
    ("qformat", "words"),
    [
        (
            "nvfp4_mlp_only",
            "4 of 7 MXFP4 tensors are not quantized in the model, .*k_proj; use a qformat",
        ),
        ("nvfp4_experts_only", "nothing would be quantized"),
    ],
)
def test_formats_that_do_not_fit_the_checkpoint(mxfp4_dense, tmp_path, qformat, words, cast):
    data = None if qformat.startswith("w4a16") else TEXT
    options = Options(mxfp4_dense, tmp_path / "dst", qformat, cast_mxfp4_to_nvfp4=cast, dataset=data)
    with pytest.raises(fp4cast.errors.UnsupportedError, match=words):
        quantize(options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model")
def test_rows_that_are_no_whole_blocks(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    with pytest.raises(
        fp4cast.errors.QuantizerError, match=r"down_proj.weight \[32, 40\]: K is 40, expected a multiple"
    ):
        quantize(Options(tmp_path / "src", tmp_path / "dst", "w4a16_nvfp4"))
    with pytest.raises(UsageError, match="unknown layout 'gguf'"):
        quantize(Options(tmp_path / "src", tmp_path / "dst", "w4a16_nvfp4", layout="gguf"))


def test_a_model_that_does_not_run(tmp_path, monkeypatch):
    """Memory that runs out is told with what to try, as JSON too; nothing is left behind."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.models.gpt_oss.modeling_gpt_oss.GptOssModel.forward", full)
    args = ["--pyt_ckpt_path", FIXTURE, "--qformat", "nvfp4_mlp_only", "--export_path", tmp_path / "dst", *FEW]
    for batch in ("0", "2"):
        result = call("ptq", *args, "--batch_size", batch, "--json")
        message = json.loads(result.stdout)["error"]["message"]
        assert result.exit_code == 1 and "--batch_size or --calib_seq, or ptq's --low_memory_mode" in message
    assert not list(tmp_path.iterdir())


def test_an_input_that_is_always_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "load_model", lambda *args: silent(load_model(*args)))
    words = "layers.2.mlp.experts.down_proj: its input was zero on all calibration data, so it has no scale"
    with pytest.raises(fp4cast.errors.QuantizerError, match=words):
        quantize(Options(FIXTURE, tmp_path / "dst", **W4A4, calib_size=2, calib_seq=32))
    assert not list(tmp_path.iterdir())


def silent(model):
    """With one layer's gates shut."""
    experts = model.model.layers[2].mlp.experts
    experts._apply_gate = lambda gate_up: 0 * type(experts)._apply_gate(experts, gate_up)
    return model


@pytest.mark.usefixtures("no_model")
def test_a_destination_that_is_there(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("kept")
    with pytest.raises(fp4cast.errors.DestinationError, match="did not write: mine"):
        quantize(Options(FIXTURE, tmp_path / "dst", "w4a16_nvfp4", overwrite=True))
    command = ("ptq", "--pyt_ckpt_path", FIXTURE, "--qformat", "w4a16_nvfp4", "--export_path", tmp_path / "dst")
    assert call(*command, "--overwrite").exit_code == 1
    assert (tmp_path / "dst/mine").read_text() == "kept"


@pytest.mark.usefixtures("no_model")
def test_weights_that_cannot_be_kept(tmp_path):
    from models import spoil

    path = make("gpt-oss", tmp_path / "src")
    spoil(path, "model.layers.0.mlp.experts.down_proj", spread=20)
    with pytest.raises(fp4cast.errors.InexactError, match="down_proj"):
        quantize(Options(path, tmp_path / "dst", "w4a16_nvfp4", cast_mxfp4_to_nvfp4=True))


def test_what_transformers_cannot_load(tmp_path):
    path = make("kimi-k3", tmp_path / "src")
    with pytest.raises(CheckpointError, match="transformers cannot load the model"):
        quantize(Options(path, tmp_path / "dst", "w4a16_nvfp4", cast_mxfp4_to_nvfp4=True))


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FIXTURE)


def test_a_text_is_cut_and_no_token_is_lost(tokenizer):
    samples = data.tokenize(data.open_dataset(TEXT), tokenizer, 10**6, 100)
    assert {sample.shape for sample in samples[:-1]} == {(1, 100)} and 0 < samples[-1].shape[1] <= 100
    assert tokenizer.decode(torch.cat(samples, dim=1)[0]) == Path(TEXT).read_text()
    assert len(data.tokenize(data.open_dataset(TEXT), tokenizer, 3, 100)) == 3


def test_several_datasets_with_one_size_each(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d,e"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(f"{name[0]}{i} ") + "\n" for i in range(5)))

    def taken(names, sizes):
        samples = data.tokenize_all(data.open_datasets(names, sizes), tokenizer, 20)
        return "".join(tokenizer.decode(sample[0]) for sample in samples).split()

    assert taken("a.jsonl,b.jsonl", [1, 2]) == ["a0", "b0", "b1"]
    assert taken(["a.jsonl", "b.jsonl", "c.jsonl"], [2, 1]) == ["a0", "a1", "b0", "c0"], "the last size holds on"
    assert taken("a.jsonl,b.jsonl", 1) == ["a0", "b0"]
    assert taken("d,e.jsonl", 1) == ["d0"], "a file, whatever its name"
    with pytest.raises(DatasetError, match=r"none\.jsonl: no such file"):
        taken("a.jsonl,none.jsonl", 1)


def test_lines_are_samples(tokenizer, tmp_path):
    path = tmp_path / "some.jsonl"
    records = [{"text": "alpha beta"}, "a plain string", {"prompt": "what?", "answer": "that"}, {"content": "x" * 500}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    samples = data.tokenize(data.open_dataset(str(path)), tokenizer, 10, 20)
    assert [tokenizer.decode(sample[0]) for sample in samples[:3]] == ["alpha beta", "a plain string", "what?"]
    assert samples[3].shape == (1, 20)
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes('"d\xe9j\xe0"'.encode("latin-1"))
        with pytest.raises(DatasetError, match=r"latin.*(UTF-8|not valid JSON)"):
            data.tokenize(data.open_dataset(str(tmp_path / name)), tokenizer, 10, 20)


def test_chat_messages_need_a_template(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(DatasetError, match="no chat template"):
        data.tokenize(data.open_dataset(str(path)), tokenizer, 1, 20)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    samples = data.tokenize(data.open_dataset(str(path)), tokenizer, 1, 20)
    tokenizer.chat_template = None
    assert tokenizer.decode(samples[0][0]) == "<user>hello"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DatasetError, match="refuses a conversation: roles must alternate"):
        data.tokenize(data.open_dataset(str(path)), tokenizer, 1, 20)
    tokenizer.chat_template = None


def test_special_tokens_come_once(tmp_path):
    """A template writes them itself; a line gets them; a cut text has none inside."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURE)
    first = ("<|endoftext|>", 0)
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[first])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "<|endoftext|>{{ messages[0].content }}"
    records = [{"messages": [{"role": "user", "content": "hello"}]}, {"text": "hello"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "some.txt").write_text("hello")
    lines = data.tokenize(data.open_dataset(str(tmp_path / "some.jsonl")), tokenizer, 2, 20)
    assert [sample[0].tolist().count(0) for sample in lines] == [1, 1]
    assert 0 not in data.tokenize(data.open_dataset(str(tmp_path / "some.txt")), tokenizer, 1, 20)[0]


def test_batches_hold_samples_of_one_length():
    samples = [torch.full((1, length), i) for i, length in enumerate([5, 5, 3, 5, 3])]
    batches = data.split(samples, 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 5), (1, 5), (2, 3)]
    assert sorted(int(row[0]) for batch in batches for row in batch) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": 1}', "line 1: expected one of the keys messages, text, .* got text"),
        ('{"text": "a"}\n{', "line 2: is not valid JSON"),
        ("[1]", "line 1: expected .* got list"),
        ("\n\n", "holds no text"),
    ],
)
def test_lines_that_hold_no_text(tokenizer, tmp_path, text, words):
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=words):
        data.tokenize(data.open_dataset(str(path)), tokenizer, 10, 20)


def test_a_data_set_as_the_hub_has_them(tokenizer, tmp_path, monkeypatch):
    """With the real library, which takes a directory for a data set, too: the hub itself cannot be reached here."""
    pytest.importorskip("datasets")
    (tmp_path / "some" / "data").mkdir(parents=True)
    records = [{"text": "alpha beta"}, {"text": "gamma"}]
    (tmp_path / "some/data/train.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.chdir(tmp_path)
    samples = data.tokenize(data.open_dataset("some/data"), tokenizer, 10, 20)
    assert [tokenizer.decode(sample[0]) for sample in samples] == ["alpha beta", "gamma"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DatasetError, match="nobody/nothing: cannot be loaded from the Hub"):
        data.tokenize(data.open_dataset("nobody/nothing"), tokenizer, 10, 20)


def test_data_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DatasetError, match="is empty"):
        data.open_dataset(str(tmp_path / "empty.txt"))
    with pytest.raises(DatasetError, match="no such file"):
        data.open_dataset(str(tmp_path / "none.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fp4cast\[datasets\]'"):
        data.open_dataset("abisee/cnn_dailymail")
