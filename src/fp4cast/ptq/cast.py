"""The cast into a model: block and global amax of its weight quantizers set from an MXFP4 checkpoint, by closed form.

A quantizer with `global_amax` = 6 * 448 * S and `_amax` = 6 * s * S rounds a weight under the block scale s and the
tensor scale S. Both are those that `fp4cast convert` writes, so an export of the model holds the same bytes. Function
names are those of the feature in ModelOpt; the numerics are `fp4cast.casting.tight_rule` and `fp4cast.casting.nearest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp4cast.casting.nearest import block_scale_bytes, choose_nearest, encode
from fp4cast.casting.tight_rule import E_MAX, M_NORMAL, ArrayBlocks, Scaling, choose, outside_window
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.domains import scan
from fp4cast.conversion.plan import castable
from fp4cast.errors import QuantizerError, ScaleError, ShapeError, UnsupportedError
from fp4cast.families.recognise import BLOCK_BYTES, Pair, read_source
from fp4cast.formats import E4M3, E4M3_MAX, E8M0_BIAS, E8M0_NAN, Bytes, mxfp4_values, nvfp4_values
from fp4cast.kernels.reference import round_e2m1
from fp4cast.layouts.layout import choose_target
from fp4cast.ptq.modules import quantized_weights
from fp4cast.ptq.quantizer import NVFP4StaticQuantizer

__all__ = [
    "Scaled",
    "apply_domains",
    "apply_to_model",
    "build_amax_map",
    "cast_domains",
    "compute_global_amax_for_scales",
    "compute_per_block_amax_for_mxfp4",
    "quantizer_name_from_blocks_key",
]

_TOP = 6 * E4M3_MAX
_SAMPLE = 1 << 20  # weights that are looked at, to see whose they are


def quantizer_name_from_blocks_key(key: str) -> str:
    """`<base>_blocks`, a bank of gpt-oss, belongs to `<base>_weight_quantizer`.

    Raises:
        UnsupportedError: the key does not end in `_blocks`.
    """
    base = key.removesuffix("_blocks")
    if not base or base == key:
        raise UnsupportedError(f"{key}: expected the name of a tensor of MXFP4 codes, which ends in _blocks")
    return f"{base}_weight_quantizer"


def _quantizer_name(pair: Pair) -> str:
    if pair.codes.name.endswith("_blocks"):
        return quantizer_name_from_blocks_key(pair.codes.name)
    return f"{pair.module}.weight_quantizer"


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
    return _global_amax(2.0 ** max(int(found.max()) - E8M0_BIAS - E_MAX, M_NORMAL))


def _global_amax(tensor_scale: float) -> Tensor:
    """6 * 448 * S, float32 [].

    Raises:
        ScaleError: it is beyond float32, as of weights that reach 2^117.
    """
    top = torch.tensor(_TOP * tensor_scale)
    if not torch.isfinite(top):
        raise ScaleError(
            f"a tensor scale of {tensor_scale:g} has no global amax in float32; cast it by fp4cast convert"
        )
    return top


def compute_per_block_amax_for_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Block amax of an MXFP4 tensor that is one scale domain, float32 [numel / 16, 1].

    6 * 2^k wherever that is exact; else 6 times the block's scale, exact by a shift of its codes or nearest.

    Args:
        blocks: packed codes uint8 [..., K/32, 16].
        scales: E8M0 uint8 [..., K/32].

    Raises:
        ShapeError: a trailing dimension that is not 16 bytes, or leading ones that differ from those of the scales.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != BLOCK_BYTES:
        raise ShapeError(
            f"blocks {tuple(blocks.shape)}: expected a last axis of {BLOCK_BYTES} bytes, a block of 32 codes"
        )
    if blocks.shape[:-1] != scales.shape:
        raise ShapeError(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}: leading dimensions differ")
    codes, exponents = _bytes(blocks, "blocks").reshape(-1, BLOCK_BYTES), _bytes(scales, "scales").reshape(-1)
    source = ArrayBlocks("the tensor", codes, exponents)
    scaling, _ = choose([source])
    if not scaling.exact:
        scaling = choose_nearest([source])
    return _amax(block_scale_bytes(exponents, scaling, E8M0_BIAS, lambda odd: codes[odd]), scaling)


def _amax(block_scales: Bytes, scaling: Scaling, device: torch.device | str = "cpu") -> Tensor:
    """Block amax float32 [n, 1] of E4M3 codes: the bytes travel to the device, the table is looked up there."""
    table = torch.from_numpy((6 * E4M3.values * scaling.tensor_scale).astype(np.float32)).to(device)
    codes = torch.from_numpy(block_scales.reshape(-1)).to(device)
    return table[codes.int()].reshape(-1, 1)


def _exponents(pair: Pair, files: Files) -> Bytes:
    return files[pair.scales.path].read(pair.scales.start, pair.scales.nbytes)


def _codes(pair: Pair, files: Files, blocks: Any) -> Bytes:
    return files[pair.codes.path].gather(pair.codes.start, blocks, BLOCK_BYTES)


def _lossless(pair: Pair, scaling: Scaling, exponents: Bytes, files: Files) -> int:
    """How many blocks keep every value: all, or as measured on those outside of the window."""
    if scaling.exact:
        return pair.blocks
    odd = outside_window(exponents.astype(np.int64) - pair.bias, scaling.m)
    codes = _codes(pair, files, odd)
    written = encode(codes, exponents[odd], scaling, pair.bias)
    before = mxfp4_values(codes, exponents[odd, None], pair.bias)
    after = nvfp4_values(written.codes, written.block_scales, scaling.tensor_scale)
    return pair.blocks - int((before != after).any(axis=1).sum())


Scaled = tuple[str, Pair, Scaling]  # a quantizer's name, the tensor that it belongs to, how that is scaled


def cast_domains(directory: Path, inexact: str) -> Iterator[Scaled]:
    """(quantizer's name, tensor, scaling) for every MXFP4 tensor of a checkpoint."""
    source = read_source(open_checkpoint(directory))
    for domain in scan(castable(source, choose_target(source.family, activations="w4a4")), inexact=inexact):
        for pair in domain.pairs:
            yield _quantizer_name(pair), pair, domain.scaling


def _facts(pair: Pair, scaling: Scaling, exponents: Bytes, files: Files) -> dict[str, Any]:
    lossless = _lossless(pair, scaling, exponents, files)
    return {
        "global_amax": _TOP * scaling.tensor_scale,
        "k_min": scaling.k_min,
        "k_max": scaling.k_max,
        "m": scaling.m,
        "n_total_blocks": pair.blocks,
        "n_lossless_blocks": lossless,
        "pct_lossless": 100.0 * lossless / pair.blocks,
    }


def build_amax_map(checkpoint_dir: str | Path, inexact: str = "nearest") -> dict[str, dict[str, Any]]:
    """What the cast would set, by the name of the quantizer.

    Args:
        checkpoint_dir: an MXFP4 checkpoint.
        inexact: "fail" or "nearest", where no tensor scale is exact.

    Returns:
        global_amax, k_min, k_max and m (None for a tensor scale that is no power of two) of the tensor's scale domain,
        and n_total_blocks, n_lossless_blocks and pct_lossless of its MXFP4 blocks, measured where they are not exact.
    """
    with Files() as files:
        return {
            name: _facts(pair, scaling, _exponents(pair, files), files)
            for name, pair, scaling in cast_domains(Path(checkpoint_dir), inexact)
        }


def apply_to_model(model: nn.Module, checkpoint_dir: str | Path, inexact: str = "fail") -> dict[str, dict[str, Any]]:
    """Set every weight quantizer of a model that belongs to an MXFP4 tensor of a checkpoint.

    Args:
        model: with static, promoted weight quantizers, as `max_calibrate` leaves them.
        checkpoint_dir: the MXFP4 checkpoint that the model was loaded from.
        inexact: "fail", or "nearest" to round what cannot be exact.

    Returns:
        What was set, as of `build_amax_map`.

    Raises:
        QuantizerError: a quantizer is missing, of another kind, or of another size; nothing is changed then.
        InexactError: some tensor cannot be exact and `inexact` is "fail".
    """
    return apply_domains(model, list(cast_domains(Path(checkpoint_dir), inexact)))


def apply_domains(model: nn.Module, found: Sequence[Scaled]) -> dict[str, dict[str, Any]]:
    """`apply_to_model` with what `cast_domains` found."""
    quantizers = {name: _find(model, name, pair) for name, pair, _ in found}
    weights = {id(quantizer): rows for _, quantizer, rows in quantized_weights(model)}
    applied = {}
    with Files() as files, torch.no_grad():
        for name, pair, _ in found:
            _check_weight(name, pair, weights[id(quantizers[name])], files)
        for name, pair, scaling in found:
            exponents = _exponents(pair, files)
            scales = block_scale_bytes(exponents, scaling, pair.bias, lambda odd, pair=pair: _codes(pair, files, odd))  # type: ignore[misc]
            quantizer = quantizers[name]
            _set(quantizer, scales, scaling)
            applied[name] = _facts(pair, scaling, exponents, files)
    return applied


def _set(quantizer: NVFP4StaticQuantizer, block_scales: Bytes, scaling: Scaling) -> None:
    """In place and in the buffer's own shape: what refers to it sees the new values."""
    if quantizer.amax is not None:  # as `_find` has seen
        device = quantizer.amax.device
        quantizer.amax.copy_(_amax(block_scales, scaling, device).reshape(quantizer.amax.shape))
        quantizer.global_amax = _global_amax(scaling.tensor_scale).to(device)


def _find(model: nn.Module, name: str, pair: Pair) -> NVFP4StaticQuantizer:
    """The quantizer of a tensor, checked."""
    where = f"{pair.codes.name} ({pair.codes.path.name})"
    try:
        quantizer = model.get_submodule(name)
    except AttributeError:
        some = [key for key, module in model.named_modules() if isinstance(module, NVFP4StaticQuantizer)][:3]
        raise QuantizerError(
            f"{where} belongs to {name}, which {type(model).__name__} does not have; "
            f"it has {', '.join(some) or 'no static quantizer'}"
        ) from None
    if not isinstance(quantizer, NVFP4StaticQuantizer) or not quantizer.is_enabled or quantizer.amax is None:
        raise QuantizerError(
            f"{where} belongs to {name}: expected an enabled, calibrated NVFP4StaticQuantizer, got {quantizer!r}"
        )
    if quantizer.amax.numel() != 2 * pair.blocks:
        raise QuantizerError(
            f"{name}: {quantizer.amax.numel()} blocks of 16, but {where} has {2 * pair.blocks} ({pair.codes.shape})"
        )
    return quantizer


def _check_weight(name: str, pair: Pair, rows: Tensor, files: Files) -> None:
    """See that the model's weight is the checkpoint's: by its shape, and by the magnitudes of some of its blocks.

    In units of its MXFP4 scale, the largest magnitude of a block is one of E2M1; another checkpoint's scales make it
    something else soon. No codes are read for that.
    """
    where = f"{pair.codes.name} ({pair.codes.path.name})"
    if tuple(rows.shape) != pair.shape:
        raise QuantizerError(f"{name}: quantizes {list(rows.shape)} in blocks, but {where} holds {list(pair.shape)}")
    if rows.is_meta or rows.dtype not in (torch.bfloat16, torch.float32):
        return  # of other dtypes, not every value is exact
    first = (rows[0] if rows.ndim == 3 else rows)[: max(1, _SAMPLE // pair.shape[-1])]
    blocks = first.reshape(-1, 32).float().abs().amax(dim=1).cpu()
    exponents = files[pair.scales.path].read(pair.scales.start, len(blocks)).astype(np.int32) - pair.bias
    k = torch.from_numpy(exponents)
    ratio = torch.ldexp(torch.ldexp(blocks, -(k // 2)), k // 2 - k)  # in two steps: 2^127 and 2^-127 are at the ends
    if not torch.equal(round_e2m1(ratio), ratio):
        block = int((round_e2m1(ratio) != ratio).nonzero()[0])
        raise QuantizerError(
            f"{name}: block {block} of the model's weight reaches {blocks[block]:g}, which no code of {where} gives "
            f"under its scale 2^{int(k[block])}; expected the checkpoint that the model was loaded from"
        )
