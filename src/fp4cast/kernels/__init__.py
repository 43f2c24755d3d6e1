"""NVFP4 on torch tensors: fake quantization, and packed codes. Knows tensors and devices, but no model and no file.

The tensor's device selects the kernels; `reference` (torch) and `gpu` (Triton) have the same signatures and give the
same bits. A block's scale follows ModelOpt's exporter, in FP32 and in the order that is written here, which decides
ties:

    S = global_amax / (6 * 448)
    s = E4M3(clamp((amax / 6) * 448 / (global_amax / 6), 2^-9, 448))    where an amax is given; 0 counts as 6
    s = E4M3(clamp(amax / (6 * S), 2^-9, 448))                          where it is the block's own; 1 if that is 0

A global amax of 0 counts as 6 * 448. A value x becomes E2M1(x / (s * S)) * (s * S), ties to the even code.
"""

from __future__ import annotations

from fp4cast import _require_torch  # noqa: F401
from fp4cast.kernels.dispatch import (
    dynamic_fp4_fake_quant,
    quantize_nvfp4,
    static_blockwise_fp4_fake_quant,
)

__all__ = ["dynamic_fp4_fake_quant", "quantize_nvfp4", "static_blockwise_fp4_fake_quant"]
