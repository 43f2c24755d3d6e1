"""A checkpoint's tensors as the parameters of transformers' modules: MXFP4 dequantized, lists of experts stacked."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from fp4cast.checkpoint import Checkpoint
from fp4cast.errors import UnsupportedError
from fp4cast.formats import E2M1
from fp4cast.sources import UNQUANTIZED, Pair

__all__ = ["Weights", "expert_leaves"]

_BANK = re.compile(r"(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)")
_LEAVES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def expert_leaves(name: str, modules: Mapping[str, object]) -> tuple[str, tuple[str, ...]] | None:
    """(prefix, projections) of a parameter [E, N, K] that a checkpoint stores as `<prefix>.<e>.<projection>`."""
    if (found := _BANK.fullmatch(name)) is None:
        return None
    for leaves in _LEAVES[found["leaf"]]:
        if f"{found['experts']}.0.{leaves[0]}" in modules:
            return found["experts"], leaves
    return None


class Weights:
    """Reads parameters by the names that transformers gives them.

    Args:
        checkpoint: the directory.
        pairs: its MXFP4 tensors.
        device: where parameters are made.
    """

    def __init__(self, checkpoint: Checkpoint, pairs: Mapping[str, Pair], device: str) -> None:
        self.checkpoint, self.pairs, self.device = checkpoint, pairs, device

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One parameter.

        Raises:
            UnsupportedError: the checkpoint has no such tensor, or one of another shape.
        """
        found = self._find(name, shape, dtype)
        if found.shape != shape:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {name} has shape {list(found.shape)}, the model expects {list(shape)}"
            )
        return found

    def _find(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if (pair := self.pairs.get(name)) is not None:  # a bank [E, N, K], which the model holds as [E, K, N]
            bank = torch.empty(shape[0], shape[2], shape[1], dtype=dtype, device=self.device)
            codes, scales = self._raw(pair.codes.name), self._raw(pair.scales.name)
            for expert in range(shape[0]):
                bank[expert] = self._dequantize(codes[expert].flatten(1), scales[expert], pair.bias, dtype)
            return bank.transpose(1, 2).contiguous()
        module = name.removesuffix(".weight")
        if name in self.checkpoint.tensors or (module != name and module in self.pairs):
            return self._projection(module, dtype)
        leaves = expert_leaves(name, self._modules())
        if leaves is None:
            raise UnsupportedError(
                f"{self.checkpoint.path}: holds nothing that gives the model's {name}; layer by layer, only "
                "checkpoints under transformers' own names can be run. fp4cast ptq loads the whole model instead."
            )
        prefix, projections = leaves
        bank = torch.empty(shape, dtype=dtype, device=self.device)
        for expert in range(shape[0]):
            bank[expert] = torch.cat([self._projection(f"{prefix}.{expert}.{leaf}", dtype) for leaf in projections])
        return bank

    def _modules(self) -> dict[str, object]:
        return {name.removesuffix(".weight"): None for name in self.checkpoint.tensors} | dict(self.pairs)

    def _projection(self, module: str, dtype: torch.dtype) -> Tensor:
        """[N, K] of one module, or any plain tensor."""
        if (pair := self.pairs.get(module)) is not None:
            codes, scales = self._raw(pair.codes.name), self._raw(pair.scales.name)
            return self._dequantize(codes, scales, pair.bias, dtype)
        names = [name for name in (f"{module}.weight", module) if name in self.checkpoint.tensors]
        if not names or self.checkpoint.tensors[names[0]].dtype not in UNQUANTIZED:
            what = self.checkpoint.tensors[names[0]] if names else f"no {module}.weight"
            raise UnsupportedError(f"{self.checkpoint.path}: found {what}; expected MXFP4 or a floating-point weight")
        return self._raw(names[0]).to(dtype)

    def _raw(self, name: str) -> Tensor:
        with safe_open(self.checkpoint.tensors[name].path, "pt", device=self.device) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def _dequantize(self, codes: Tensor, scales: Tensor, bias: int, dtype: torch.dtype) -> Tensor:
        """Packed codes [N, K/2] and E8M0 [N, K/32] as [N, K]: exact in BF16 and float32."""
        table = torch.tensor(E2M1.values, dtype=torch.float32, device=self.device)
        packed = codes.view(torch.uint8)
        values = table[torch.stack([packed & 15, packed >> 4], dim=-1).int()].reshape(*scales.shape, 32)
        exponents = scales.view(torch.uint8).int() - bias
        steps = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        return (values * steps[..., None]).to(dtype).flatten(-2)
