"""The quantization_config of the ModelOpt layout, as transformers holds it while a model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4cast.errors import CheckpointError, UnsupportedError
from fp4cast.formats import NV_BLOCK
from fp4cast.layouts.engine_view import read_claims
from fp4cast.layouts.fp8 import ALGORITHM

METHODS = ("modelopt", "modelopt_mixed")


class ModelOptNvfp4Config(QuantizationConfigMixin):
    """A quantization_config that has been checked.

    Attributes:
        quant_method: one of `METHODS`.
        dequantize: True, which makes transformers drop the config once the weights are loaded.
        claims: which modules are NVFP4, by the names that they have in the checkpoint.
    """

    dequantize = True

    def __init__(self, **section: Any) -> None:
        """Check the entries of config.json's quantization_config.

        Raises:
            CheckpointError: an entry is malformed.
            UnsupportedError: it describes no NVFP4 checkpoint of a layout that fp4cast writes.
        """
        _check(section)
        self.claims = read_claims({"quantization_config": section})
        self.quant_method = section["quant_method"]
        self._section = copy.deepcopy(section)

    def to_dict(self) -> dict[str, Any]:
        """The entries, as config.json holds them."""
        return copy.deepcopy(self._section)


def _check(section: Mapping[str, Any]) -> None:
    """Check the entries that `read_claims` accepts unchecked or ignores."""
    ignore = section.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        raise _fault("ignore", ignore, "a list of names")
    _check_group(section, "group_size")
    for table in ("quantized_layers", "config_groups"):
        entries = section.get(table, {})
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise _fault(table, entries, "an object of objects")
        for name, entry in entries.items():
            if entry.get("quant_algo") == ALGORITHM:
                raise UnsupportedError(f"quantization_config: {table}.{name} is {ALGORITHM}, FP8 that is not read here")
            _check_group(entry, "group_size", f"{table}.{name}.")
    for name, group in section.get("config_groups", {}).items():
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("num_bits", 4) != 4:
            raise _fault(f"config_groups.{name}.weights", weights, "an object with num_bits 4")
        _check_group(weights, "group_size", f"config_groups.{name}.weights.")


def _check_group(entries: Mapping[str, Any], key: str, at: str = "") -> None:
    size = entries.get(key, NV_BLOCK)
    if type(size) is not int or size != NV_BLOCK:
        raise _fault(at + key, size, str(NV_BLOCK))


def _fault(key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"quantization_config: {key} is {str(found)[:200]!r}, expected {expected}")
