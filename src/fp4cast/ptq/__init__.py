"""Quantize a model in memory (extra `ptq`). Knows models and quantizers; the rooms of `convert` cast and write."""

from __future__ import annotations

from fp4cast import _require_torch  # noqa: F401
from fp4cast.ptq.amax import (
    Amax,
    AmaxFacts,
    compute_amax_for_mxfp4,
    compute_global_amax_for_scales,
    compute_per_block_amax_for_mxfp4,
    quantizer_name_from_blocks_key,
)
from fp4cast.ptq.attention import attach_kv_cache
from fp4cast.ptq.cast import apply_to_model, build_amax_map
from fp4cast.ptq.export import export
from fp4cast.ptq.exported import Exported
from fp4cast.ptq.flow import Quantized, quantize
from fp4cast.ptq.headroom import Headroom
from fp4cast.ptq.max_calibration import max_calibrate, set_expert_quantizer_amax
from fp4cast.ptq.modules import attach
from fp4cast.ptq.options import Options
from fp4cast.ptq.qformats import QFORMATS, QFormat, find_qformat
from fp4cast.ptq.quantizer import (
    NVFP4StaticQuantizer,
    TensorQuantizer,
    promote_nvfp4_static_quantizers,
)

__all__ = [
    "QFORMATS",
    "Amax",
    "AmaxFacts",
    "Exported",
    "Headroom",
    "NVFP4StaticQuantizer",
    "Options",
    "QFormat",
    "Quantized",
    "TensorQuantizer",
    "apply_to_model",
    "attach",
    "attach_kv_cache",
    "build_amax_map",
    "compute_amax_for_mxfp4",
    "compute_global_amax_for_scales",
    "compute_per_block_amax_for_mxfp4",
    "export",
    "find_qformat",
    "max_calibrate",
    "promote_nvfp4_static_quantizers",
    "quantize",
    "quantizer_name_from_blocks_key",
    "set_expert_quantizer_amax",
]
