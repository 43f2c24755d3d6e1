"""What a receipt keeps of the MXFP4 checkpoint that a conversion read: what the NVFP4 weights alone do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Original:
    """The original of a conversion; every field is empty where a receipt says nothing of it.

    Attributes:
        config: the text of its config.json.
        scales: the dtype of its scales.
        headers: the digest of each shard's header, by file name.
        outside: by module, the exponents of blocks outside of the window, which block scales do not tell: as a text.
        lost: the modules of which some exponents are known to nobody any more: they were too many, or a rounding lost
            more. The values of the former are kept.
        beside: the text of its hf_quant_config.json.
    """

    config: str = ""
    scales: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    beside: str = ""

    @classmethod
    def read(cls, value: object) -> Original:
        """Read a receipt's entry. It is untrusted: what no conversion writes is left out."""
        if not isinstance(value, dict):
            return cls()
        config, scales, lost, beside = (value.get(key) for key in ("config", "scales", "lost", "beside"))
        return cls(
            config if isinstance(config, str) else "",
            scales if isinstance(scales, str) else "",
            _texts(value.get("headers")),
            _texts(value.get("outside")),
            frozenset(map(str, lost)) if isinstance(lost, list) else frozenset(),
            beside if isinstance(beside, str) else "",
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "config": self.config,
            "scales": self.scales,
            "headers": dict(sorted(self.headers.items())),
            "outside": dict(sorted(self.outside.items())),
            "lost": sorted(self.lost),
            **({"beside": self.beside} if self.beside else {}),
        }


def _texts(value: object) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}
