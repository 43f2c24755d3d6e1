"""Match a model's quantized weights with the tensors of the checkpoint that they were loaded from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors import safe_open
from torch import nn

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import UNQUANTIZED, Tensor
from fp4cast.conversion.input_scales import InputScales
from fp4cast.errors import CheckpointError, QuantizerError, UnsupportedError
from fp4cast.families.family import Pair
from fp4cast.families.merging import shared_scale_group
from fp4cast.formats import NV_BLOCK, Bytes, usable_scale
from fp4cast.kernels import quantize_nvfp4
from fp4cast.kernels.reference import block_scales, own_block_scales, tensor_scale
from fp4cast.layouts.layout import Form, Target
from fp4cast.ptq.max_calibration import check_amax
from fp4cast.ptq.modules import input_quantizer, is_bank, quantized_weights
from fp4cast.ptq.opened import OpenedModel
from fp4cast.ptq.quantizer import TensorQuantizer

ReadRows = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """A quantized weight of a model.

    Attributes:
        module: its name in a checkpoint, as in `fp4cast.families.family.Pair`.
        rows: the weight, [N, K] or [E, N, K], blocks along the last axis; of any strides. It may be on the meta device.
        quantizer: calibrated.
        input_scale: its input's, a float32 number; None for W4A16.
        replaces: the source's tensors: codes and scales where it is MXFP4, else the weight.
        pair: the source's MXFP4 tensor.
        form: how it is named and oriented.
        bank: it holds all experts of a layer.
        read: reads [N, K] of an expert, or of a projection, where `rows` is on the meta device.
    """

    module: str
    rows: torch.Tensor
    quantizer: TensorQuantizer
    input_scale: float | None
    replaces: tuple[Tensor, ...]
    pair: Pair | None
    form: Form
    bank: bool
    read: Callable[[int], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.module if self.bank else f"{self.module}.weight"

    @property
    def experts(self) -> int:
        """The number of experts of a bank, which are quantized one at a time; 1 for a projection."""
        return self.rows.shape[0] if self.bank else 1

    @property
    def tensor_scale(self) -> float:
        """S, a float32 number."""
        return float(tensor_scale(self._top))

    @property
    def _top(self) -> torch.Tensor:
        found = self.quantizer.tensor_amax
        if found is None:  # as `calibrated_weights` has seen
            raise QuantizerError(f"{self.module}: is not calibrated")
        return found

    def codes(self, expert: int) -> Bytes:
        """Packed codes of one expert as they are stored: uint8 [N, K/2], or [K/2, N]."""
        return self._stored(quantize_nvfp4(self._rows(expert), self._top, self._amax(expert))[0])

    def block_scales(self, expert: int) -> Bytes:
        """E4M3 block scales of one expert as they are stored: uint8 [N, K/16], or [K/16, N]."""
        *_, lines, width = self.rows.shape
        amax = self._amax(expert)
        if amax is None:
            amax = self._rows(expert).reshape(-1, NV_BLOCK).abs().amax(dim=1)
            scales = own_block_scales(amax, self._top)
        else:
            scales = block_scales(amax, self._top)
        return self._stored(scales.view(torch.uint8).reshape(lines, width // NV_BLOCK))

    def _rows(self, expert: int) -> torch.Tensor:
        if self.read is not None:
            return self.read(expert).contiguous()
        return (self.rows[expert] if self.bank else self.rows).contiguous()

    def _amax(self, expert: int) -> torch.Tensor | None:
        """Block amax of one expert, float32; None where the quantizer keeps none, and the weight's own counts."""
        if not self.quantizer.static or self.quantizer.amax is None:
            return None
        return self.quantizer.amax.reshape(self.experts, -1)[expert]

    def _stored(self, x: torch.Tensor) -> Bytes:
        stored: Bytes = (x.transpose(-1, -2) if self.form.transposed else x).contiguous().cpu().numpy()
        return stored


def calibrated_weights(
    model: nn.Module, opened: OpenedModel, target: Target, read: ReadRows | None = None
) -> list[Weight]:
    """The quantized weights of a calibrated model, checked against its checkpoint.

    Args:
        model: calibrated; on the meta device if `read` is given.
        opened: its checkpoint.
        target: how they will be stored.
        read: reads the rows of a weight, by its name and expert.

    Raises:
        QuantizerError: nothing is quantized, a quantizer is not calibrated, or a weight is not the checkpoint's.
        UnsupportedError: the checkpoint holds MXFP4 weights that the model does not quantize.
        UsageError: the layout cannot hold a weight.
    """
    amax = input_amax(model)
    weights = matching_weights(model, opened, target)
    if amax and (missing := [weight for weight in weights if weight.module not in amax]):
        raise QuantizerError(
            f"{missing[0].module}: its input is not calibrated, but that of {len(amax)} others is; expected all (W4A4) "
            "or none"
        )
    if read is not None:
        weights = [replace(weight, read=partial(read, weight.name)) for weight in weights]
    for weight in weights:
        _check_calibrated(weight)
    scales = _shared_input_scales(amax)
    return [replace(weight, input_scale=scales.get(weight.module)) for weight in weights]


def matching_weights(model: nn.Module, opened: OpenedModel, target: Target) -> list[Weight]:
    """Like `calibrated_weights`, for a model that is not calibrated yet: it may be on the meta device.

    Raises:
        QuantizerError: a weight is not the checkpoint's, or not of whole blocks.
        UnsupportedError: the checkpoint holds MXFP4 weights that the model does not quantize.
        UsageError: the layout cannot hold a weight.
    """
    weights = [_weight(opened, target, *each) for each in quantized_weights(model)]
    if left := sorted(opened.pairs.keys() - {weight.module for weight in weights}):
        raise UnsupportedError(
            f"{opened.checkpoint.path}: {len(left)} of {len(opened.pairs)} MXFP4 tensors are not quantized in the "
            f"model, the first is {left[0]}; use a qformat that covers all of them"
        )
    return weights


def _check_calibrated(weight: Weight) -> None:
    top = weight.quantizer.tensor_amax
    if (weight.rows.is_meta and weight.read is None) or top is None or top.is_meta:
        raise QuantizerError(
            f"{weight.module}: is on the meta device or was not calibrated; load the model and calibrate it"
        )
    if not usable_scale(weight.tensor_scale):
        raise QuantizerError(
            f"{weight.module}: a largest magnitude of {float(top):g} gives no tensor scale that engines can use"
        )


def input_amax(model: nn.Module) -> dict[str, float]:
    """The calibrated amax of every quantized weight's input, by module; W4A16 weights have none.

    Raises:
        QuantizerError: an input's quantizer is on and has observed nothing.
    """
    amax: dict[str, float] = {}
    for name, *_ in quantized_weights(model):
        quantizer = input_quantizer(model, name)
        if not quantizer.is_enabled:
            continue
        if quantizer.amax is None:
            raise QuantizerError(
                f"{name}: its input was never observed; run the model on calibration data, or use a W4A16 format"
            )
        value = amax[_module(name)] = float(quantizer.amax)
        check_amax(name, value)
    return amax


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _shared_input_scales(amax: Mapping[str, float]) -> dict[str, float]:
    """Input scales by module: projections that engines merge share the largest."""
    table = InputScales(None, amax, "the model's input quantizers")
    table.require(amax)
    return {
        module: float(table.scale([member for member in shared_scale_group(module)[1] if member in amax]))
        for module in amax
    }


def _weight(opened: OpenedModel, target: Target, name: str, quantizer: TensorQuantizer, rows: torch.Tensor) -> Weight:
    if rows.shape[-1] % NV_BLOCK:
        raise QuantizerError(f"{name} {list(rows.shape)}: K is {rows.shape[-1]}, expected a multiple of {NV_BLOCK}")
    module, bank = _module(name), is_bank(name)
    pair = opened.pairs.get(module)
    replaces = (pair.codes, pair.scales) if pair is not None else (_plain(opened.checkpoint, name, rows),)
    if pair is not None and pair.shape != tuple(rows.shape):
        raise QuantizerError(f"{name}: {tuple(rows.shape)} in the model, but {pair.codes} holds other blocks")
    return Weight(module, rows.detach(), quantizer, None, replaces, pair, target.layout.form(bank), bank)


def _plain(checkpoint: Checkpoint, name: str, rows: torch.Tensor) -> Tensor:
    """The source tensor of a weight that was not quantized before."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        some = ", ".join(list(checkpoint.tensors)[:3])
        raise QuantizerError(
            f"{name}: is not a tensor of {checkpoint.path}, which has {some}, ...; expected the checkpoint that the "
            "model was loaded from, under the model's own names"
        )
    expected = tuple((rows.transpose(-1, -2) if is_bank(name) else rows).shape)
    if tensor.shape != expected or tensor.dtype not in UNQUANTIZED:
        raise QuantizerError(
            f"{name}: expected a floating-point tensor {list(expected)} in {checkpoint.path}, found {tensor}"
        )
    return tensor


def check_untouched(model: nn.Module, checkpoint: Checkpoint, replaced: Collection[str]) -> None:
    """Check that the model still holds the checkpoint's unquantized parameters, which will be copied from there.

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
