"""The public functions: arguments checked once, then Triton on a GPU, torch elsewhere."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from fp4cast.errors import ShapeError
from fp4cast.formats import NV_BLOCK
from fp4cast.kernels import reference


def static_blockwise_fp4_fake_quant(
    x: Tensor, amax: Tensor, global_amax: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Round to the values that NVFP4 would hold under given block amax.

    Args:
        x: floating point, of any rank; blocks run along the last axis.
        amax: non-negative, one for each block in order, of any shape. Its size gives the block size.
        global_amax: 6 * 448 times the tensor scale, one number; the largest of `amax` if not given.
        out_dtype: the result's; that of x if not given.

    Returns:
        The shape of x. NaN stays NaN, infinity becomes the largest value of its block.

    Raises:
        ShapeError: amax is empty, or its size does not cut the last axis into blocks.
    """
    if amax.numel() == 0:
        raise ShapeError(f"amax is empty: expected one for each block of x {tuple(x.shape)}")
    block, rest = divmod(x.numel(), amax.numel())
    if x.ndim == 0 or rest or block == 0 or x.shape[-1] % block:
        raise ShapeError(
            f"amax {tuple(amax.shape)} does not cut the last axis of x {tuple(x.shape)}: expected one for each of some "
            "number of equal blocks"
        )
    top = _scalar(amax.float().amax() if global_amax is None else global_amax, x)
    return _kernels(x, block).fake_quant(x, amax, top, out_dtype or x.dtype, block)  # type: ignore[no-any-return]


def dynamic_fp4_fake_quant(
    x: Tensor, global_amax: Tensor | None = None, block: int = NV_BLOCK, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Like `static_blockwise_fp4_fake_quant`, under each block's own amax, as engines quantize activations.

    Args:
        x: floating point and finite, last axis a multiple of `block`.
        global_amax: 6 * 448 times the tensor scale; the largest of x if not given.
        block: elements that share a scale.
        out_dtype: of the result; that of x if not given.

    Raises:
        ShapeError: a last axis that is not a multiple of `block`.
    """
    _check_blocks(x, block)
    top = _scalar(x.abs().amax().float() if global_amax is None else global_amax, x)
    return _kernels(x, block).fake_quant(x, None, top, out_dtype or x.dtype, block)  # type: ignore[no-any-return]


def quantize_nvfp4(
    x: Tensor, global_amax: Tensor | None = None, amax: Tensor | None = None, block: int = NV_BLOCK
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to packed codes, block scales and a tensor scale.

    Args:
        x: floating point and finite, of any rank, last axis a multiple of `block`.
        global_amax: 6 * 448 times the tensor scale; the largest of x, or of `amax`, if not given.
        amax: non-negative, one for each block in order; each block's own if not given.
        block: elements that share a scale.

    Returns:
        Packed codes uint8 [..., K/2], low nibble first; E4M3 scales uint8 [..., K/block]; tensor scale float32 [].

    Raises:
        ShapeError: a last axis that is not a multiple of `block`, or an amax without one value for each block.
    """
    _check_blocks(x, block)
    if amax is not None and amax.numel() * block != x.numel():
        raise ShapeError(f"amax {tuple(amax.shape)}: expected {x.numel() // block}, one for each block of {block}")
    if global_amax is None:
        global_amax = (x.abs() if amax is None else amax).amax().float()
    top = _scalar(global_amax, x)
    packed, scales = _kernels(x, block).quantize(x, amax, top, block)
    return packed, scales, reference.tensor_scale(top)


def _check_blocks(x: Tensor, block: int) -> None:
    if x.ndim == 0 or x.numel() == 0 or x.shape[-1] % block:
        raise ShapeError(f"x {tuple(x.shape)}: expected a last axis of whole blocks of {block}")


def _scalar(value: Tensor, x: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ShapeError(f"global_amax {tuple(value.shape)}: expected one number")
    return value.detach().to(x.device, torch.float32).reshape(())


def _kernels(x: Tensor, block: int) -> ModuleType:
    """The Triton kernels if x is on a GPU and Triton is installed, else torch's."""
    if x.is_cuda and block & (block - 1) == 0 and importlib.util.find_spec("triton"):
        from fp4cast.kernels import gpu

        if gpu.fits(block):
            return gpu
    return reference
