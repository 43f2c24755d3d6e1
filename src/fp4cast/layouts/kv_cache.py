"""The format of the KV cache that a checkpoint asks engines for: none of its own, or FP8.

FP8 as nvidia-modelopt 0.47 exports it: a layer has one scale for keys and one for values, the largest magnitude over
448. `fp8` means that calibration found them, `fp8_cast` that both are 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, get_args

from fp4cast.errors import UsageError
from fp4cast.formats import KvCache

KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
FP8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}

_MODELOPT_S = ("fp8_affine", "int8", "nvfp4", "nvfp4_affine", "nvfp4_cast", "nvfp4_rotate")
# Attention as transformers' models have it, by its projections; neither linear attention, nor one with a latent cache.
_PROJECTIONS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_TOWERS = re.compile("vision|visual|image|audio")


def find_kv_cache(name: str) -> KvCache:
    """The format of that name.

    Raises:
        UsageError: there is none, or it is one of ModelOpt's that fp4cast does not write.
    """
    found = next((each for each in KV_CACHES if each == name), None)
    if found is None:
        known = f"expected {', '.join(KV_CACHES[:-1])} or {KV_CACHES[-1]}"
        if name in _MODELOPT_S:
            raise UsageError(
                f"--kv_cache_qformat {name}: only FP8 without offsets is written for the KV cache; {known}"
            )
        raise UsageError(f"unknown kv_cache_qformat {name!r}; {known}")
    return found


def plain_attention(names: Iterable[str]) -> list[str]:
    """The modules among the tensors' names that are attention with keys and values of their own, sorted."""
    projections: dict[str, set[str]] = defaultdict(set)
    for name in names:
        attention, _, projection = name.rpartition(".")[0].rpartition(".")
        if attention.endswith("self_attn") and projection.endswith("_proj"):
            projections[attention].add(projection)
    return sorted(name for name, found in projections.items() if found in _PROJECTIONS and not _TOWERS.search(name))
