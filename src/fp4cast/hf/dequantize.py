"""Dequantize NVFP4 tensors while transformers loads them: E2M1 * E4M3 * S in float32, then rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from fp4cast.errors import CheckpointError
from fp4cast.formats import E2M1, NV_BLOCK_BYTES
from fp4cast.layouts.layout import Names

_PIECE = 1 << 20  # bytes of codes that are decoded at once, so that float32 values stay small beside the weight


def dequantize(codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize an NVFP4 matrix, or a bank of experts with the output channel last, on its device.

    Args:
        codes: packed uint8 [N, K/2], or a bank [E, K/2, N]; low nibble first.
        block_scales: float8_e4m3fn [N, K/16], or [E, K/16, N].
        tensor_scale: S, float32 [].
        dtype: the result's.

    Returns:
        [N, K], or [E, K, N]. Exact in float32 if S is a power of two, else rounded once; then rounded to dtype.
    """
    result = torch.empty((codes.shape[0], 2 * codes.shape[1], *codes.shape[2:]), dtype=dtype, device=codes.device)
    working = torch.promote_types(dtype, torch.float32)
    table, scale = torch.from_numpy(E2M1.values.copy()).to(codes.device, working), tensor_scale.to(working)
    if codes.ndim == 3:  # blocks run along axis 1 of 3, and an expert is a number of them
        axis, n = 1, codes.shape[2]
        whole = (
            codes.reshape(-1, NV_BLOCK_BYTES, n),
            block_scales.reshape(-1, 1, n),
            result.view(-1, NV_BLOCK_BYTES, 2, n),
        )
    else:
        axis, n = 2, codes.shape[0]
        whole = (
            codes.reshape(n, -1, NV_BLOCK_BYTES),
            block_scales.unsqueeze(axis),
            result.view(n, -1, NV_BLOCK_BYTES, 2),
        )
    rows = max(1, _PIECE // whole[0][0].numel())
    for packed, scales, pairs in zip(*(torch.split(each, rows) for each in whole), strict=True):
        step = scales.to(working)
        for half, nibbles in enumerate((packed & 0xF, packed >> 4)):
            values = table.index_select(0, nibbles.flatten().int()).view(nibbles.shape)
            pairs.select(axis + 1, half).copy_(values.mul_(step).mul_(scale))  # code * E4M3 is exact: one rounding
    return result


class Dequantize(ConversionOps):
    """Turns the tensors collected for one parameter into weights; the operations of the model's own converter follow.

    Attributes:
        names: the source patterns by what they collect, one group for each source of the model's converter.
        faults: what is wrong with values, for all parameters of a model: transformers would log an error and go on.
        last: no operation follows.
        dtype: the parameter's; set when its first tensor is read.
    """

    supports_many_to_many = True

    def __init__(self, names: Sequence[Names], faults: list[str], last: bool) -> None:
        self.names, self.faults, self.last = tuple(names), faults, last
        self.dtype = torch.bfloat16

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantize:
        """A copy for another parameter, which shares the faults but not the dtype."""
        return Dequantize(self.names, self.faults, self.last)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """{pattern: tensors} -> {pattern of the codes: weights}; under the first target pattern if nothing follows."""
        del source_patterns
        parameter = str(kwargs.get("full_layer_name"))
        result = {
            target_patterns[0] if self.last else names.codes: self._weights(input_dict, names, parameter)
            for names in self.names
            if names.codes in input_dict
        }
        if input_dict:
            raise CheckpointError(f"{parameter}: expected weights, got only {sorted(input_dict)}")
        return result

    def _weights(self, collected: dict[str, list[Tensor]], names: Names, parameter: str) -> list[Tensor]:
        """The weights of one source pattern; those that are not quantized only change their dtype."""
        codes = collected.pop(names.codes)
        block_scales = collected.pop(names.block_scale, None)
        collected.pop(names.input_scale, None)
        if block_scales is None:
            return [tensor.to(self.dtype) for tensor in codes]
        tensor_scales = collected.pop(names.tensor_scale)
        weights = []
        for each in zip(codes, block_scales, tensor_scales, strict=True):
            self._check(*each[1:], parameter)
            weights.append(dequantize(*each, self.dtype))
        return weights

    def _check(self, block_scales: Tensor, tensor_scale: Tensor, parameter: str) -> None:
        if not bool(torch.isfinite(tensor_scale) & (tensor_scale > 0)):
            self.faults.append(f"{parameter}: a tensor scale is {tensor_scale.item()}, expected a positive number")
        if bool((block_scales.view(torch.uint8) & 0x7F == 0x7F).any()):
            self.faults.append(f"{parameter}: a block scale is NaN")
