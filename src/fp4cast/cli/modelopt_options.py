"""Every option of ModelOpt's `hf_ptq.py` and `huggingface_example.sh`, and what becomes of it here.

The names were read from NVIDIA/Model-Optimizer: examples/hf_ptq at commit fbcdc16c2, and examples/llm_ptq at commit
50706d175, which first had the cast. The help of `fp4cast ptq`, what it refuses, `scripts/parser.sh` and the table of
docs/ptq.md are made from these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp4cast.cli.commands import Helped
from fp4cast.cli.console import exit_with
from fp4cast.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One option of the original.

    Attributes:
        names: its spelling in `hf_ptq.py` and in `huggingface_example.sh`; "" where that entry has none.
        value: what its value is called; "" for a flag.
        meaning: what it does here; "" for one that is refused whatever its value.
        refusal: why it is refused, and what to do instead; with `only`, said of other values.
        only: the one value that is accepted; "" for any.
    """

    names: tuple[str, str]
    value: str = ""
    meaning: str = ""
    refusal: str = ""
    only: str = ""


_GPUS_ALONE = "a model runs on the GPUs alone; for one that does not fit, use --low_memory_mode."
_SEARCH = "no format is searched here; choose one with --qformat (--quant)."
_NO_EVAL = "nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it."
_NO_SERVER = "no engine is started here; give this to the engine that serves the exported directory."
_PARALLEL = "Accepted; changes nothing: a Hugging Face checkpoint is the same for any number of serving GPUs."
_TRACKING = "runs are not tracked here; --json prints what was done as one document, to log where you like."

ROWS = (
    Row(("--pyt_ckpt_path, --model", "--model"), "SRC", "A directory, or a Hugging Face model id."),
    Row(
        ("--qformat", "--quant"),
        "NAME",
        "nvfp4, nvfp4_mlp_only, nvfp4_experts_only, nvfp4_omlp_only: W4A4; nvfp4_mlp_weight_only, w4a16_nvfp4: "
        "weights only.",
    ),
    Row(
        ("--kv_cache_qformat", "--kv_cache_quant"),
        "NAME",
        "Format of the KV cache: none, the default here (fp8_cast is ModelOpt's), and engines choose; fp8: FP8 with "
        "calibrated scales; fp8_cast: with scales of 1.",
    ),
    Row(("--export_path", ""), "DST", "The directory to make."),
    Row(
        ("--cast_mxfp4_to_nvfp4", "--cast_mxfp4_to_nvfp4"), "", "Keep the weights of an MXFP4 checkpoint, bit for bit."
    ),
    Row(
        ("--dataset", "--calib_dataset"),
        "FILE|ID,...",
        "Text files, .jsonl files or Hub datasets, to calibrate activations on; commas between several.",
    ),
    Row(
        ("--calib_size", "--calib"),
        "N,...",
        "At most N samples: one N, or one a dataset with commas between; the last holds for those left.",
    ),
    Row(("--calib_seq", "--calib_seq"), "N", "At most N tokens of a sample."),
    Row(("--batch_size", "--calib_batch_size"), "N", "Samples of a batch; 0: as many as fit."),
    Row(("--device", ""), "NAME", "cpu, cuda:N, cuda: one GPU or as many as the weights need, or auto."),
    Row(
        ("--use_seq_device_map", "--use_seq_device_map"),
        "",
        "Fill one GPU after the other, where the model needs several, instead of all alike.",
    ),
    Row(
        ("--gpu_max_mem_percentage", "--gpu_max_mem_percentage"),
        "SHARE",
        "Of each GPU's free memory, for weights; above 0, at most 1.",
    ),
    Row(("--trust_remote_code", "--trust_remote_code"), "", "Run the model code in the checkpoint."),
    Row(
        ("--low_memory_mode", "--low_memory_mode"),
        "",
        "Hold the weights of one decoder layer at a time: read to calibrate it, and once more, expert by expert, to "
        "export it. The result is the same.",
    ),
    Row(("--attn_implementation", ""), "NAME", "The attention that transformers runs, such as eager."),
    Row(
        ("--verbose, --no-verbose", "--no-verbose"),
        "",
        "--verbose: say each step; --no-verbose: only where the result was written, and what was lost.",
    ),
    Row(("--skip_generate", ""), "", "Accepted; changes nothing: no text is generated here."),
    Row(
        ("--export_fmt", ""),
        "hf",
        "Accepted as hf, which is what is written.",
        "a Hugging Face directory is written, which TensorRT-LLM reads, too; drop the option, or pass hf.",
        "hf",
    ),
    Row(("--inference_tensor_parallel", "--tp"), "N", _PARALLEL),
    Row(("--inference_pipeline_parallel", "--pp"), "N", _PARALLEL),
    Row(
        ("--sparsity_fmt", "--sparsity"),
        "dense",
        "Accepted as dense: weights are not made sparse.",
        "weights are not made sparse here; drop the option, or pass dense.",
        "dense",
    ),
    Row(("", "--tasks"), "quant", "Accepted as quant, which is what is done.", _NO_EVAL, "quant"),
    Row(("--recipe", "--recipe"), refusal="recipes are not read; choose a format with --qformat (--quant)."),
    Row(
        ("--awq_block_size", "--awq_block_size"),
        refusal="no AWQ here; NVFP4 blocks always have 16 values, so drop it.",
    ),
    Row(
        ("--auto_quantize_bits", "--auto_quantize_bits"),
        refusal=_SEARCH,
    ),
    Row(("--auto_quantize_method", "--auto_quantize_method"), refusal=_SEARCH),
    Row(("--auto_quantize_score_size", "--auto_quantize_score_size"), refusal=_SEARCH),
    Row(("--auto_quantize_checkpoint", "--auto_quantize_checkpoint"), refusal=_SEARCH),
    Row(
        ("--moe_calib_experts_ratio", "--moe_calib_experts_ratio"),
        refusal="the model's own router chooses the experts that a token runs through; drop it, and raise --calib_size "
        "to reach more experts.",
    ),
    Row(
        ("--calib_with_images", "--calib_with_images"),
        refusal="vision towers stay as they are; calibrate on text, with --dataset.",
    ),
    Row(
        ("--specdec_offline_dataset", ""),
        refusal="draft models are not calibrated on stored hidden states; calibrate on text, with --dataset.",
    ),
    Row(
        ("--vllm_fakequant_export", ""),
        refusal="what is exported is packed NVFP4, not a simulation; serve the exported directory "
        "with an engine that the report names.",
    ),
    *(
        Row((name, shell), refusal=_GPUS_ALONE)
        for name, shell in (
            ("--use_fsdp2", ""),
            ("--cpu_offload", ""),
            ("--offload_folder", ""),
            ("--max_cpu_memory_gb", ""),
            ("--max_gpu_memory_gb", ""),
        )
    ),
    *(Row((name, ""), refusal=_TRACKING) for name in ("--mlflow", "--mlflow_experiment", "--mlflow_run_name")),
    *(
        Row(("", name), refusal=_NO_EVAL)
        for name in ("--lm_eval_tasks", "--lm_eval_limit", "--simple_eval_tasks", "--simple_eval_limit", "--mmlu_limit")
    ),
    *(
        Row(("", name), refusal=_NO_SERVER)
        for name in ("--input", "--output", "--batch", "--kv_cache_free_gpu_memory_fraction")
    ),
    Row(("", "--vlm"), refusal="no image is run here; drop it: the language model is quantized, vision stays."),
)


def meaning(name: str) -> str:
    """What an accepted option of `hf_ptq.py` does, for its help."""
    return next(row.meaning for row in ROWS if name in row.names[0].split(", "))


def refusal(name: str, value: str | None, entry: int = 0) -> str | None:
    """The sentence that refuses an option with this value in an entry (0: Python, 1: shell); None if it is accepted."""
    for row in ROWS:
        if name in row.names[entry].split(", ") and row.refusal and (not row.only or value not in (row.only, None)):
            return f"{name}{f' {value}' * bool(row.only)}: {row.refusal}"
    return None


class PtqCommand(Helped):
    """`fp4cast ptq`: refuses what the original has and this has not."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse before anything else is looked at, so that a missing option does not hide it."""
        if sentence := _refused(args):
            exit_with(UsageError(sentence), "--json" in args, 2)
        return super().parse_args(ctx, args)


def _refused(args: Sequence[str]) -> str | None:
    """What refuses the first refused option of a command line; None if none is."""
    for position, word in enumerate(args):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = args[position + 1] if position + 1 < len(args) else None
            if sentence := refusal(f"--{name[2:].replace('-', '_')}", value if equals else following):
                return sentence
    return None
