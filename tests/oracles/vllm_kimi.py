"""Check that the attention of Kimi-K3, as vLLM merges it, holds what a checkpoint says.

Usage: python vllm_kimi.py DST

The model needs a GPU to be built, its linear layers do not: they are vLLM's own, with the configuration that vLLM reads
in DST, under the names that vLLM gives them, and loaded by their own weight loaders. Prints a line for each matrix.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

# fmt: off
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import KimiK3MergedQKVGateLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig
from vllm.models.kimi_k3.nvidia.kda import _KimiGDNMergedColumnParallelLinear
from vllm.models.kimi_k3.nvidia.model import KimiK3ForConditionalGeneration, KimiLinearModel
from vllm_loader import dequantize_fp8, read_checkpoint, stub_kernels  # first: it chooses the CPU

# fmt: on
KDA = ("q_proj", "k_proj", "v_proj", "g_proj", "f_a_proj", "b_proj")  # in the order of the rows
MLA = ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")


def layers_of(at, tensors, config):
    """(matrix, its projections, the layer) of one attention, built as models/kimi_k3 builds it."""
    sizes = {name[len(at) :].removesuffix(".weight"): tensor.shape for name, tensor in tensors.items()}
    hidden = sizes["o_proj"][0]
    alone = {"quant_config": config, "bias": False}
    if f"{at}q_a_proj.weight" in tensors:
        rank, latent, gate = (sizes[name][0] for name in MLA)
        yield (
            "fused_qkv_a_g_proj",
            MLA,
            KimiK3MergedQKVGateLinear(
                hidden, rank, latent - 64, 64, 1, gate, prefix=f"{at}fused_qkv_a_g_proj", **alone
            ),
        )
        merged = MLA
    else:
        rows = [sizes[name][0] for name in KDA]
        padding = -sum(rows) % 128
        yield (
            "in_proj_qkvgfab",
            KDA,
            _KimiGDNMergedColumnParallelLinear(
                hidden, [*rows, padding], replicated_shard_id=4, tp_size=1, prefix=f"{at}in_proj_qkvgfab", **alone
            ),
        )
        merged = KDA
    for name, shape in sizes.items():
        if name.endswith("_proj") and name not in merged:
            yield name, (name,), ReplicatedLinear(shape[1], shape[0], prefix=f"{at}{name}", **alone)


def fill(layer, at, parts, tensors):
    """Load the parts with the layer's own loaders; parameters are poisoned before."""
    for leaf, parameter in layer.named_parameters():
        parameter.data.view(torch.uint8).fill_(0xFF)
        for number, part in enumerate(parts):
            stored = tensors[f"{at}{part}.{leaf}"]
            assert parameter.dtype == stored.dtype, (part, leaf, parameter.dtype, stored.dtype)
            parameter.weight_loader(parameter, stored, *((number,) if len(parts) > 1 else ()))


def values(weight, scale):
    """Of a weight in the files or in a layer."""
    return weight.double() if scale is None else dequantize_fp8(weight, scale.reshape(scale.shape[0], -1))


def main():
    """Check DST."""
    path = Path(sys.argv[1])
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    tensors = read_checkpoint(path)
    stub_kernels()
    config = ModelOptMixedPrecisionConfig.from_config(section)
    config.apply_vllm_mapper(KimiK3ForConditionalGeneration.hf_to_vllm_mapper)
    config.packed_modules_mapping = KimiLinearModel.packed_modules_mapping
    torch.set_default_dtype(torch.bfloat16)
    equal = True
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo")
        initialize_model_parallel(1)
        for at in sorted(
            {name.rpartition("o_proj")[0] for name in tensors if name.endswith("self_attn.o_proj.weight")}
        ):
            own = {n: t for n, t in tensors.items() if n.startswith(at) and n.endswith("_proj.weight")}
            own |= {n: t for n, t in tensors.items() if n.startswith(at) and n.endswith("mqa.weight")}
            for name, parts, layer in layers_of(at, own, config):
                fill(layer, at, parts, tensors)
                held, start = values(layer.weight.data, getattr(layer, "weight_scale", None)), 0
                for part in parts:
                    stored = values(tensors[f"{at}{part}.weight"], tensors.get(f"{at}{part}.weight_scale"))
                    same = torch.equal(held[start : start + len(stored)], stored)
                    start, equal = start + len(stored), equal and same
                    kind = type(layer.quant_method).__name__
                    print(f"{at}{name}[{part}]: {kind}: {'equal' if same else 'differs'}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
