"""Cast while loading: `vllm serve openai/gpt-oss-20b --quantization fp4cast` reads MXFP4 and computes in NVFP4.

vLLM's own MXFP4 loader fills MXFP4 parameters; before the kernel's preparation they are cast on their device, by the
tight rule. Codes stay where no half-block needs a shift, and no file is written. What cannot be exact is refused.

Which checkpoints: gpt-oss (`banks`), and what compressed-tensors writes as `mxfp4-pack-quantized` (`compressed`).
vLLM takes Kimi-K3 and DeepSeek-V4 to classes of their models' own, so these two are refused.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from fp4cast.errors import UsageError
from fp4cast.vllm.experts import subclass
from fp4cast.vllm.on_load import banks, compressed

__all__ = ["config_class", "register_method"]

NAME = "fp4cast"
_LAYERS = "vllm.model_executor.layers"
_OWN_CLASSES = ("kimi_k3", "deepseek_v4")  # by the start of their model_type


def register_method() -> None:
    """Add `--quantization fp4cast` through vLLM's own registry; harmless when repeated."""
    quantization = importlib.import_module(f"{_LAYERS}.quantization")
    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(config_class())


@cache
def config_class() -> type:
    """The class of `--quantization fp4cast`."""
    compressed.config_class()  # where vLLM is not as expected, this is the time to say so
    mxfp4 = importlib.import_module(f"{_LAYERS}.quantization.mxfp4")
    return subclass(
        "Fp4castConfig", CastConfig, subclass("CastBanksConfig", banks.BanksConfig, mxfp4.GptOssMxfp4Config)
    )


class CastConfig:
    """What `--quantization fp4cast` takes; for gpt-oss it is the config itself."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the checkpoint where the user asked for it; raise where it is none that can be cast while loading."""
        if user_quant != NAME:
            return None
        config, kind = hf_quant_cfg or {}, str(getattr(hf_config, "model_type", None))
        method = config.get("quant_method")
        banks_ = kind == "gpt_oss" and method in ("mxfp4", "gpt_oss_mxfp4")
        if not banks_ and (kind.startswith(_OWN_CLASSES) or not compressed.can_cast(config)):
            raise UsageError(
                f"--quantization {NAME} casts MXFP4 gpt-oss and `mxfp4-pack-quantized` of compressed-tensors while "
                f"it is loaded; this is {kind!r} with quant_method {method!r}. `fp4cast convert` casts other families; "
                "serve its result without --quantization."
            )
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The config of the checkpoint's kind."""
        if config.get("quant_method") == "compressed-tensors":
            return compressed.config_class().from_config(config)
        return cls()
