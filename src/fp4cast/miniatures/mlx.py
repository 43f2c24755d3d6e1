"""MLX: a Qwen3-MoE as mlx-lm 0.32 saves it, with all experts of a projection in one tensor."""

from __future__ import annotations

import numpy as np

from fp4cast.miniatures.compressed_tensors import add_moe
from fp4cast.miniatures.draft import Array, Draft


def draft_mlx(draft: Draft) -> None:
    """The weights of the compressed-tensors miniature; the scales of a layer's down_proj lie in the other shard."""
    add_moe(draft, ".weight")
    draft.metadata = {"format": "mlx"}
    for i, tensors in enumerate(draft.files):
        stacks: dict[str, list[tuple[str, Array]]] = {}
        for name in [name for name in tensors if ".experts." in name]:
            expert, _, leaf = name.partition(".experts.")[2].partition(".")
            stacked = f"{name.partition('.experts.')[0]}.switch_mlp.{leaf}".replace(".weight_scale", ".scales")
            stacks.setdefault(stacked, []).insert(int(expert), tensors.pop(name))
        for name, parts in stacks.items():
            array = np.stack([part for _, part in parts])
            words = name.endswith(".weight")
            home = draft.files[i ^ (name.endswith("layers.0.mlp.switch_mlp.down_proj.scales"))]
            home[name] = ("U32", array.view("<u4")) if words else ("U8", array)
    said = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    draft.config |= {"quantization": said, "quantization_config": said}
