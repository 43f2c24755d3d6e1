"""Load transformers models for quantization: MXFP4 experts as BF16."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.errors import CheckpointError, Fp4CastError, QuantizerError
from fp4cast.extras import require
from fp4cast.ptq.devices import Placement


@contextmanager
def explain_load_errors(path: Path, what: str) -> Iterator[None]:
    """Turn anything that transformers raises into a CheckpointError that names the checkpoint."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load the {what}: {error}") from error


@contextmanager
def explain_run_errors() -> Iterator[None]:
    """Turn anything that a running model raises, such as out of memory, into an error that says what to try."""
    try:
        yield
    except Fp4CastError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise QuantizerError(
            f"the model cannot be run on the calibration data: {error}. If memory is short, try a smaller --batch_size "
            "or --calib_seq, or ptq's --low_memory_mode, which holds one layer at a time."
        ) from error


def quantization_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of `from_pretrained` that make weights BF16."""
    transformers = require("transformers", "ptq")
    method = find_quantization_config(checkpoint.config).section.get("quant_method")
    if method == "mxfp4":
        return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    if method == "compressed-tensors":
        return {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    return {}


def _attention(name: str | None) -> dict[str, str]:
    """The argument that asks transformers for an attention; none leaves it to the model."""
    return {} if name is None else {"attn_implementation": name}


def empty_model(
    checkpoint: Checkpoint, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> nn.Module:
    """A checkpoint's model with parameters on the meta device, in the dtypes that `load_model` gives them.

    Raises:
        CheckpointError: transformers does not know the model.
    """
    transformers, accelerate = require("transformers", "ptq"), require("accelerate", "ptq")
    with explain_load_errors(checkpoint.path, "model"):
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        dtype = config.dtype if isinstance(getattr(config, "dtype", None), torch.dtype) else torch.bfloat16
        with accelerate.init_empty_weights(include_buffers=False):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                experts_implementation="eager",
                **_attention(attn_implementation),
            )
    strict = "|".join(rf"((^|\.){name}($|\.))" for name in model._keep_in_fp32_modules_strict or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if strict and re.search(strict, name) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def load_model(
    checkpoint: Checkpoint,
    placement: Placement,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Load a causal language model for inference, with its weights in BF16 (or the checkpoint's own dtype).

    Args:
        checkpoint: the model's.
        placement: a device, or what `place` found.
        trust_remote_code: run the model code in the checkpoint.
        attn_implementation: the attention that transformers runs; None for the model's own.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    transformers = require("transformers", "ptq")
    require("accelerate", "ptq")
    with explain_load_errors(checkpoint.path, "model"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype="auto",
            device_map=placement,
            trust_remote_code=trust_remote_code,
            **_attention(attn_implementation),
            **quantization_options(checkpoint),
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Load the checkpoint's tokenizer.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    transformers = require("transformers", "ptq")
    with explain_load_errors(checkpoint.path, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
