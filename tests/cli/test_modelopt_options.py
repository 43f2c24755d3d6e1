"""Each option of ModelOpt's two entries is accepted, or refused with a sentence, before anything is loaded."""

import json
import subprocess
from pathlib import Path

import pytest
import typer

from fp4cast.cli.app import app
from fp4cast.cli.modelopt_options import ROWS
from helpers import call, plain

SCRIPT = Path(__file__).parents[2] / "scripts" / "huggingface_example.sh"
REFUSED = [row for row in ROWS if not row.meaning]
ACCEPTED = [row for row in ROWS if row.meaning]
# As read from the sources that modelopt_options names.
HF_PTQ = """
attn_implementation auto_quantize_bits auto_quantize_checkpoint auto_quantize_method auto_quantize_score_size
awq_block_size batch_size calib_seq calib_size calib_with_images cast_mxfp4_to_nvfp4 cpu_offload dataset device
export_fmt export_path gpu_max_mem_percentage inference_pipeline_parallel inference_tensor_parallel kv_cache_qformat
low_memory_mode max_cpu_memory_gb max_gpu_memory_gb mlflow mlflow_experiment mlflow_run_name model
moe_calib_experts_ratio no-verbose offload_folder pyt_ckpt_path qformat recipe skip_generate sparsity_fmt
specdec_offline_dataset trust_remote_code use_fsdp2 use_seq_device_map verbose vllm_fakequant_export
"""
SHELL = """
auto_quantize_bits auto_quantize_checkpoint auto_quantize_method auto_quantize_score_size awq_block_size batch
calib calib_batch_size calib_dataset calib_seq calib_with_images cast_mxfp4_to_nvfp4 gpu_max_mem_percentage
input kv_cache_free_gpu_memory_fraction kv_cache_quant lm_eval_limit lm_eval_tasks low_memory_mode mmlu_limit model
moe_calib_experts_ratio no-verbose output pp quant recipe simple_eval_limit simple_eval_tasks sparsity tasks tp
trust_remote_code use_seq_device_map vlm
"""


def names_of(rows, entry):
    return [name for row in rows for name in row.names[entry].split(", ") if name]


def test_every_option_of_the_original_is_in_the_table():
    assert sorted(names_of(ROWS, 0)) == sorted(f"--{name}" for name in HF_PTQ.split())
    assert sorted(names_of(ROWS, 1)) == sorted(f"--{name}" for name in SHELL.split())
    for row in ROWS:
        assert bool(row.refusal) == (not row.meaning or bool(row.only)), row
        assert not set('"$`\\') & set(row.refusal), "it is written into a shell script"


def test_what_is_accepted_is_an_option_of_the_command():
    command = typer.main.get_command(app).commands["ptq"]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {name.replace("-", "_") for name in names_of(ACCEPTED, 0)} <= {name.replace("-", "_") for name in known}
    assert not {*names_of(REFUSED, 0)} & known


@pytest.mark.parametrize("name", names_of(REFUSED, 0))
def test_the_command_refuses(name):
    sentence = next(row.refusal for row in REFUSED if name == row.names[0])
    for words in ([name], [name, "1"], [f"{name}=1"], ["--qformat", "nvfp4", name.replace("_", "-")]):
        result = call("ptq", *words)
        assert result.exit_code == 2 and plain(result.stderr).strip() == f"error: {name}: {sentence}"


def test_the_command_refuses_values():
    for words in (["--sparsity_fmt", "sparsegpt"], ["--export-fmt=tensorrt_llm"]):
        result = call("ptq", *words, "--json")
        start = " ".join(words).replace("-fmt=", "_fmt ")
        assert result.exit_code == 2 and json.loads(result.stdout)["error"]["message"].startswith(f"{start}: ")
    for words in (["--export_fmt"], ["--nosuch"], ["--", "--recipe"]):
        result = call("ptq", *words)
        assert result.exit_code == 2 and "drop" not in result.stderr and "--qformat (--quant)" not in result.stderr


def test_the_shell_entry_refuses():
    for name in names_of(REFUSED, 1):
        sentence = next(row.refusal for row in REFUSED if name == row.names[1])
        for words in ([name], [f"{name}=1"]):
            done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
            assert done.returncode == 2 and done.stderr.startswith(f"error: {name}: {sentence}")


def test_the_help_of_the_shell_entry_names_what_it_accepts():
    shown = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    for row in ACCEPTED:
        assert not row.names[1] or (f"  {row.names[1]} " in shown and row.meaning in shown)
