"""What to do once transformers reads `modelopt` itself: hand over what it serves, and keep what it does not.

Read in its pull requests 48058 and 49015 (commit 1e8f147, quantizers/finegrained): it keeps NVFP4 packed on GPUs of
compute capability 8.9 and newer (base.py, `validate_environment`) and XPUs, refuses to dequantize it for CPUs and older
GPUs (nvfp4.py, `supports_dequantize`), and takes banks of experts as they lie in the file
(`_nvfp4_fused_conversions`), [E, N, K/2], where gpt-oss has [E, K/2, N].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4cast.hf.config import ModelOptNvfp4Config
from fp4cast.hf.quantizer import ModelOptNvfp4Quantizer

CAPABILITY = (8, 9)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EitherConfig:
    """Stands in transformers' table of configs, for theirs and ours.

    Attributes:
        theirs: transformers' own.
    """

    theirs: type[QuantizationConfigMixin]

    def from_dict(self, section: dict[str, Any], **kwargs: Any) -> Any:
        """The config of whoever reads this checkpoint on this machine."""
        reason = why_ours(section)
        _log.info("%s", f"fp4cast.hf reads the checkpoint: {reason}" if reason else "transformers reads the checkpoint")
        chosen: Any = ModelOptNvfp4Config if reason else self.theirs
        return chosen.from_dict(section, **kwargs)


@dataclass(frozen=True)
class EitherQuantizer:
    """Stands in transformers' table of quantizers, for theirs and ours.

    Attributes:
        theirs: transformers' own.
    """

    theirs: type[HfQuantizer]

    def __call__(self, config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        """The quantizer that belongs to a config."""
        return (ModelOptNvfp4Quantizer if isinstance(config, ModelOptNvfp4Config) else self.theirs)(config, **kwargs)


def why_ours(section: Mapping[str, Any]) -> str:
    """Why fp4cast reads a checkpoint that transformers could read; empty where transformers serves it.

    Args:
        section: the quantization_config.
    """
    if section.get("quant_algo") == "MIXED_PRECISION":
        return "it lists its NVFP4 layers (MIXED_PRECISION)"
    ignore = section.get("ignore")
    if any(str(entry).endswith(".mlp.router") for entry in (ignore if isinstance(ignore, list) else [])):
        return "its router is gpt-oss's, whose banks of experts have the output channel last"
    return (
        "" if _gpu() else "there is no GPU of compute capability 8.9 here, and transformers does not dequantize NVFP4"
    )


def _gpu() -> bool:
    """Whether transformers' own NVFP4 runs on this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= CAPABILITY
    return hasattr(torch, "xpu") and torch.xpu.is_available()
