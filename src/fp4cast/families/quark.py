"""AMD Quark: dense models and mixtures of experts, one projection a tensor, named as ModelOpt names NVFP4.

Exports of amd-quark 0.13 (torch/export/nn/modules/realquantizer.py: a byte is log2 of the scale plus 127;
torch/utils/pack.py: `Pack_fp4`, the even element in the low bits), and what vLLM reads:
model_executor/layers/quantization/quark/quark.py at 006bce4, `_is_w_ocp_mx_a_x`, and schemes/quark_ocp_mx.py at
039541c, `create_weights`. The older `dtype: "mx"` keeps scales and codes in one tensor and is none of this.
"""

from __future__ import annotations

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.family import Family, Suffix
from fp4cast.families.refused import quark_specs
from fp4cast.formats import MX_BLOCK

CODES = Suffix(".weight", ("U8",))
SCALES = Suffix(".weight_scale", ("U8", "F8_E8M0"))

_MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": MX_BLOCK, "scale_format": "e8m0"}


def _described(checkpoint: Checkpoint) -> bool:
    """Whether the model, or some layers of it, are MXFP4."""
    if find_quantization_config(checkpoint.config).section.get("quant_method") != "quark":
        return False
    return any(spec.items() >= _MXFP4.items() for spec in quark_specs(checkpoint.config))


QUARK = Family(
    name="quark",
    title="AMD Quark",
    codes=CODES,
    scales=SCALES,
    layouts=("modelopt",),
    described=_described,
    known_as="compressed-tensors",
)
