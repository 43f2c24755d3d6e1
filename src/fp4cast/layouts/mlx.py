"""MLX's nvfp4: names, shapes and the config of a checkpoint that mlx-lm loads. It has no tensor scale.

Codes `X.weight` are words of eight, U32 [.., K/8], of the same bytes in both modes; `X.scales` U8 hold E8M0 [.., K/32]
of mxfp4, or E4M3 [.., K/16] of nvfp4. Run: mlx 0.32.4 on a CPU, all codes under all scales (tests/oracles/test_mlx.py).
Its `quantize` takes a global scale, but no layer does (mlx/nn/layers/quantized.py: QuantizedLinear), and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MLX = "mlx"  # the value of `--layout`
SECTIONS = ("quantization", "quantization_config")  # mlx-lm writes the same into both
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
CODES, SCALES = ".weight", ".scales"
SERVED = "mlx 0.32.4 and mlx-lm 0.32.2 (run, on a CPU)"


def mode_of(config: Mapping[str, Any], module: str) -> str:
    """The mode that a config says of a module, as mlx-lm reads it; affine where it names none, empty without any."""
    section = config.get(SECTIONS[0])
    if not isinstance(section, Mapping):
        return ""
    entry = section.get(module, section)
    return str(entry.get("mode", "affine")) if isinstance(entry, Mapping) else ""


def nvfp4_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose mxfp4 entries, for all modules or for one, say nvfp4."""
    changed = dict(config)
    for key in SECTIONS:
        section = changed.get(key)
        if isinstance(section, Mapping):
            entries = {name: _entry(value) for name, value in section.items()}
            changed[key] = entries | (NVFP4 if section.get("mode") == "mxfp4" else {})
    return changed


def _entry(value: Any) -> Any:
    return value | NVFP4 if isinstance(value, dict) and value.get("mode") == "mxfp4" else value
