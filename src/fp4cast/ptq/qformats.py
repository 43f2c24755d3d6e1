"""Formats, which turn quantizers on: ordered wildcard rules over their names, the last match wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp4cast.errors import UsageError
from fp4cast.formats import Activations

Rule = tuple[str, bool]  # (pattern of a quantizer's full name, whether it is on)

# Never quantized: these rules come last in every format.
_OFF: tuple[Rule, ...] = tuple(
    (pattern, False)
    for pattern in (
        "*lm_head*", "*embed*", "*router*", "*.gate.*", "*shared_expert_gate*", "*vision*", "*visual*", "*image*",
        "*audio*", "*multi_modal_projector*", "mtp.*", "*.mtp.*", "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*",
    )
)  # fmt: skip


def _both(*patterns: str) -> tuple[Rule, ...]:
    return tuple((f"{pattern}{kind}_quantizer", True) for pattern in patterns for kind in ("weight", "input"))


@dataclass(frozen=True)
class QFormat:
    """A named table of rules.

    Attributes:
        name: as on the command line.
        rules: in order; a quantizer that none matches is off.
        activations: "w4a4" or "w4a16".
    """

    name: str
    rules: tuple[Rule, ...]
    activations: Activations = "w4a4"

    def enables(self, quantizer: str) -> bool:
        """Whether a quantizer is on, by its full name in the model."""
        on = False
        for pattern, value in (*self.rules, *_OFF):
            if fnmatchcase(quantizer, pattern):
                on = value
        return on


_MLP = _both("*mlp*", "*feed_forward*", "*block_sparse_moe*", "*.ffn.*")
QFORMATS: dict[str, QFormat] = {
    each.name: each
    for each in (
        QFormat("nvfp4", _both("*")),
        QFormat("nvfp4_mlp_only", _MLP),
        QFormat("nvfp4_experts_only", _both("*mlp.experts*", "*feed_forward.experts*", "*block_sparse_moe.experts*")),
        QFormat("nvfp4_omlp_only", (*_MLP, *_both("*o_proj*"))),
        QFormat("nvfp4_mlp_weight_only", tuple(rule for rule in _MLP if "weight" in rule[0]), "w4a16"),
        QFormat("w4a16_nvfp4", (("*weight_quantizer", True),), "w4a16"),
    )
}

KV_CACHE = QFormat("fp8", (("*[kv]_bmm_quantizer", True),))  # ModelOpt's names; no towers either


def find_qformat(names: str | Sequence[str], cast: bool = False) -> QFormat:
    """Find the one format that the user named.

    Args:
        names: what the user gave, perhaps several with commas.
        cast: whether the weights are to be cast from MXFP4, which needs one NVFP4 format.

    Raises:
        UsageError: the name is unknown, or there are several.
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    why = " with --cast_mxfp4_to_nvfp4" if cast else ""
    if len(given) != 1:
        raise UsageError(f"expected one qformat{why}, got {len(given)}: {', '.join(given)}")
    if given[0] not in QFORMATS:
        raise UsageError(f"unknown qformat {given[0]!r}{why}: expected one of {', '.join(QFORMATS)}")
    return QFORMATS[given[0]]
