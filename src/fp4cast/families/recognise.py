"""The table of MXFP4 source families: how codes and scales are named, typed, shaped, paired and scaled together.

Families are recognised by tensor names *and* dtypes; a config alone proves nothing. All store two E2M1 codes a byte,
low nibble = even element along K, and row-major E8M0 scales; the differences are in `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import manifest
from fp4cast.errors import PartnerError, ShapeError, UnsupportedError
from fp4cast.families.refused import REFUSED, describe
from fp4cast.formats import E8M0_BIAS

__all__ = [
    "FAMILIES",
    "UNQUANTIZED",
    "Family",
    "Pair",
    "Source",
    "fused_group",
    "read_source",
]

BLOCK_BYTES = 16  # 32 codes
UNQUANTIZED = frozenset({"BF16", "F16", "F32", "F64"})  # safetensors dtypes of weights that nobody quantized


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of checkpoints spells an MXFP4 tensor.

    Attributes:
        name: as `inspect` prints it.
        title: for people.
        codes: suffix of the codes' name after the module's name.
        scales: suffix of the scales' name.
        codes_dtype: safetensors dtype of the codes.
        scales_dtypes: safetensors dtypes of the scales.
        blocked: codes are [E, N, K/32, 16] for a whole bank of experts; otherwise [N, K/2] for one projection.
        module: a pattern that some module's name matches, for the family to be this one.
    """

    name: str
    title: str
    codes: str
    scales: str
    codes_dtype: str
    scales_dtypes: frozenset[str]
    blocked: bool = False
    module: str = ""


# The first family with a pair of tensors in the checkpoint is the checkpoint's.
FAMILIES = (
    Family("gpt-oss", "gpt-oss", "_blocks", "_scales", "U8", frozenset({"U8"}), blocked=True),
    Family("deepseek-v4", "DeepSeek-V4", ".weight", ".scale", "I8", frozenset({"F8_E8M0"}), module=r"\.experts\."),
    Family(
        "kimi-k3",
        "Kimi-K3",
        ".weight_packed",
        ".weight_scale",
        "U8",
        frozenset({"U8", "F8_E8M0"}),
        module=r"^language_model\.model\.layers\.\d+\.block_sparse_moe\.experts\.",
    ),
    Family(
        "compressed-tensors",
        "compressed-tensors mxfp4-pack-quantized",
        ".weight_packed",
        ".weight_scale",
        "U8",
        frozenset({"U8", "F8_E8M0"}),
    ),
)

# Projections that engines fuse into one matrix with one tensor scale: vLLM takes the largest, TensorRT-LLM asserts.
_FUSED = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_GROUP = {leaf: group for group in _FUSED for leaf in group}


@dataclass(frozen=True, slots=True)
class Pair:
    """One MXFP4 tensor.

    Attributes:
        module: the name that both tensors share, `model.layers.0.mlp.experts.gate_up_proj`.
        codes: uint8 codes, [N, K/2] or [E, N, K/32, 16].
        scales: E8M0 bytes, [N, K/32] or [E, N, K/32].
        bias: exponent k is a scale byte minus this.
    """

    module: str
    codes: Tensor
    scales: Tensor
    bias: int = E8M0_BIAS

    @property
    def experts(self) -> int:
        """E of a bank of experts, 1 for a single projection."""
        return self.scales.shape[0] if len(self.scales.shape) == 3 else 1

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.scales.shape[-2]

    @property
    def row_blocks(self) -> int:
        """K / 32."""
        return self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] of a projection, [E, N, K] of a bank of experts."""
        return (*self.scales.shape[:-1], self.row_blocks * 32)

    @property
    def blocks(self) -> int:
        """MX blocks of the whole tensor."""
        return self.scales.nbytes

    @property
    def elements(self) -> int:
        """Weights of the whole tensor."""
        return self.blocks * 32


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint whose MXFP4 tensors have been found.

    Attributes:
        checkpoint: the opened directory.
        family: the row of the table that it matches.
        pairs: its MXFP4 tensors by module, in the order of their codes.
    """

    checkpoint: Checkpoint
    family: Family
    pairs: Mapping[str, Pair]


def fused_group(module: str) -> tuple[str, tuple[str, ...]]:
    """(domain name, modules) of the projections that must share a tensor scale with this one.

    >>> fused_group("layers.0.ffn.experts.3.w3")
    ('layers.0.ffn.experts.3.w1+w3', ('layers.0.ffn.experts.3.w1', 'layers.0.ffn.experts.3.w3'))
    """
    parent, _, leaf = module.rpartition(".")
    group = _GROUP.get(leaf)
    if group is None:
        return module, (module,)
    prefix = f"{parent}." if parent else ""
    return prefix + "+".join(group), tuple(prefix + member for member in group)


def _bias(family: Family, config: Mapping[str, Any]) -> int:
    """compressed-tensors 0.13.x wrote scale bytes that are two too low; 0.14.0 fixed it."""
    version = str(manifest(config)[1].get("version", ""))
    packed = family.codes == ".weight_packed"
    return E8M0_BIAS - 2 if packed and re.match(r"0\.13(\D|$)", version) else E8M0_BIAS


def _check_shapes(pair: Pair, family: Family) -> None:
    codes, scales = pair.codes, pair.scales
    if scales.dtype not in family.scales_dtypes:
        expected = " or ".join(sorted(family.scales_dtypes))
        raise ShapeError(f"{scales.path}: {scales}: expected {expected} scales beside {codes}")
    if len(codes.shape) != (4 if family.blocked else 2):
        expected = "[E, N, K/32, 16]" if family.blocked else "[N, K/2]"
        raise ShapeError(f"{codes.path}: {codes}: expected codes of shape {expected}")
    if family.blocked and codes.shape[-1] != BLOCK_BYTES:
        raise ShapeError(f"{codes.path}: {codes}: expected {BLOCK_BYTES} bytes a block, got {codes.shape[-1]}")
    expected_scales = codes.shape[:-1] if family.blocked else (codes.shape[0], codes.shape[1] // BLOCK_BYTES)
    if scales.shape != expected_scales or codes.nbytes != scales.nbytes * BLOCK_BYTES:
        raise ShapeError(
            f"{scales.path}: {scales}: expected shape {list(expected_scales)}, one scale for each 32 codes of {codes}"
        )
    if not scales.nbytes:
        raise ShapeError(f"{codes.path}: {codes} is empty; expected at least one block")


def _find_pairs(family: Family, tensors: Mapping[str, Tensor], bias: int) -> dict[str, Pair]:
    """All pairs of a family.

    Raises:
        PartnerError: codes without scales, or scales without any weight.
        ShapeError: a pair whose parts do not fit.
    """
    pairs: dict[str, Pair] = {}
    for name, codes in tensors.items():
        if codes.dtype != family.codes_dtype or not name.endswith(family.codes):
            continue
        module = name.removesuffix(family.codes)
        scales = tensors.get(module + family.scales)
        if scales is None and family.codes == ".weight" and not re.search(family.module, name):
            continue  # another table of one-byte integers
        if scales is None:
            raise PartnerError(
                f"{codes.path}: {codes} has no scales: expected {module + family.scales!r} in one of the shards"
            )
        pairs[module] = Pair(module, codes, scales, bias)
        _check_shapes(pairs[module], family)
    return pairs


def _check_orphans(family: Family, tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
    """Every scale belongs to codes, or to a weight of another format that is named alike (FP8 neighbours)."""
    for name, scales in tensors.items():
        if scales.dtype in family.scales_dtypes and name.endswith(family.scales):
            module = name.removesuffix(family.scales)
            if module not in pairs and f"{module}.weight" not in tensors:
                raise PartnerError(
                    f"{scales.path}: {scales} has no codes: expected {module + family.codes!r} in one of the shards"
                )


def _matches(family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether some tensor has the family's codes, and scales of the family's dtype (or none that is known at all)."""
    for name, tensor in tensors.items():
        if tensor.dtype == family.codes_dtype and name.endswith(family.codes) and re.search(family.module, name):
            module = name.removesuffix(family.codes)
            scales = tensors.get(module + family.scales)
            if scales is not None and scales.dtype in family.scales_dtypes:
                return True
            if scales is None and not any(module + partner in tensors for _, _, partner, *_ in REFUSED):
                return True  # `_find_pairs` will name the missing partner
    return False


def read_source(checkpoint: Checkpoint) -> Source:
    """Recognise a checkpoint's family and pair its MXFP4 tensors, across shards.

    Raises:
        UnsupportedError: it holds no MXFP4 weights, or a layout that is refused; the message says what it is.
        PartnerError: codes without scales, or scales without codes.
        ShapeError: codes and scales that do not fit together.
    """
    tensors = checkpoint.tensors
    for family in FAMILIES:
        if _matches(family, tensors):
            pairs = _find_pairs(family, tensors, _bias(family, checkpoint.config))
            _check_orphans(family, tensors, pairs)
            return Source(checkpoint, family, pairs)
    what, hint = describe(checkpoint.config, tensors)
    raise UnsupportedError(f"{checkpoint.path}: {what}. {hint}")
