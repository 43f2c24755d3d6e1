"""Recognise a checkpoint's family, and pair its MXFP4 tensors across shards.

Families are recognised by tensor names *and* dtypes; a config alone proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fp4cast.checkpoints.directory import CONFIG, Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import misplaced_quantization_configs
from fp4cast.errors import CheckpointError, PartnerError, ShapeError, UnsupportedError
from fp4cast.families import gpt_oss_original, mlx
from fp4cast.families.compressed_tensors import COMPRESSED_TENSORS
from fp4cast.families.deepseek_v4 import DEEPSEEK_V4
from fp4cast.families.family import Family, Pair, Source
from fp4cast.families.gpt_oss import GPT_OSS
from fp4cast.families.gpt_oss_experts import GPT_OSS_EXPERTS, GPT_OSS_QUARK
from fp4cast.families.kimi_k3 import KIMI_K3
from fp4cast.families.ling import LING
from fp4cast.families.mimo import MIMO
from fp4cast.families.modelopt import MODELOPT
from fp4cast.families.quark import QUARK
from fp4cast.families.refused import REFUSED, describe
from fp4cast.formats import MX_BLOCK_BYTES

# The first family with a pair of tensors in the checkpoint is the checkpoint's.
FAMILIES = (
    GPT_OSS, GPT_OSS_EXPERTS, GPT_OSS_QUARK, LING, DEEPSEEK_V4, KIMI_K3, COMPRESSED_TENSORS, QUARK, MODELOPT, MIMO,
    mlx.MLX,
)  # fmt: skip


def read_source(checkpoint: Checkpoint) -> Source:
    """Recognise a checkpoint's family and pair its MXFP4 tensors, across shards.

    Raises:
        UnsupportedError: it holds no MXFP4 weights, or a layout that fp4cast refuses; the message says which.
        CheckpointError: its config lacks what its layout needs; or it is nobody's, and its quantization_config is not
            where, or not what, anybody reads.
        PartnerError: codes without scales, or scales without codes.
        ShapeError: codes and scales that do not fit together.
    """
    for view in (gpt_oss_original.as_on_the_hub, mlx.as_on_the_hub):
        checkpoint = view(checkpoint)
    tensors = checkpoint.tensors
    for family in FAMILIES:
        if _matches(family, tensors) and (family.described is None or family.described(checkpoint)):
            pairs = _find_pairs(family, tensors, family.bias(checkpoint.config))
            _check_orphans(family, tensors, pairs)
            _check_other_scales(tensors, pairs)
            return Source(checkpoint, family, pairs)
    for sentence in misplaced_quantization_configs(checkpoint.config):
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {sentence}")
    what, hint = describe(checkpoint.config, tensors, [family.title for family in FAMILIES])
    raise UnsupportedError(f"{checkpoint.path}: {what}. {hint}")


def _codes(family: Family, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are named and typed like the family's codes."""
    suffix, dtypes = family.codes
    return ((name, tensor) for name, tensor in tensors.items() if tensor.dtype in dtypes and name.endswith(suffix))


def _matches(family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether some codes are the family's, with scales of the family's dtype (or without any known scales)."""
    for name, _ in _codes(family, tensors):
        if re.search(family.module, name):
            module = name.removesuffix(family.codes.text)
            scales = tensors.get(module + family.scales.text)
            if scales is not None and scales.dtype in family.scales.dtypes:
                return True
            if scales is None and not any(module + refused.partner in tensors for refused in REFUSED):
                return True  # `_find_pairs` will name the missing partner
    return False


def _find_pairs(family: Family, tensors: Mapping[str, Tensor], bias: int) -> dict[str, Pair]:
    """Find all pairs of a family.

    Raises:
        PartnerError: codes without scales.
        ShapeError: codes and scales that do not fit together.
    """
    pairs: dict[str, Pair] = {}
    for name, codes in _codes(family, tensors):
        module = name.removesuffix(family.codes.text)
        scales = tensors.get(module + family.scales.text)
        if scales is None and family.ambiguous and not re.search(family.module, name):
            continue
        if scales is None:
            raise PartnerError(
                f"{codes.path}: {codes} has no scales: expected {module + family.scales.text!r} in one of the shards"
            )
        pairs[module] = Pair(module, codes, scales, bias, family.bank)
        _check_shapes(pairs[module], family)
    return pairs


def _check_shapes(pair: Pair, family: Family) -> None:
    codes, scales = pair.codes, pair.scales
    if scales.dtype == "F8_E4M3":
        raise UnsupportedError(
            f"{codes.path}: {codes} is NVFP4 already, with {scales}, beside weights in MXFP4. fp4cast casts "
            "checkpoints whose 4-bit weights are all MXFP4"
        )
    if scales.dtype not in family.scales.dtypes:
        expected = " or ".join(family.scales.dtypes)
        raise ShapeError(f"{scales.path}: {scales}: expected {expected} scales beside {codes}")
    if len(codes.shape) != (4 if family.bank else 2):
        expected = "[E, N, K/32, 16]" if family.bank else "[N, K/2]"
        raise ShapeError(f"{codes.path}: {codes}: expected codes of shape {expected}")
    if family.bank and codes.shape[-1] != MX_BLOCK_BYTES:
        raise ShapeError(f"{codes.path}: {codes}: expected {MX_BLOCK_BYTES} bytes a block, got {codes.shape[-1]}")
    expected_scales = codes.shape[:-1] if family.bank else (codes.shape[0], codes.shape[1] // MX_BLOCK_BYTES)
    if scales.shape != expected_scales or codes.nbytes != scales.nbytes * MX_BLOCK_BYTES:
        other = " (24 bytes a block are MXFP6)" if codes.nbytes == 24 * scales.nbytes else ""
        expected = f"shape {list(expected_scales)}, one scale for each 32 codes of {codes}{other}"
        raise ShapeError(f"{scales.path}: {scales}: expected {expected}")
    if not scales.nbytes:
        raise ShapeError(f"{codes.path}: {codes} is empty; expected at least one block")


def _check_orphans(family: Family, tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
    """Raise for scales that belong neither to codes nor to a weight of another format that is named alike (FP8)."""
    for name, scales in tensors.items():
        if scales.dtype in family.scales.dtypes and name.endswith(family.scales.text):
            module = name.removesuffix(family.scales.text)
            if module not in pairs and f"{module}.weight" not in tensors:
                raise PartnerError(
                    f"{scales.path}: {scales} has no codes: expected {module + family.codes.text!r} "
                    "in one of the shards"
                )


def _check_other_scales(tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
    """Raise for scales of FP8 activations: NVFP4 weights with them would be read as W4A4, or not at all.

    Raises:
        UnsupportedError: there is one.
    """
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "output_scale" or (leaf == "input_scale" and module in pairs):
            raise UnsupportedError(
                f"{tensor.path}: {tensor} scales FP8 activations beside MXFP4 weights, which has no place in an NVFP4 "
                "layout; expected weights alone (W4A16), or activations that are quantized as the model runs"
            )
