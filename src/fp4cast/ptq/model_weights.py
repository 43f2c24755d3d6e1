"""A model's quantized weights beside the tensors of the checkpoint that they were loaded from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch import nn

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.conversion.input_scales import InputScales
from fp4cast.errors import CheckpointError, QuantizerError, UnsupportedError
from fp4cast.families.recognise import FAMILIES, UNQUANTIZED, Pair, fused_group, read_source
from fp4cast.formats import NV_BLOCK, Bytes
from fp4cast.kernels import quantize_nvfp4
from fp4cast.kernels.reference import block_scales, own_block_scales, tensor_scale
from fp4cast.layouts.layout import Activations, Target, choose_target
from fp4cast.ptq.max_calibration import check_amax
from fp4cast.ptq.modules import input_quantizer, quantized_weights
from fp4cast.ptq.quantizer import TensorQuantizer
from fp4cast.verification.shard_check import usable

__all__ = ["Weight", "check_untouched", "held_weights", "input_amax", "matching_weights"]

_ROWS = {family.blocked: family for family in FAMILIES if family.name in ("gpt-oss", "compressed-tensors")}


@dataclass(frozen=True)
class Weight:
    """A quantized weight of a model.

    Attributes:
        module: its name in a checkpoint, as of `fp4cast.families.recognise.Pair`.
        rows: the weight, [N, K] or [E, N, K], blocks along the last axis; of any strides.
        quantizer: calibrated.
        input_scale: of what it is multiplied with, a float32 number; None for W4A16.
        replaces: the source's tensors: codes and scales where it is MXFP4, else the weight.
        pair: the source's MXFP4 tensor.
        target: how it is named and oriented.
    """

    module: str
    rows: torch.Tensor
    quantizer: TensorQuantizer
    input_scale: float | None
    replaces: tuple[Tensor, ...]
    pair: Pair | None
    target: Target

    @property
    def parts(self) -> int:
        """Experts of a bank: what is quantized at a time."""
        return self.rows.shape[0] if self.rows.ndim == 3 else 1

    @property
    def tensor_scale(self) -> float:
        """S, a float32 number."""
        return float(tensor_scale(self._top))

    @property
    def _top(self) -> torch.Tensor:
        found = self.quantizer.tensor_amax
        if found is None:  # as `held_weights` has seen
            raise QuantizerError(f"{self.module}: is not calibrated")
        return found

    def codes(self, part: int) -> Bytes:
        """Packed codes of one part as they are stored: uint8 [N, K/2], or [K/2, N]."""
        return self._stored(quantize_nvfp4(self._part(part), self._top, self._amax(part))[0])

    def block_scales(self, part: int) -> Bytes:
        """E4M3 block scales of one part as they are stored: uint8 [N, K/16], or [K/16, N]."""
        *_, lines, width = self.rows.shape
        amax = self._amax(part)
        if amax is None:
            amax = self._part(part).reshape(-1, NV_BLOCK).abs().amax(dim=1)
            scales = own_block_scales(amax, self._top)
        else:
            scales = block_scales(amax, self._top)
        return self._stored(scales.view(torch.uint8).reshape(lines, width // NV_BLOCK))

    def _part(self, part: int) -> torch.Tensor:
        return (self.rows[part] if self.rows.ndim == 3 else self.rows).contiguous()

    def _amax(self, part: int) -> torch.Tensor | None:
        """Block amax of one part, float32; None where the quantizer keeps none, and the weight's own counts."""
        if not self.quantizer.static or self.quantizer.amax is None:
            return None
        return self.quantizer.amax.reshape(self.parts, -1)[part]

    def _stored(self, x: torch.Tensor) -> Bytes:
        stored: Bytes = (x.transpose(-1, -2) if self.target.transposed else x).contiguous().cpu().numpy()
        return stored


def held_weights(model: nn.Module, checkpoint: Checkpoint, layout: str = "modelopt") -> list[Weight]:
    """The quantized weights of a calibrated model, checked against the checkpoint.

    Raises:
        QuantizerError: nothing is quantized, a quantizer is not calibrated, or a weight is not the checkpoint's.
        UnsupportedError: the checkpoint holds MXFP4 weights that the model does not quantize.
        UsageError: a weight has no such layout.
    """
    amax = input_amax(model)
    weights = matching_weights(model, checkpoint, layout)
    if amax and (missing := [weight for weight in weights if weight.module not in amax]):
        raise QuantizerError(
            f"{missing[0].module}: its input is not calibrated, but that of {len(amax)} others is; expected all (W4A4) "
            "or none"
        )
    for weight in weights:
        _check_calibrated(weight)
    scales = _shared_input_scales(amax)
    return [replace(weight, input_scale=scales.get(weight.module)) for weight in weights]


def matching_weights(model: nn.Module, checkpoint: Checkpoint, layout: str = "modelopt") -> list[Weight]:
    """The same of a model whose numbers do not matter yet: it may be on the meta device, and without input scales.

    Raises:
        QuantizerError: nothing is quantized, or a weight is not the checkpoint's, or not of whole blocks.
        UnsupportedError: the checkpoint holds MXFP4 weights that the model does not quantize.
        UsageError: a weight has no such layout.
    """
    found = list(quantized_weights(model))
    if not found:
        raise QuantizerError(f"{type(model).__name__}: no weight is quantized, so there is nothing to export")
    activations: Activations = "w4a4" if any(input_quantizer(model, name).is_enabled for name, *_ in found) else "w4a16"
    pairs = _mxfp4_pairs(checkpoint)
    weights = [_weight(checkpoint, pairs, layout, activations, *each) for each in found]
    if left := sorted(pairs.keys() - {weight.module for weight in weights}):
        raise UnsupportedError(
            f"{checkpoint.path}: {len(left)} of {len(pairs)} MXFP4 tensors are not quantized in the model, the first "
            f"is {left[0]}; a qformat that covers all of them is needed"
        )
    return weights


def _check_calibrated(weight: Weight) -> None:
    top = weight.quantizer.tensor_amax
    if weight.rows.is_meta or top is None or top.is_meta:
        raise QuantizerError(
            f"{weight.module}: is on the meta device or was not calibrated; load the model and calibrate it"
        )
    if not usable(weight.tensor_scale):
        raise QuantizerError(
            f"{weight.module}: a largest magnitude of {float(top):g} gives no tensor scale that engines can use"
        )


def input_amax(model: nn.Module) -> dict[str, float]:
    """The calibrated amax of what every quantized weight is multiplied with, by module; those of W4A16 are left out.

    Raises:
        QuantizerError: an input's quantizer is on and has seen nothing.
    """
    amax: dict[str, float] = {}
    for name, *_ in quantized_weights(model):
        quantizer = input_quantizer(model, name)
        if not quantizer.is_enabled:
            continue
        if quantizer.amax is None:
            raise QuantizerError(
                f"{name}: nothing was seen of its input; run the model on calibration data, or use a W4A16 format"
            )
        value = amax[_module(name)] = float(quantizer.amax)
        check_amax(name, value)
    return amax


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _shared_input_scales(amax: Mapping[str, float]) -> dict[str, float]:
    """Input scales by module: projections that engines fuse share the largest."""
    table = InputScales(None, amax, "the model's input quantizers")
    table.require(amax)
    return {
        module: float(table.scale([member for member in fused_group(module)[1] if member in amax])) for module in amax
    }


def _mxfp4_pairs(checkpoint: Checkpoint) -> Mapping[str, Pair]:
    try:
        return read_source(checkpoint).pairs
    except UnsupportedError:
        return {}  # BF16, or something that `_plain` refuses by its dtype


def _weight(
    checkpoint: Checkpoint,
    pairs: Mapping[str, Pair],
    layout: str,
    activations: Activations,
    name: str,
    quantizer: TensorQuantizer,
    rows: torch.Tensor,
) -> Weight:
    if rows.shape[-1] % NV_BLOCK:
        raise QuantizerError(f"{name} {list(rows.shape)}: K is {rows.shape[-1]}, expected a multiple of {NV_BLOCK}")
    module = _module(name)
    target = choose_target(_ROWS[rows.ndim == 3], layout, activations)
    pair = pairs.get(module)
    replaces = (pair.codes, pair.scales) if pair is not None else (_plain(checkpoint, name, rows),)
    if pair is not None and pair.shape != tuple(rows.shape):
        raise QuantizerError(f"{name}: {tuple(rows.shape)} in the model, but {pair.codes} holds other blocks")
    return Weight(module, rows.detach(), quantizer, None, replaces, pair, target)


def _plain(checkpoint: Checkpoint, name: str, rows: torch.Tensor) -> Tensor:
    """The source's tensor of a weight that nobody quantized before."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise QuantizerError(
            f"{name}: is no tensor of {checkpoint.path}, which has {some}, ...; expected the checkpoint that the model "
            "was loaded from, under the model's own names"
        )
    expected = tuple((rows.transpose(-1, -2) if rows.ndim == 3 else rows).shape)
    if tensor.shape != expected or tensor.dtype not in UNQUANTIZED:
        raise QuantizerError(
            f"{name}: expected a floating-point tensor {list(expected)} in {checkpoint.path}, found {tensor}"
        )
    return tensor


def check_untouched(model: nn.Module, checkpoint: Checkpoint, replaced: Collection[str]) -> None:
    """What is not quantized will be copied from the checkpoint: see that the model holds the same.

    Raises:
        CheckpointError: a parameter differs, because the model was trained or changed since it was loaded.
    """
    for file, names in _plain_names(model, checkpoint, replaced).items():
        with safe_open(checkpoint.path / file, "pt") as tensors:
            for name, value in names.items():
                source = tensors.get_tensor(name).to(value.dtype)
                if source.shape != value.shape or not torch.equal(_bits(source), _bits(value.cpu())):
                    raise CheckpointError(
                        f"{checkpoint.path / file}: {name} is not what the model holds. Save the model "
                        "(save_pretrained) and export it from there, so that nothing is lost."
                    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _plain_names(
    model: nn.Module, checkpoint: Checkpoint, replaced: Collection[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters that stay as they are, by file and name."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in model.state_dict().items():
        tensor = checkpoint.tensors.get(name)
        if tensor is not None and name not in replaced and not value.is_meta and value.ndim:
            found[tensor.path.name][name] = value
    return found
