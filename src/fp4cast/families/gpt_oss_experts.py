"""gpt-oss with a tensor for each projection of each expert: fine-tunes in compressed-tensors, and AMD Quark's.

llm-compressor makes linear layers of a bank before it quantizes, gate and up no longer interleaved, and none of them
again on saving (vllm-project/llm-compressor at ab1ba3e, src/llmcompressor/modeling/moe/conversion_mappings.py); Quark
keeps gate and up as one (vLLM 0.32.0, model_executor/models/gpt_oss.py:830-836). Tensors and configs are those of other
models, but engines load gpt-oss in their own way, so the rows about other models do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.families.compressed_tensors import COMPRESSED_TENSORS
from fp4cast.families.family import Family
from fp4cast.families.quark import QUARK

_EXPERT = r"\.mlp\.experts\.\d+\."


def _of_gpt_oss(others: Callable[[Checkpoint], bool] | None) -> Callable[[Checkpoint], bool]:
    """Whether a checkpoint is gpt-oss's, and what describes other models describes it."""
    return lambda found: found.config.get("model_type") == "gpt_oss" and (others is None or others(found))


def _named(family: Family, name: str) -> Family:
    return replace(
        family,
        name=name,
        title=f"single-expert gpt-oss ({family.title.partition(' mxfp4')[0]})",
        module=_EXPERT,
        described=_of_gpt_oss(family.described),
        known_as="gpt-oss-experts",
        attention=None,
    )


GPT_OSS_EXPERTS = _named(COMPRESSED_TENSORS, "gpt-oss-experts")
GPT_OSS_QUARK = _named(QUARK, "gpt-oss-quark")
