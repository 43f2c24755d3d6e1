"""NVFP4 on tensors of torch: fake quantization, and quantization into packed codes; on a GPU by Triton (extra `ptq`).

The functions choose by where the tensor is; `reference` (torch) and `gpu` (Triton) have the same signatures and give
the same bits. A block's scale is that of ModelOpt's exporter, in FP32 and in this order:

    s = E4M3(clamp((amax / 6) * 448 / (global_amax / 6), 2^-9, 448)),    S = global_amax / (6 * 448)

where an amax of 0 counts as 6, and a global amax of 0 as 6 * 448. A value x becomes E2M1(x / (s * S)) * (s * S), ties
to the even code.
"""

from __future__ import annotations

from fp4cast.extras import require

require("torch", "ptq")

from fp4cast.kernels.dispatch import (  # noqa: E402
    dynamic_fp4_fake_quant,
    quantize_nvfp4,
    static_blockwise_fp4_fake_quant,
)

__all__ = ["dynamic_fp4_fake_quant", "quantize_nvfp4", "static_blockwise_fp4_fake_quant"]
