"""Judge the configs: do they describe what the files hold, and the model that the source's config describes?

The plan of a conversion asks the same before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG
from fp4cast.checkpoints.header import UNQUANTIZED
from fp4cast.checkpoints.quantization_config import drop_quantization_configs, find_quantization_config
from fp4cast.errors import UnsupportedError
from fp4cast.families.family import Source
from fp4cast.families.modelopt import names_mxfp4
from fp4cast.layouts.engine_rules import Fault, Held, rule_faults
from fp4cast.layouts.engine_view import Claims, read_claims
from fp4cast.layouts.layout import Selection, Target


def config_faults(
    config: Mapping[str, Any],
    beside: Mapping[str, Any] | None,
    claims: Claims,
    source: Source,
    target: Target,
    selection: Selection,
) -> list[Fault]:
    """Everything that is wrong with the configs.

    Args:
        config: config.json.
        beside: hf_quant_config.json, or None where there is none.
        claims: config.json's.
        source: the MXFP4 checkpoint.
        target: the layout.
        selection: what is cast.
    """
    plain, others = _matrices(selection)
    found = list(_claimed(claims, selection.modules, plain, others))
    actual, expected = (claims.layout, claims.activations), (target.layout.name, target.activations)
    if actual != expected:
        found.append(Fault(CONFIG, f"describes {' '.join(actual)}, expected {' '.join(expected)}"))
    else:
        fp8 = {module: tensor.shape for module, tensor in selection.fp8.items()}
        held = Held(target.family, source.checkpoint.config, selection.modules, sorted(plain), sorted(others), fp8)
        found += rule_faults(config, beside, claims, held)
    if _without_quantization(config) != _without_quantization(source.checkpoint.config):
        found.append(Fault(CONFIG, "its entries other than the quantization differ from the source's"))
    return found


def original_faults(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None, source: Source, nvfp4: Mapping[str, Any]
) -> list[Fault]:
    """Everything that is wrong with the config of an MXFP4 checkpoint that was made from an NVFP4 one.

    Args:
        config: its config.json.
        beside: its hf_quant_config.json, which of MXFP4 checkpoints ModelOpt's alone have; None where there is none.
        source: the MXFP4 checkpoint.
        nvfp4: the config.json of the NVFP4 one.
    """
    section, found = find_quantization_config(config).section, list[Fault]()
    try:
        read_claims(config)
    except UnsupportedError:
        pass
    else:
        if section.get("format") != "mixed-precision":
            found.append(Fault(CONFIG, "describes an NVFP4 checkpoint, expected an MXFP4 one"))
    if beside is not None and not names_mxfp4(beside.get("quantization")):
        found.append(Fault(QUANT_CONFIG, "is there, but names no MXFP4; expected none"))
    if not section:
        found.append(Fault(CONFIG, f"has no quantization_config, expected that of {source.family.title}"))
    if _without_quantization(config) != _without_quantization(nvfp4):
        found.append(Fault(CONFIG, "its entries other than the quantization differ from the source's"))
    return found


def _matrices(selection: Selection) -> tuple[set[str], set[str]]:
    """The modules of the weight matrices that are not cast: those that are not quantized, and the others."""
    plain, others = set[str](), set[str]()
    for tensor in selection.untouched:
        if tensor.name.endswith((".weight", ".weight_packed")) and len(tensor.shape) >= 2:
            module = tensor.name.removesuffix(".weight").removesuffix(".weight_packed")
            (plain if tensor.dtype in UNQUANTIZED else others).add(module)
    return plain, others


def _claimed(claims: Claims, cast: Sequence[str], plain: set[str], others: set[str]) -> Iterator[Fault]:
    """Check that the config calls every cast module NVFP4, and no other."""
    # Patterns of their own, beside `ignore`, describe other quantized modules where there are other groups.
    kept = plain if claims.other_groups else plain | others
    claimed = claims.quantized([*cast, *kept])
    how = "`ignore` means {}" if claims.layers is None else "quantized_layers lacks {}"
    for module in sorted(set(cast) - claimed):
        yield Fault(CONFIG, f"{how.format(module)}, which holds MXFP4 codes in the source; expected it to be NVFP4")
    for module in sorted(kept & claimed):
        yield Fault(CONFIG, f"says that {module} is NVFP4, which was not cast")


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    drop_quantization_configs(copy)
    return copy
