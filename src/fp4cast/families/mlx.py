"""MLX's `mxfp4`, seen under the names and in the shapes of the Hub's checkpoints: a view, and the family it shows.

Codes are words of eight, U32 [.., K/8], of the same bytes; scales U8 [.., K/32], biased by 127; all experts of a
projection are one tensor, `mlp.switch_mlp`. Read in ml-explore/mlx-lm at d78bf58 (mlx_lm/utils.py: `quantize_model`,
`save_config`; `sanitize` of each model in mlx_lm/models), and run: mlx 0.32.4 and mlx-lm 0.32.2 on a CPU,
tests/fixtures/make_mlx.py. `sanitize` changes the weights of many models; those below it only renames and stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Shard, Tensor
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.errors import ShapeError, UnsupportedError
from fp4cast.families.family import Family
from fp4cast.families.quark import CODES, SCALES
from fp4cast.families.views import renamed

MODELS = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmoe")

_CODES, _SCALES = ".weight", ".scales"
_STACKED = re.compile(r"(.*\.mlp)\.switch_mlp\.(gate_proj|up_proj|down_proj)")
_MOST_EXPERTS = 4096  # Kimi-K3 has 896; a header can claim any number
_WAY_OUT = "Name the checkpoint that it was made from"


def as_on_the_hub(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with MLX's mxfp4 under the Hub's names; any other as it is.

    Raises:
        UnsupportedError: mlx-lm changes weights of this model in ways that are not read here, or its embeddings are
            MXFP4.
        ShapeError: a tensor of all experts has none, or too many.
    """
    modules = set(mxfp4_modules(checkpoint.tensors))
    if not modules:
        return checkpoint
    kind = checkpoint.config.get("model_type")
    if kind not in MODELS:
        raise UnsupportedError(
            f"{checkpoint.path}: MLX mxfp4 of a model of type {str(kind)[:100]!r}, whose weights mlx-lm may have "
            f"changed beyond their names; expected {', '.join(MODELS)}. {_WAY_OUT}"
        )
    shards = {file: _renamed(shard, modules) for file, shard in checkpoint.shards.items()}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization"}  # a second copy
    return replace(checkpoint, config=config, shards=shards, renamed=True)


def mxfp4_modules(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The modules whose tensors have the dtypes and shapes of mxfp4: words of eight codes, a scale for each four."""
    for name, words in tensors.items():
        module = name.removesuffix(_CODES)
        scales = tensors.get(module + _SCALES)
        if module == name or scales is None or (words.dtype, scales.dtype) != ("U32", "U8"):
            continue
        if scales.shape and words.shape == (*scales.shape[:-1], scales.shape[-1] * 4):
            yield module


def _renamed(shard: Shard, modules: set[str]) -> Shard:
    metadata = {key: value for key, value in shard.metadata.items() if key != "format"}  # mlx, which it is no longer
    return replace(renamed(shard, lambda tensor: _views(tensor, modules)), metadata=metadata)


def _views(tensor: Tensor, modules: set[str]) -> Iterator[Tensor]:
    """A tensor under its name on the Hub, or the tensors of all experts that it holds."""
    module, _, leaf = tensor.name.rpartition(".")
    if module in modules and f".{leaf}" == _CODES:
        if module.endswith("embed_tokens"):
            raise UnsupportedError(
                f"{tensor.path}: {tensor}: its embeddings are MXFP4, which no engine reads as NVFP4; expected BF16. "
                f"{_WAY_OUT}"
            )
        tensor = tensor._replace(dtype="U8", shape=(*tensor.shape[:-1], tensor.shape[-1] * 4))
    elif module in modules and f".{leaf}" == _SCALES:
        leaf = "weight_scale"
    if (stacked := _STACKED.fullmatch(module)) is None:
        yield tensor._replace(name=f"{module}.{leaf}" if module else tensor.name)
        return
    experts = tensor.shape[0] if tensor.shape else 0
    if not 0 < experts <= min(_MOST_EXPERTS, tensor.nbytes):
        raise ShapeError(
            f"{tensor.path}: {tensor}: expected a row or a matrix for each of 1 to {_MOST_EXPERTS} experts"
        )
    size = tensor.nbytes // experts
    for expert in range(experts):
        name = f"{stacked[1]}.experts.{expert}.{stacked[2]}.{leaf}"
        yield tensor._replace(name=name, shape=tensor.shape[1:], start=tensor.start + expert * size, nbytes=size)


def _described(checkpoint: Checkpoint) -> bool:
    section = find_quantization_config(checkpoint.config).section
    return any(each.get("mode") == "mxfp4" for each in (section, *section.values()) if isinstance(each, dict))


MLX = Family(
    name="mlx-mxfp4",
    title="MLX mxfp4",
    codes=CODES,
    scales=SCALES,
    layouts=("modelopt",),
    described=_described,
    known_as="compressed-tensors",
)
