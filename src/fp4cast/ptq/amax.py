"""The amax of quantizers in closed form, from MXFP4 codes and scales, under ModelOpt's function names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fp4cast.casting.nearest import block_scale_bytes, choose_nearest
from fp4cast.casting.tight_rule import ArrayBlocks, Scaling, choose, closed_form
from fp4cast.errors import ScaleError, ShapeError, UnsupportedError
from fp4cast.formats import E4M3, E8M0_BIAS, E8M0_NAN, MX_BLOCK_BYTES, TENSOR_TOP, Bytes


def quantizer_name_from_blocks_key(key: str) -> str:
    """The quantizer of a gpt-oss bank: `<base>_blocks` -> `<base>_weight_quantizer`.

    Raises:
        UnsupportedError: the key does not end in `_blocks`.
    """
    base = key.removesuffix("_blocks")
    if not base or base == key:
        raise UnsupportedError(f"{key}: expected the name of a tensor of MXFP4 codes, which ends in _blocks")
    return f"{base}_weight_quantizer"


def _bytes(tensor: Tensor, name: str) -> Bytes:
    if tensor.dtype not in (torch.uint8, torch.int8):
        raise ShapeError(f"{name}: expected uint8, got {tensor.dtype}")
    return tensor.contiguous().view(torch.uint8).cpu().numpy()


def compute_global_amax_for_scales(scales: Tensor) -> Tensor:
    """6 * 448 * 2^m with m = k_max - 8, float32 []: the global amax of an MXFP4 tensor by its scales alone.

    Args:
        scales: E8M0 uint8, of any shape.

    Raises:
        ScaleError: a byte of 255.
        ShapeError: no scales, or another dtype.
    """
    found = _bytes(scales, "scales")
    if not found.size:
        raise ShapeError("scales are empty")
    if found.max() == E8M0_NAN:
        raise ScaleError("a scale byte is 255, which is NaN in E8M0; expected 0 to 254")
    return global_amax(2.0 ** closed_form(int(found.max()) - E8M0_BIAS))


def global_amax(tensor_scale: float) -> Tensor:
    """6 * 448 * S, float32 [].

    Raises:
        ScaleError: it exceeds float32, because the weights reach 2^117.
    """
    top = torch.tensor(TENSOR_TOP * tensor_scale)
    if not torch.isfinite(top):
        raise ScaleError(f"a tensor scale of {tensor_scale:g} has no global amax in float32; use fp4cast convert")
    return top


def compute_per_block_amax_for_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Block amax of an MXFP4 tensor that is one scale domain, float32 [numel / 16, 1].

    6 * 2^k where that is exact; else 6 times the block's scale, exact by a shift of its codes or nearest.

    Args:
        blocks: packed codes uint8 [..., K/32, 16].
        scales: E8M0 uint8 [..., K/32].

    Raises:
        ShapeError: a trailing dimension that is not 16 bytes, or leading ones that differ from those of the scales.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != MX_BLOCK_BYTES:
        raise ShapeError(
            f"blocks {tuple(blocks.shape)}: expected a last axis of {MX_BLOCK_BYTES} bytes, a block of 32 codes"
        )
    if blocks.shape[:-1] != scales.shape:
        raise ShapeError(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}: leading dimensions differ")
    codes, exponents = _bytes(blocks, "blocks").reshape(-1, MX_BLOCK_BYTES), _bytes(scales, "scales").reshape(-1)
    source = ArrayBlocks("the tensor", codes, exponents)
    scaling, _ = choose([source])
    if not scaling.exact:
        scaling = choose_nearest([source])
    return block_amax(block_scale_bytes(exponents, scaling, E8M0_BIAS, lambda odd: codes[odd]), scaling)


def block_amax(block_scales: Bytes, scaling: Scaling, device: torch.device | str = "cpu") -> Tensor:
    """Block amax float32 [n, 1] of E4M3 codes, looked up on the device, to which only the bytes travel."""
    table = torch.from_numpy((6 * E4M3.values * scaling.tensor_scale).astype(np.float32)).to(device)
    codes = torch.from_numpy(block_scales.reshape(-1)).to(device)
    return table[codes.int()].reshape(-1, 1)
