"""The options of `quantize`, and which of them contradict each other with any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4cast.casting.inexact import check_inexact
from fp4cast.conversion.input_scales import ScalesPer
from fp4cast.errors import UsageError
from fp4cast.layouts.choose import find_layout
from fp4cast.layouts.kv_cache import find_kv_cache
from fp4cast.ptq.data import check_counts
from fp4cast.ptq.headroom import Headroom
from fp4cast.ptq.qformats import find_qformat

_FOR_INPUT_SCALES = ("act_headroom", "input_scales_per")
_FOR_ACTIVATIONS = ("dataset", "calib_size", "calib_seq", "batch_size", *_FOR_INPUT_SCALES)
_WAYS_OUT = "needs text to run the model on. Pass --dataset FILE (text or .jsonl, or a Hub dataset), or use"


@dataclass(frozen=True)
class Options:
    """The options of `quantize`, under the names of ModelOpt's script.

    Attributes:
        pyt_ckpt_path: the model: a directory, or a Hugging Face model id.
        export_path: the directory to make.
        qformat: a name in `QFORMATS`.
        cast_mxfp4_to_nvfp4: keep the weights of an MXFP4 checkpoint bit for bit instead of requantizing them.
        dataset: for W4A4: text or .jsonl files, or Hub datasets, to calibrate activations on; a list, or with commas.
        calib_size: samples at most, one number for each dataset (the last holds for those left); None for 512.
        calib_seq: tokens of a sample at most; None for 512.
        batch_size: samples that run together; 0 for as many as fit.
        device: "cpu", "cuda:N", "cuda" for one GPU or as many as the weights need, or "auto": "cuda" if there is one.
        use_seq_device_map: fill one GPU after the other, where the model needs several, instead of all alike.
        gpu_max_mem_percentage: of each GPU's free memory, for weights; in (0, 1].
        layout: "modelopt", or "compressed-tensors" for models without batched experts.
        inexact: "fail" or "nearest", for weights that no tensor scale keeps exact.
        overwrite: replace an existing `export_path`, once the new one is complete.
        trust_remote_code: run the model code in the checkpoint.
        jobs: threads that write; None for one a core.
        attn_implementation: the attention that transformers runs; None for the model's own.
        kv_cache_qformat: "none", "fp8" for a KV cache in FP8 with calibrated scales, or "fp8_cast" with scales of 1.
        act_headroom: the rule for the amax of activations; None for their largest magnitude.
        input_scales_per: "bank" or "expert", as in `attach`; None for ModelOpt's choice.
        low_memory_mode: hold the weights of one decoder layer at a time.
    """

    pyt_ckpt_path: str | Path
    export_path: str | Path
    qformat: str
    cast_mxfp4_to_nvfp4: bool = False
    dataset: str | Sequence[str] | None = None
    calib_size: int | Sequence[int] | None = None
    calib_seq: int | None = None
    batch_size: int = 0
    device: str = "auto"
    use_seq_device_map: bool = False
    gpu_max_mem_percentage: float = 0.8
    layout: str = "modelopt"
    inexact: str = "fail"
    overwrite: bool = False
    trust_remote_code: bool = False
    jobs: int | None = None
    attn_implementation: str | None = None
    kv_cache_qformat: str = "none"
    act_headroom: Headroom | None = None
    input_scales_per: ScalesPer | None = None
    low_memory_mode: bool = False


def check_options(options: Options) -> None:
    """Raise for options that contradict each other with any checkpoint."""
    qformat = find_qformat(options.qformat, options.cast_mxfp4_to_nvfp4)
    find_layout(options.layout)
    check_inexact(options.inexact)
    if not 0 < options.gpu_max_mem_percentage <= 1:
        raise UsageError(
            f"--gpu_max_mem_percentage {options.gpu_max_mem_percentage}: expected a share, above 0, at most 1"
        )
    if options.inexact == "nearest" and not options.cast_mxfp4_to_nvfp4:
        raise UsageError("--inexact nearest belongs to --cast_mxfp4_to_nvfp4: without it every weight is rounded")
    check_counts(options.calib_size, options.calib_seq, options.batch_size)
    cache = find_kv_cache(options.kv_cache_qformat)
    if qformat.activations == "w4a4" and not options.dataset:
        raise UsageError(f"{qformat.name} quantizes activations, which {_WAYS_OUT} --qformat w4a16_nvfp4.")
    if cache == "fp8" and not options.dataset:
        raise UsageError(f"--kv_cache_qformat fp8 {_WAYS_OUT} --kv_cache_qformat fp8_cast.")
    unused = _FOR_ACTIVATIONS if cache != "fp8" else _FOR_INPUT_SCALES
    given = [f"--{name}" for name in unused if getattr(options, name)]
    if qformat.activations == "w4a16" and given:
        raise UsageError(f"{qformat.name} quantizes no activations: nothing is calibrated, so drop {', '.join(given)}")
