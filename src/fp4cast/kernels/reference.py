"""NVFP4 in plain torch, on any device: what the Triton kernels must equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4cast.formats import E4M3_MAX, TENSOR_TOP

E2M1_MAX = 6.0
SMALLEST_SCALE = 2.0**-9


def block_scales(amax: Tensor, global_amax: Tensor) -> Tensor:
    """E4M3 block scales of amax [n], as float8_e4m3fn [n]."""
    six = torch.full_like(global_amax, E2M1_MAX)  # not a number: torch multiplies by a number's reciprocal on a GPU
    top = _positive(global_amax, TENSOR_TOP) / six
    wanted = _positive(amax.float(), E2M1_MAX) / six * E4M3_MAX / top
    return wanted.clamp(SMALLEST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def own_block_scales(amax: Tensor, global_amax: Tensor) -> Tensor:
    """Like `block_scales`, for the blocks' own amax [n]: amax / (6 * S), and 1 for blocks of zeros."""
    amax = amax.float()
    wanted = torch.where(amax == 0, torch.ones_like(amax), amax / (E2M1_MAX * tensor_scale(global_amax)))
    return wanted.clamp(SMALLEST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def _positive(amax: Tensor, otherwise: float) -> Tensor:
    return torch.where(amax > 0, amax, torch.full_like(amax, otherwise))


def _scales(blocks: Tensor, amax: Tensor | None, global_amax: Tensor) -> Tensor:
    """Block scales from a given amax, or from that of the blocks [n, block]."""
    if amax is None:
        return own_block_scales(blocks.abs().amax(dim=1), global_amax)
    return block_scales(amax.reshape(-1), global_amax)


def tensor_scale(global_amax: Tensor) -> Tensor:
    """S of a global amax, float32 []."""
    largest = torch.full_like(global_amax, TENSOR_TOP)
    return torch.where(global_amax > 0, global_amax, largest) / largest


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value of float32, ties to the even code, saturating at 6; NaN stays NaN."""
    size = x.abs()
    unit = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = (size / unit).round() * unit
    return torch.copysign(torch.where(rounded > E2M1_MAX, E2M1_MAX, rounded), x)


def fake_quant(x: Tensor, amax: Tensor | None, global_amax: Tensor, out_dtype: torch.dtype, block: int) -> Tensor:
    """See `fp4cast.kernels.static_blockwise_fp4_fake_quant`; amax None: each block's own."""
    blocks = x.reshape(-1, block).float()
    step = (_scales(blocks, amax, global_amax).float() * tensor_scale(global_amax))[:, None]
    return (round_e2m1(blocks / step) * step).to(out_dtype).reshape(x.shape)


def quantize(x: Tensor, amax: Tensor | None, global_amax: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """See `fp4cast.kernels.quantize_nvfp4`."""
    blocks = x.reshape(-1, block).float()
    scales = _scales(blocks, amax, global_amax)
    values = round_e2m1(blocks / (scales.float() * tensor_scale(global_amax))[:, None])
    size = values.abs()
    codes = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
    codes |= values.signbit().to(torch.uint8) << 3
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.reshape(*x.shape[:-1], -1), scales.view(torch.uint8).reshape(*x.shape[:-1], -1)
