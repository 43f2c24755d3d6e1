"""NVIDIA ModelOpt's MXFP4: named as its NVFP4, but for the dtype of the scales.

Exports of nvidia-modelopt 0.47 (torch/export/quant_utils.py: `to_quantized_weight`, `get_weight_scaling_factor`), which
calls the algorithm `mxfp4` or `W4A8_MXFP4_FP8`; a block of zeros gets the byte 0. Older versions wrote
hf_quant_config.json alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fp4cast.checkpoints.directory import QUANT_CONFIG, Checkpoint
from fp4cast.checkpoints.json_files import read_json
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.family import Family
from fp4cast.families.quark import CODES, SCALES

_ALGORITHMS = ("MXFP4", "W4A8_MXFP4_FP8")


def _described(checkpoint: Checkpoint) -> bool:
    """Whether config.json, or hf_quant_config.json where that says nothing, names MXFP4."""
    section: object = find_quantization_config(checkpoint.config).section
    if not section and (checkpoint.path / QUANT_CONFIG).is_file():
        section = read_json(checkpoint.path / QUANT_CONFIG).get("quantization")
    return names_mxfp4(section)


def names_mxfp4(section: object) -> bool:
    """Whether a quantization_config, or the `quantization` of an hf_quant_config.json, names MXFP4 as an algorithm."""
    return isinstance(section, dict) and any(algorithm.upper() in _ALGORITHMS for algorithm in _algorithms(section))


def _algorithms(section: Mapping[str, Any]) -> Iterator[str]:
    yield str(section.get("quant_algo"))
    layers = section.get("quantized_layers")
    for layer in layers.values() if isinstance(layers, dict) else ():
        yield str(layer.get("quant_algo")) if isinstance(layer, dict) else ""


MODELOPT = Family(
    name="modelopt-mxfp4",
    title="ModelOpt MXFP4",
    codes=CODES,
    scales=SCALES,
    layouts=("modelopt",),
    described=_described,
    known_as="compressed-tensors",
)
