"""Read a checkpoint's tensors as parameters of transformers modules: dequantized, renamed, lists of experts stacked.

transformers' own renamings and conversions say which tensors make which parameter; this module computes the values, so
that one layer can be read alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.errors import MissingExtraError, UnsupportedError
from fp4cast.extras import require
from fp4cast.families.family import Pair
from fp4cast.formats import E2M1, E8M0_BIAS, MX_BLOCK

_FP8_SCALES = (".scale", ".weight_scale_inv")
_FP8_BLOCK = 128  # rows and columns that share a scale, unless the config says otherwise


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a parameter: its name, and the pattern of transformers' conversion, if there is one."""

    name: str
    pattern: str | None


class Weights(ExitStack):
    """Reads parameters by the names that transformers gives them; files stay open until the context ends.

    Args:
        checkpoint: the directory.
        pairs: its MXFP4 tensors.
        model: a transformers model, on any device.
        device: where parameters are made.
    """

    def __init__(self, checkpoint: Checkpoint, pairs: Mapping[str, Pair], model: nn.Module, device: str) -> None:
        super().__init__()
        self.checkpoint, self.pairs, self.device = checkpoint, pairs, device
        self._files: dict[Path, Any] = {}
        self._parts, self._operations = _placed(list(self._names()), model)
        self._modules: dict[str, list[list[str]]] = {}

    def _names(self) -> Iterator[str]:
        """Names of weights, as if nothing were quantized."""
        parts = {tensor.name: pair for pair in self.pairs.values() for tensor in (pair.codes, pair.scales)}
        for name in self.checkpoint.tensors:
            if (pair := parts.get(name)) is not None:
                if name == pair.codes.name:
                    yield pair.module if pair.bank else f"{pair.module}.weight"
            elif not any(name.endswith(suffix) and self._is_fp8(name, suffix) for suffix in _FP8_SCALES):
                yield name

    def _is_fp8(self, scale: str, suffix: str) -> bool:
        weight = self.checkpoint.tensors.get(scale.removesuffix(suffix) + ".weight")
        return weight is not None and weight.dtype == "F8_E4M3"

    def modules(self, parameter: str) -> list[list[str]]:
        """The modules, as in `Pair`, that a parameter is made of, by expert; one list where there are no experts."""
        if parameter not in self._modules:
            experts = self._experts(parameter)
            self._modules[parameter] = [[name.removesuffix(".weight") for name in names] for names in experts]
        return self._modules[parameter]

    def _experts(self, parameter: str) -> list[list[str]]:
        """The names of a parameter's tensors by expert."""
        patterns: dict[str | None, list[str]] = defaultdict(list)
        for part in self._parts.get(parameter, []):
            patterns[part.pattern].append(part.name)
        return [list(names) for names in zip(*patterns.values(), strict=False)]

    def read(self, parameter: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Read one parameter.

        Raises:
            UnsupportedError: the checkpoint has nothing for it, or something of another shape.
        """
        parts = self._parts.get(parameter)
        if not parts:
            raise UnsupportedError(
                f"{self.checkpoint.path}: holds no tensor from which transformers makes {parameter}; it has "
                f"{', '.join(list(self.checkpoint.tensors)[:3])}, ..."
            )
        if parts[0].pattern is None:
            if len(parts) > 1:
                names = " and ".join(part.name for part in parts[:2])
                raise UnsupportedError(f"{self.checkpoint.path}: {names} are both {parameter}; expected one of them")
            found = self._value(parts[0].name, dtype)
            self._check_shape(parameter, found.shape, shape)
            return found
        self._check_operations(parameter, parts[0].pattern)
        experts = self._experts(parameter)
        bank = torch.empty(shape, dtype=dtype, device=self.device)
        for out, projections in zip(bank, experts, strict=False):
            value = torch.cat([self._value(name, dtype) for name in projections])
            self._check_shape(parameter, torch.Size([len(experts), *value.shape]), shape)
            out.copy_(value)
        return bank

    def rows(self, parameter: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Rows [N, K] of a parameter that is one tensor of the checkpoint: a projection, or one expert of a bank.

        Raises:
            UnsupportedError: the checkpoint has nothing for it, or several tensors.
        """
        parts = self._parts.get(parameter, [])
        if len(parts) != 1 or parts[0].pattern is not None:
            raise UnsupportedError(f"{self.checkpoint.path}: {len(parts)} tensors give {parameter}; expected one")
        name = parts[0].name
        pair = self.pairs.get(name.removesuffix(".weight"))
        if pair is not None and pair.bank:
            return self._expert(pair, expert, dtype)
        if pair is None and len(self.checkpoint.tensors[name].shape) == 3:
            return self._raw(name, expert).to(dtype).T
        return self._value(name, dtype)

    def _check_shape(self, parameter: str, found: torch.Size, expected: torch.Size) -> None:
        if found != expected:
            parts = self._parts[parameter]
            raise UnsupportedError(
                f"{self.checkpoint.path}: {parts[0].name} (of {len(parts)} tensors) gives {list(found)}, "
                f"the model expects {parameter} {list(expected)}"
            )

    def _check_operations(self, parameter: str, pattern: str) -> None:
        names = self._operations[pattern]
        if names not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            raise UnsupportedError(
                f"{self.checkpoint.path}: transformers makes {parameter} by {', '.join(names)}, which fp4cast does not "
                "support"
            )

    def _value(self, name: str, dtype: torch.dtype) -> Tensor:
        """A plain tensor, [N, K] of a projection, or a bank as the model holds it, [E, K, N]."""
        module = name.removesuffix(".weight")
        if (pair := self.pairs.get(module)) is not None:
            if not pair.bank:
                return self._mxfp4(self._raw(pair.codes.name), self._raw(pair.scales.name), pair.bias, dtype)
            experts, rows, columns = pair.shape
            bank = torch.empty(experts, columns, rows, dtype=dtype, device=self.device)
            for expert, out in enumerate(bank):
                out.copy_(self._expert(pair, expert, dtype).T)
            return bank
        raw = self._raw(name)
        scale = next((module + suffix for suffix in _FP8_SCALES if module + suffix in self.checkpoint.tensors), None)
        if raw.dtype == torch.float8_e4m3fn and scale is not None:
            return self._fp8(raw, self._raw(scale), dtype)
        if raw.dtype.itemsize == 1:
            raise UnsupportedError(
                f"{self.checkpoint.tensors[name]}: expected MXFP4, FP8 with scales, or plain numbers"
            )
        return raw.to(dtype)

    def _expert(self, pair: Pair, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert of a bank, [N, K]."""
        codes, scales = (self._raw(tensor.name, expert) for tensor in (pair.codes, pair.scales))
        return self._mxfp4(codes.flatten(1), scales, pair.bias, dtype)

    def _raw(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor as it is stored, or one expert of it."""
        path = self.checkpoint.tensors[name].path
        if path not in self._files:  # headers are long: each is parsed once
            self._files[path] = self.enter_context(safe_open(path, "pt"))
        file = self._files[path]
        found: Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return found.to(self.device)

    def _mxfp4(self, codes: Tensor, scales: Tensor, bias: int, dtype: torch.dtype) -> Tensor:
        """Packed codes [N, K/2] and E8M0 [N, K/32] as [N, K]: exact in BF16 and float32."""
        table = torch.tensor(E2M1.values, dtype=torch.float32, device=self.device)
        packed = codes.view(torch.uint8)
        values = table[torch.stack([packed & 15, packed >> 4], dim=-1).int()].reshape(*scales.shape, MX_BLOCK)
        return (values * _powers(scales, bias)[..., None]).to(dtype).flatten(-2)

    def _fp8(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """FP8 [N, K] with block scales as [N, K]."""
        rows, columns = find_quantization_config(self.checkpoint.config).section.get("weight_block_size") or (
            _FP8_BLOCK,
            _FP8_BLOCK,
        )
        if scales.dtype not in (torch.float32, torch.float8_e8m0fnu):
            raise UnsupportedError(f"{self.checkpoint.path}: FP8 scales of {scales.dtype}; expected F32 or F8_E8M0")
        steps = scales if scales.dtype == torch.float32 else _powers(scales, E8M0_BIAS)
        steps = steps.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return (weight.float() * steps).to(dtype)


def _powers(exponents: Tensor, bias: int) -> Tensor:
    """2^(byte - bias) of E8M0, float32."""
    k = exponents.view(torch.uint8).int() - bias
    return torch.ldexp(torch.ones_like(k, dtype=torch.float32), k)


def _placed(names: Sequence[str], model: nn.Module) -> tuple[dict[str, list[_Tensor]], dict[str, list[str]]]:
    """(tensors of every parameter in transformers' order, names of a conversion's operations by its patterns)."""
    loader: Any = require("transformers.core_model_loading", "ptq")
    mapping: Any = require("transformers.conversion_mapping", "ptq")
    try:
        conversions = mapping.get_model_conversion_mapping(model)
        converters = [each for each in conversions if isinstance(each, loader.WeightConverter)]
        renamings = [each for each in conversions if isinstance(each, loader.WeightRenaming)]
        known = model.state_dict()
        parts: dict[str, list[_Tensor]] = defaultdict(list)
        for name in sorted(names, key=loader.dot_natural_key):
            parameter, pattern = loader.rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if parameter not in known and name in known:
                parameter, pattern = name, None
            parts[parameter].append(_Tensor(name, pattern))
    except (AttributeError, TypeError) as error:
        raise MissingExtraError(
            f"fp4cast calibrate needs the loader of transformers 5.17 to 5.23: pip install transformers==5.23 ({error})"
        ) from error
    operations = {p: [type(o).__name__ for o in c.operations] for c in converters for p in c.source_patterns}
    order = {pattern: i for i, pattern in enumerate(operations)}
    for group in parts.values():  # as the conversion names them: gate before up
        group.sort(key=lambda part: order.get(part.pattern or "", -1))
    return dict(parts), operations
