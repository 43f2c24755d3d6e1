"""NVFP4 in GGUF: ggml's types, and where llama.cpp reads a tensor scale.

A block of type 40 holds four UE4M3 scales and the codes of 64 weights, and no tensor scale. llama.cpp reads one from a
tensor beside it, `blk.N.ffn_up_exps.scale` F32 [experts], and multiplies each expert's product by it: but only where
the model's graph passes it on. It loads the tensor for every architecture, so that where the graph does not, the scale
would be lost without a word. Read at ggml-org/llama.cpp 0c1e570: src/llama-model.cpp:1634-1709 (what is loaded),
src/llama-graph.cpp build_lora_mm_id (what is multiplied), src/models/*.cpp (who passes `ffn_up_exps_s`,
`ffn_gate_exps_s` and `ffn_down_exps_s` in every call of build_moe_ffn).
"""

from __future__ import annotations

import re

MXFP4, NVFP4 = 39, 40  # ggml's types
MXFP4_BYTES, NVFP4_BYTES = 17, 36  # of a block of 32, and of one of 64
NVFP4_ELEMENTS = 64
FILE_TYPES = {38: 39}  # general.file_type, MOSTLY_MXFP4_MOE and MOSTLY_NVFP4
F32 = 0
LLAMA_CPP = "llama.cpp 0c1e570"  # what was read, and run

# Not among them: gpt-oss, deepseek2, deepseek4, kimi-k3, mimo2, glm4moe, minimax-m2.
PASSES_EXPERT_SCALES = frozenset(
    {
        "cohere2moe", "deepseek32", "dots3note", "gemma4", "glm-dsa", "hy_v3", "llama", "mellum", "mistral3",
        "qwen35moe", "qwen3moe", "qwen3next", "qwen4exp",
    }
)  # fmt: skip
# Of dense layers without biases, whose scales have one element: build_qkv, build_attn and build_ffn get them. Each was
# run, and each scale changed the result.
PASSES_DENSE_SCALES = frozenset({"llama", "mistral3", "qwen3"})
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps)\.weight")
_DENSE = re.compile(r"(blk\.\d+\.(?:ffn_(?:gate|up|down)|attn_(?:q|k|v|output)))\.weight")


def scale_name(architecture: str, weight: str, dimensions: int) -> str | None:
    """The tensor that llama.cpp multiplies a weight's product by; None where it multiplies by none.

    >>> scale_name("qwen3moe", "blk.0.ffn_up_exps.weight", 3)
    'blk.0.ffn_up_exps.scale'
    >>> scale_name("gpt-oss", "blk.0.ffn_up_exps.weight", 3)
    """
    pattern, architectures = (_EXPERTS, PASSES_EXPERT_SCALES) if dimensions == 3 else (_DENSE, PASSES_DENSE_SCALES)
    found = pattern.fullmatch(weight)
    return f"{found[1]}.scale" if found and architecture in architectures else None
