"""The amax of quantizers in closed form, from MXFP4 codes and scales, under ModelOpt's function names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from fp4cast.casting.nearest import before_and_after, block_scale_bytes, choose_nearest
from fp4cast.casting.tight_rule import WINDOW, ArrayBlocks, Ints, Scaling, choose, closed_form
from fp4cast.errors import ScaleError, ShapeError, UnsupportedError, UsageError
from fp4cast.formats import (
    E4M3,
    E8M0_BIAS,
    E8M0_NAN,
    MX_BLOCK_BYTES,
    TENSOR_TOP,
    Bytes,
)


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


def global_amax(tensor_scale: float) -> Tensor:
    """6 * 448 * S, float32 [].

    Raises:
        ScaleError: it exceeds float32, because the weights reach 2^117.
    """
    top = torch.tensor(TENSOR_TOP * tensor_scale)
    if not torch.isfinite(top):
        raise ScaleError(f"a tensor scale of {tensor_scale:g} has no global amax in float32; use fp4cast convert")
    return top


class AmaxFacts(TypedDict):
    """What the cast sets for one tensor, and how many of its MXFP4 blocks keep every value.

    Attributes:
        global_amax: 6 * 448 * S.
        k_min: smallest exponent of the tensor's scale domain; see `fp4cast.casting.tight_rule.Scaling`.
        k_max: largest exponent of it.
        m: log2 of S; None for a tensor scale that is not a power of two.
        n_total_blocks: blocks of 32.
        n_lossless_blocks: those of which every value is kept, measured where exponents do not decide.
        n_zero_blocks: those under the scale byte 0, which writers give to blocks of zeros; no code is read for it.
        n_out_of_range_blocks: those whose exponent lies outside of [m - 9, m + 8] in a domain that spans more.
        pct_lossless: percent.
    """

    global_amax: float
    k_min: int | None
    k_max: int | None
    m: int | None
    n_total_blocks: int
    n_lossless_blocks: int
    n_zero_blocks: int
    n_out_of_range_blocks: int
    pct_lossless: float


def amax_facts(
    scaling: Scaling, exponents: Bytes, bias: int, codes: Callable[[Ints], Bytes] | None = None
) -> AmaxFacts:
    """The facts of one tensor under its domain's scaling.

    Args:
        scaling: the domain's.
        exponents: E8M0 uint8 [n].
        bias: their exponent bias.
        codes: reads packed codes of blocks, uint8 [len(blocks), 16]; called where the domain is not exact.
    """
    odd = scaling.undecided(exponents.astype(np.int64) - bias)
    lost = 0
    if codes and not scaling.exact and odd.size:
        before, after = before_and_after(codes(odd), exponents[odd], scaling, bias)
        lost = int((before != after).any(axis=1).sum())
    return {
        "global_amax": TENSOR_TOP * scaling.tensor_scale,
        "k_min": scaling.k_min,
        "k_max": scaling.k_max,
        "m": scaling.m,
        "n_total_blocks": len(exponents),
        "n_lossless_blocks": len(exponents) - lost,
        "n_zero_blocks": int((exponents == 0).sum()),
        "n_out_of_range_blocks": len(odd),
        "pct_lossless": 100.0 * (len(exponents) - lost) / len(exponents),
    }


class Amax(NamedTuple):
    """What a static quantizer needs of one MXFP4 tensor.

    Attributes:
        per_block: float32 [..., 2 * blocks], for blocks of 16.
        global_amax: float32 [].
        info: see `AmaxFacts`.
    """

    per_block: Tensor
    global_amax: Tensor
    info: AmaxFacts


def compute_amax_for_mxfp4(blocks: Tensor, scales: Tensor) -> Amax:
    """Block amax and global amax of an MXFP4 tensor that is one scale domain: the pair that belongs together.

    The global amax is 6 * 448 * S by the tight rule. A block's is 6 * 2^k where that is exact; else 6 times its scale
    under S, exact by a shift of its codes, or nearest.

    Args:
        blocks: packed codes uint8 [..., K/32, 16].
        scales: E8M0 uint8 [..., K/32].

    Raises:
        ShapeError: a trailing dimension that is not 16 bytes, leading ones that differ from those of the scales, no
            blocks, or another dtype.
        ScaleError: a scale byte of 255, or weights so large that float32 has no global amax.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != MX_BLOCK_BYTES:
        raise ShapeError(
            f"blocks {tuple(blocks.shape)}: expected a last axis of {MX_BLOCK_BYTES} bytes, a block of 32 codes"
        )
    if blocks.shape[:-1] != scales.shape:
        raise ShapeError(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}: leading dimensions differ")
    codes, exponents = _bytes(blocks, "blocks").reshape(-1, MX_BLOCK_BYTES), _bytes(scales, "scales").reshape(-1)
    if not exponents.size:
        raise ShapeError("scales are empty")
    source = ArrayBlocks("the tensor", codes, exponents)
    scaling, _ = choose([source])
    if not scaling.exact:
        scaling = choose_nearest([source])
    amax = block_amax(block_scale_bytes(exponents, scaling, E8M0_BIAS, lambda odd: codes[odd]), scaling)
    facts = amax_facts(scaling, exponents, E8M0_BIAS, lambda odd: codes[odd])
    shape = (*scales.shape[:-1], 2 * scales.shape[-1])
    return Amax(amax.reshape(shape), global_amax(scaling.tensor_scale), facts)


def compute_per_block_amax_for_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The `per_block` of `compute_amax_for_mxfp4`, float32 [..., 2 * blocks]."""
    return compute_amax_for_mxfp4(blocks, scales).per_block


def compute_global_amax_for_scales(scales: Tensor) -> tuple[float, AmaxFacts]:
    """(global amax, facts) of an MXFP4 tensor by its scales alone, while they span at most 17 binades.

    Beyond that, codes decide: a block of zeros on top, or codes that leave room for a shift, ask for another tensor
    scale than the largest exponent does. The original's function goes on there, and rounds weights that can be exact.

    Args:
        scales: E8M0 uint8, of any shape.

    Raises:
        UsageError: the scales span more than 17 binades.
        ScaleError, ShapeError: as `compute_amax_for_mxfp4`.
    """
    found = _bytes(scales, "scales").reshape(-1)
    if not found.size:
        raise ShapeError("scales are empty")
    if found.max() == E8M0_NAN:
        raise ScaleError("a scale byte is 255, which is NaN in E8M0; expected 0 to 254")
    k_min, k_max = (int(end) - E8M0_BIAS for end in (found.min(), found.max()))
    if k_max - k_min > WINDOW:
        raise UsageError(
            f"scales: exponents {k_min} to {k_max} span {k_max - k_min} binades, so that codes decide; "
            "call compute_amax_for_mxfp4(blocks, scales)"
        )
    m = closed_form(k_max)
    scaling = Scaling(2.0**m, m, k_min, k_max, m, m, verbatim=True)
    return float(global_amax(2.0**m)), amax_facts(scaling, found, E8M0_BIAS)


def block_amax(block_scales: Bytes, scaling: Scaling, device: torch.device | str = "cpu") -> Tensor:
    """Block amax float32 [n, 1] of E4M3 codes, looked up on the device, to which only the bytes travel."""
    table = torch.from_numpy((6 * E4M3.values * scaling.tensor_scale).astype(np.float32)).to(device)
    codes = torch.from_numpy(block_scales.reshape(-1)).to(device)
    return table[codes.int()].reshape(-1, 1)
