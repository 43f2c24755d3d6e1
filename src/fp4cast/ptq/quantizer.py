"""Quantizers: modules that round tensors to NVFP4, or observe them to learn their amax.

Names and meaning are ModelOpt's: `amax` is the largest magnitude, of each block of 16 (`static`: learned once, for
weights) or of the tensor (its blocks are then measured on every call, as engines do with activations).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fp4cast.errors import ShapeError
from fp4cast.formats import NV_BLOCK
from fp4cast.kernels import dynamic_fp4_fake_quant, static_blockwise_fp4_fake_quant
from fp4cast.ptq.headroom import BlockHistogram, Headroom


def _largest(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, float32, in one pass and without a copy of the magnitudes."""
    found: Tensor = torch.linalg.vector_norm(x, ord=float("inf"), dim=dim)
    return found.float()


class TensorQuantizer(nn.Module):
    """Rounds a tensor to NVFP4 along its last axis.

    Args:
        static: keep the amax of each block of a weight; otherwise one amax for the tensor, from which S follows.
        enabled: whether it does anything.

    Attributes:
        is_enabled: whether it does anything.
        calibrating: whether it observes tensors instead of rounding them.
        histogram: of the blocks that it observes, while its amax shall have headroom; else None.
        cramped: whether its amax should have had headroom, but its blocks span too much.
    """

    def __init__(self, static: bool = False, enabled: bool = True) -> None:
        super().__init__()
        self.static = static
        self.is_enabled = enabled
        self.calibrating = False
        self.histogram: BlockHistogram | None = None
        self.cramped = False
        self.register_buffer("_amax", None)
        self._here: Tensor
        self.register_buffer("_here", torch.empty(0), persistent=False)  # knows the device before there is an amax

    @property
    def device(self) -> torch.device:
        """Where its amax is, or will be."""
        return self._here.device

    @property
    def amax(self) -> Tensor | None:
        """float32: [blocks, 1] if static, else []; None before calibration."""
        found: Tensor | None = self._amax
        return found

    @amax.setter
    def amax(self, value: Tensor) -> None:
        self._amax = value.detach().float()

    @property
    def tensor_amax(self) -> Tensor | None:
        """float32 []: 6 * 448 times the tensor scale; None before calibration."""
        return None if self._amax is None else self._amax.amax().reshape(())

    @tensor_amax.setter
    def tensor_amax(self, value: Tensor) -> None:
        self.amax = value.reshape(())

    def enable(self) -> None:
        """Turn the quantizer on."""
        self.is_enabled = True

    def disable(self) -> None:
        """Turn the quantizer off, so that tensors pass unchanged."""
        self.is_enabled = False

    def enable_calib(self, histogram: bool = False) -> None:
        """Observe tensors and remember their amax, instead of rounding them; and a histogram of blocks, if asked to."""
        self.calibrating = True
        self.histogram = BlockHistogram() if histogram else None

    def disable_calib(self, headroom: Headroom | None = None) -> None:
        """Round tensors again, instead of observing them, under an amax with headroom where blocks were counted."""
        self.calibrating = False
        if headroom and self.histogram and self._amax is not None:
            self.amax, self.cramped = headroom.amax(self.histogram), headroom.leaves_none(self.histogram)
        self.histogram = None

    def place(self, device: torch.device | str) -> None:
        """Move an uncalibrated quantizer to a device, from the meta device too."""
        self._buffers["_here"] = torch.empty(0, device=device)

    def reset_amax(self) -> None:
        """Forget the amax."""
        self._buffers["_amax"] = None

    def collect(self, x: Tensor) -> None:
        """Include a tensor in the amax.

        Raises:
            ShapeError: the tensor has other blocks than earlier ones, or a last axis that is not a multiple of 16.
        """
        if x.numel() == 0:
            return
        if self.static:
            if x.shape[-1] % NV_BLOCK:
                raise ShapeError(f"x {tuple(x.shape)}: expected a last axis of whole blocks of {NV_BLOCK}")
            parts = x.detach() if x.ndim > 2 else (x.detach(),)  # a bank's experts: their copies need not all be there
            seen = torch.cat([_largest(part.reshape(-1, NV_BLOCK), dim=1)[:, None] for part in parts])
        else:
            seen = _largest(x.detach())
        if self._amax is not None and self._amax.shape != seen.shape:
            raise ShapeError(f"blocks {tuple(seen.shape)}: expected {tuple(self._amax.shape)}, as calibrated before")
        self._amax = seen if self._amax is None else torch.maximum(self._amax, seen)
        if self.histogram is not None:
            self.histogram.add(x)

    def forward(self, x: Tensor) -> Tensor:
        """Round x to what NVFP4 would hold, in its dtype; while calibrating or disabled, return it as it is."""
        if not self.is_enabled:
            return x
        if self.calibrating:
            self.collect(x)
            return x
        return self.fake_quant(x)

    def fake_quant(self, x: Tensor) -> Tensor:
        """Round x; an uncalibrated quantizer takes the tensor's own amax."""
        if self.static and self._amax is not None:
            return static_blockwise_fp4_fake_quant(x, self._amax)
        return dynamic_fp4_fake_quant(x, self._amax if not self.static else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        """Move the amax, as `.to()` and its like ask, but leave it float32: BF16 would change the scales."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make the buffers that a state dict holds, and promote the quantizer, as calibration would have done."""
        if type(self) is TensorQuantizer and self.static and f"{prefix}_global_amax" in state_dict:
            self.__class__ = NVFP4StaticQuantizer
            self.register_buffer("_global_amax", None)
        for name in ("_amax", "_global_amax"):
            if (value := state_dict.get(prefix + name)) is not None and name in self._buffers:
                self._buffers[name] = torch.empty(value.shape, dtype=torch.float32, device=self._here.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """For print(model)."""
        shape = None if self._amax is None else tuple(self._amax.shape)
        return f"static={self.static}, enabled={self.is_enabled}, amax={shape}"


class NVFP4StaticQuantizer(TensorQuantizer):
    """A weight quantizer with fixed block amax and global amax, which the cast sets and the export writes."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(static=True, enabled=enabled)
        self.register_buffer("_global_amax", None)

    @classmethod
    def promote(cls, quantizer: TensorQuantizer) -> NVFP4StaticQuantizer:
        """Turn a calibrated static quantizer into one of these, in place."""
        if quantizer.amax is None:
            raise ShapeError("a quantizer without amax cannot be promoted: calibrate first")
        quantizer.__class__ = cls
        quantizer.register_buffer("_global_amax", quantizer.amax.amax().reshape(()))
        return quantizer  # type: ignore[return-value]

    @property
    def global_amax(self) -> Tensor | None:
        """float32 []: 6 * 448 times the tensor scale."""
        found: Tensor | None = self._global_amax
        return found

    @global_amax.setter
    def global_amax(self, value: Tensor | float | None) -> None:
        if value is None:
            self._buffers["_global_amax"] = None
            return
        where = None if self._amax is None else self._amax.device
        given = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device=where)
        if given.numel() != 1:
            raise ShapeError(f"global_amax {tuple(given.shape)}: expected one number")
        self._global_amax = given.float().reshape(())

    def reset_amax(self) -> None:
        """Forget block amax and global amax."""
        super().reset_amax()
        self._buffers["_global_amax"] = None

    def collect(self, x: Tensor) -> None:
        """Include a weight in block amax and global amax."""
        super().collect(x)
        if self._amax is not None:
            self._global_amax = self._amax.amax().reshape(())

    @property
    def tensor_amax(self) -> Tensor | None:
        """The global amax."""
        return self.global_amax

    @tensor_amax.setter
    def tensor_amax(self, value: Tensor) -> None:
        self.global_amax = value

    def fake_quant(self, x: Tensor) -> Tensor:
        """Round under the fixed scales."""
        if self._amax is None:
            return super().fake_quant(x)
        return static_blockwise_fp4_fake_quant(x, self._amax, self._global_amax)


def promote_nvfp4_static_quantizers(model: nn.Module) -> int:
    """Promote every enabled, calibrated, static quantizer that is not promoted yet; returns how many."""
    found = [
        module
        for module in model.modules()
        if type(module) is TensorQuantizer and module.static and module.is_enabled and module.amax is not None
    ]
    for quantizer in found:
        NVFP4StaticQuantizer.promote(quantizer)
    return len(found)
