"""Cast into a model: set block and global amax of its weight quantizers from an MXFP4 checkpoint, in closed form.

A quantizer with `global_amax` = 6 * 448 * S and `_amax` = 6 * s * S rounds a weight under the block scale s and the
tensor scale S. Both are those that `fp4cast convert` writes, so an export of the model holds the same bytes. The
function names are ModelOpt's; the numerics are `fp4cast.casting.tight_rule` and `fp4cast.casting.nearest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from fp4cast.casting.inexact import check_inexact
from fp4cast.casting.nearest import block_scale_bytes
from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.domains import find_domains
from fp4cast.errors import QuantizerError
from fp4cast.families.family import Pair, Source
from fp4cast.families.recognise import read_source
from fp4cast.formats import MX_BLOCK, MX_BLOCK_BYTES, Bytes
from fp4cast.kernels.reference import round_e2m1
from fp4cast.layouts.choose import targets_of
from fp4cast.layouts.layout import Target, castable
from fp4cast.ptq.amax import AmaxFacts, amax_facts, block_amax, global_amax
from fp4cast.ptq.modules import quantized_weights
from fp4cast.ptq.quantizer import NVFP4StaticQuantizer

_SAMPLE = 1 << 20  # weights that are compared with their checkpoint


def _exponents(pair: Pair, files: Files) -> Bytes:
    return files[pair.scales.path].read(pair.scales.start, pair.scales.nbytes)


def _codes(pair: Pair, files: Files, blocks: Any) -> Bytes:
    return files[pair.codes.path].gather(pair.codes.start, blocks, MX_BLOCK_BYTES)


class Scaled(NamedTuple):
    """One MXFP4 tensor and the scaling of its domain."""

    pair: Pair
    scaling: Scaling

    @property
    def module(self) -> str:
        """The tensor's module in the checkpoint."""
        return self.pair.module

    @property
    def quantizer(self) -> str:
        """The name of its quantizer in the model."""
        return f"{self.module}_weight_quantizer" if self.pair.bank else f"{self.module}.weight_quantizer"


def cast_domains(source: Source, target: Target, inexact: str) -> list[Scaled]:
    """Every MXFP4 tensor that a target casts, with the scaling of its domain.

    Raises:
        UnsupportedError: there is none.
        InexactError: some domain cannot be exact and `inexact` is "fail".
    """
    check_inexact(inexact)
    domains = find_domains(castable(source, target).cast, inexact=inexact)
    return [Scaled(pair, domain.scaling) for domain in domains for pair in domain.pairs]


def _domains_of(directory: str | Path, inexact: str) -> list[Scaled]:
    source = read_source(open_checkpoint(Path(directory)))
    return cast_domains(source, targets_of(source.family)[0], inexact)


def _facts(pair: Pair, scaling: Scaling, exponents: Bytes, files: Files) -> AmaxFacts:
    return amax_facts(scaling, exponents, pair.bias, partial(_codes, pair, files))


def build_amax_map(checkpoint_dir: str | Path, inexact: str = "nearest") -> dict[str, AmaxFacts]:
    """What the cast would set, by quantizer name.

    Args:
        checkpoint_dir: an MXFP4 checkpoint.
        inexact: "fail" or "nearest", where no tensor scale is exact.

    Returns:
        `AmaxFacts` of each tensor.
    """
    with Files() as files:
        return {
            each.quantizer: _facts(*each, _exponents(each.pair, files), files)
            for each in _domains_of(checkpoint_dir, inexact)
        }


def apply_to_model(model: nn.Module, checkpoint_dir: str | Path, inexact: str = "fail") -> dict[str, AmaxFacts]:
    """Set a model's weight quantizers from the MXFP4 tensors of its checkpoint.

    Args:
        model: with static, promoted weight quantizers, as `max_calibrate` leaves them.
        checkpoint_dir: the MXFP4 checkpoint that the model was loaded from.
        inexact: "fail", or "nearest" to round what cannot be exact.

    Returns:
        What was set, like `build_amax_map`.

    Raises:
        QuantizerError: a quantizer is missing, of another kind, or of another size; nothing is changed then.
        InexactError: some tensor cannot be exact and `inexact` is "fail".
    """
    return apply_domains(model, _domains_of(checkpoint_dir, inexact))


def apply_domains(model: nn.Module, found: Sequence[Scaled]) -> dict[str, AmaxFacts]:
    """Like `apply_to_model`, with the result of `cast_domains`."""
    quantizers = {each.quantizer: _find(model, each.quantizer, each.pair) for each in found}
    weights = {id(quantizer): rows for _, quantizer, rows in quantized_weights(model)}
    applied = {}
    for name in quantizers:
        if id(quantizers[name]) not in weights:
            raise QuantizerError(
                f"{name}: no known module quantizes a weight with it; expected one that `attach` has made"
            )
    with Files() as files, torch.no_grad():
        for each in found:
            _check_weight(each.quantizer, each.pair, weights[id(quantizers[each.quantizer])], files)
        for each in found:
            pair, scaling = each
            exponents = _exponents(pair, files)
            scales = block_scale_bytes(exponents, scaling, pair.bias, partial(_codes, pair, files))
            _set(quantizers[each.quantizer], scales, scaling)
            applied[each.quantizer] = _facts(pair, scaling, exponents, files)
    return applied


class LosslessCounts(TypedDict):
    """How much a cast keeps: tensors and MXFP4 blocks of which every value is kept, of how many."""

    tensors: int
    of_tensors: int
    blocks: int
    of_blocks: int


def count_lossless(applied: Mapping[str, AmaxFacts]) -> LosslessCounts:
    """The counts over what `apply_to_model` or `build_amax_map` returns."""
    facts = applied.values()
    return {
        "tensors": sum(fact["n_lossless_blocks"] == fact["n_total_blocks"] for fact in facts),
        "of_tensors": len(facts),
        "blocks": sum(fact["n_lossless_blocks"] for fact in facts),
        "of_blocks": sum(fact["n_total_blocks"] for fact in facts),
    }


def lossless_modules(found: Sequence[Scaled], applied: Mapping[str, AmaxFacts]) -> list[str]:
    """Modules whose every value the cast keeps."""
    facts = ((each.module, applied[each.quantizer]) for each in found)
    return [module for module, fact in facts if fact["n_lossless_blocks"] == fact["n_total_blocks"]]


def _set(quantizer: NVFP4StaticQuantizer, block_scales: Bytes, scaling: Scaling) -> None:
    """Set both amax in place, in the buffer's own shape, so that references to it see the new values."""
    if quantizer.amax is not None:  # as `_find` has seen
        device = quantizer.amax.device
        quantizer.amax.copy_(block_amax(block_scales, scaling, device).reshape(quantizer.amax.shape))
        quantizer.global_amax = global_amax(scaling.tensor_scale).to(device)


def _find(model: nn.Module, name: str, pair: Pair) -> NVFP4StaticQuantizer:
    """Find and check the quantizer of a tensor."""
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
    """Check that the model's weight is the checkpoint's: by its shape, and by the magnitudes of some of its blocks.

    In units of its MXFP4 scale, the largest magnitude of a block is one of E2M1; under another checkpoint's scales,
    some block soon has another. No codes are read for this.
    """
    where = f"{pair.codes.name} ({pair.codes.path.name})"
    if tuple(rows.shape) != pair.shape:
        raise QuantizerError(f"{name}: quantizes {list(rows.shape)} in blocks, but {where} holds {list(pair.shape)}")
    if rows.is_meta or rows.dtype not in (torch.bfloat16, torch.float32):
        return  # of other dtypes, not every value is exact
    first = (rows[0] if pair.bank else rows)[: max(1, _SAMPLE // pair.shape[-1])]
    blocks = first.reshape(-1, MX_BLOCK).float().abs().amax(dim=1).cpu()
    exponents = files[pair.scales.path].read(pair.scales.start, len(blocks)).astype(np.int32) - pair.bias
    k = torch.from_numpy(exponents)
    ratio = torch.ldexp(torch.ldexp(blocks, -(k // 2)), k // 2 - k)  # in two steps: 2^127 and 2^-127 are at the ends
    if not torch.equal(round_e2m1(ratio), ratio):
        block = int((round_e2m1(ratio) != ratio).nonzero()[0])
        raise QuantizerError(
            f"{name}: block {block} of the model's weight reaches {blocks[block]:g}, which no code of {where} gives "
            f"under its scale 2^{int(k[block])}; expected the checkpoint that the model was loaded from"
        )
