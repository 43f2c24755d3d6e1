"""Check gpt-oss as the plugin `fp4cast.vllm` prepares it for Marlin, in plain torch, and on two ranks.

Usage: python vllm_gpt_oss.py logits SRC DST
       python vllm_gpt_oss.py ranks DST OUT
       python vllm_gpt_oss.py on-load SRC DST

`logits`: vLLM loads DST and prepares it for Marlin with its own code (only the repacking of codes, a CUDA kernel, is
left out). A reference then computes as that kernel does (csrc/moe/marlin_moe_wna16/marlin_template.h, `write_result`),
from the prepared scales and biases, inside of transformers' model of SRC, and must give that model's logits.
`on-load`: casting SRC while loading leaves exactly what loading DST does.
`ranks`: two processes load DST as tensor and as expert parallel, and hold together what the files hold.
"""

import vllm_loader  # noqa: I001  sets the environment first

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias

from fp4cast.vllm import register

ALPHA, LIMIT = 1.702, 7.0
PROJECTIONS = {"w13": "gate_up_proj", "w2": "down_proj"}
SUFFIXES = {"weight": "", "weight_scale": "_weight_scale", "bias": "_bias"}


def choose_marlin() -> None:
    """Let vLLM prepare for Marlin on a CPU."""
    modelopt.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.MARLIN, MarlinExperts)
    marlin_utils_fp4._repack_marlin_experts = lambda weight, *_: weight


def unpermute(bias: torch.Tensor) -> torch.Tensor:
    """The inverse of `marlin_permute_bias`, by rows."""
    order = marlin_permute_bias(torch.arange(bias.shape[-1]))
    result = torch.empty_like(bias)
    result[:, order] = bias
    return result


class Kernel:
    """What Marlin computes for one layer, in float64."""

    def __init__(self, layer: Any, loaded: dict[str, torch.Tensor], name: str) -> None:
        self.inner = layer.w2_weight.shape[2] * 2
        config = layer.quant_method.moe_quant_config
        self.scales = {"w13": config.g1_alphas.double(), "w2": config.g2_alphas.double()}
        self.biases = {"w13": unpermute(config.w1_bias).double(), "w2": unpermute(config.w2_bias).double()}
        self.hidden = self.biases["w2"].shape[1]
        # The kernel's own scales are these, times a power of two that its tensor scale takes back.
        self.raw = {
            held: vllm_loader.dequantize(
                loaded[f"{name}.{held}_weight"],
                loaded[f"{name}.{held}_weight_scale"],
                (loaded[f"{name}.{held}_weight_scale_2"].view(len(scale), -1)[:, 0].double() / scale)[:, None, None],
            )
            for held, scale in self.scales.items()
        }

    def __call__(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Both products, the scales and biases where the kernel has them."""
        size = hidden_states.shape[1]
        x = torch.nn.functional.pad(hidden_states.double(), (0, self.hidden - size))
        result = torch.zeros_like(x)
        for token, experts in enumerate(indices.tolist()):
            for place, expert in enumerate(experts):
                first = self.raw["w13"][expert] @ x[token] * self.scales["w13"][expert] + self.biases["w13"][expert]
                gate, up = first[0::2].clamp(max=LIMIT), first[1::2].clamp(-LIMIT, LIMIT)
                middle = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
                second = self.raw["w2"][expert] @ middle + self.biases["w2"][expert]  # no tensor scale yet
                result[token] += second * (weights[token, place].double() * self.scales["w2"][expert])
        assert not result[:, size:].any(), "the padding reaches the output"
        return result[:, :size].to(hidden_states.dtype)


@torch.no_grad()
def logits(source: Path, destination: Path) -> bool:
    """Whether transformers' model of the source has the same logits with the kernel's arithmetic inside."""
    choose_marlin()
    held, loaded = vllm_loader.load(destination)
    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32).float().eval()
    tokens = torch.randint(0, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, use_cache=False).logits
    kernels = {}
    for name, layer in held.named_modules():
        if hasattr(layer, "fp4cast_regions"):
            kernels[name.removesuffix(".routed_experts")] = Kernel(layer, loaded, name)

    def difference() -> float:
        found = model(tokens, use_cache=False).logits
        return (found - expected).abs().max().item()

    for name, kernel in kernels.items():
        experts = model.get_submodule(name)
        experts.forward = lambda h, router_indices=None, routing_weights=None, kernel=kernel: kernel(
            h, router_indices, routing_weights
        )
    right = difference()
    for kernel in kernels.values():  # as a plugin would have it that knows nothing of the folded tensor scale
        kernel.biases["w2"] = kernel.biases["w2"] * kernel.scales["w2"][:, None]
    wrong = difference()
    spread = expected.std().item()
    print(
        f"{len(kernels)} layers: logits differ by {right:.2e}, with undivided biases by {wrong:.2e}, std {spread:.2f}"
    )
    return bool(kernels) and right < 1e-4 < 100 * right + 1e-2 < wrong


def rank(number: int, destination: Path, out: Path, parallel: str) -> None:
    """One of two processes."""
    os.environ["VLLM_DIST_IDENT"] = f"fp4cast-{os.getppid()}-{parallel}"  # names their shared memory
    vllm_loader.stub_kernels()
    register()
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": parallel == "ep"}
    held, loaded = vllm_loader.load(destination, number, out / f"{parallel}-store", **options)
    parts = {
        f"{name}.{leaf}": region(loaded[f"{name}.{leaf}"])
        for name, layer in held.named_modules()
        for leaf, region in getattr(layer, "fp4cast_regions", {}).items()
    }
    torch.save({name: part.clone() for name, part in parts.items()}, out / f"{parallel}-{number}.pt")


def stored(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What the files hold for a parameter of vLLM, in vLLM's orientation."""
    base, _, leaf = name.replace(".routed_experts", "").rpartition(".")
    held, _, suffix = leaf.partition("_")
    tensor = tensors[f"{base}.{PROJECTIONS[held]}{SUFFIXES[suffix]}"]
    return tensor if suffix == "bias" else tensor.view(torch.uint8).transpose(1, 2)


def joined(parallel: str, leaf: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """What the ranks hold together."""
    parts = [part if leaf.endswith("bias") else part.view(torch.uint8) for part in parts]
    if parallel == "ep":
        return torch.cat(parts)
    if leaf == "w2_bias":  # all but one rank add nothing
        return torch.stack(parts).sum(0, dtype=parts[0].dtype)
    return torch.cat(parts, dim=2 if leaf.startswith("w2") else 1)


def ranks(destination: Path, out: Path) -> bool:
    """Load on two ranks, in both ways, and compare what they hold together with the files."""
    tensors, good = vllm_loader.read_checkpoint(destination), True
    for parallel in ("tp", "ep"):
        torch.multiprocessing.spawn(rank, (destination, out, parallel), nprocs=2)
        parts = [torch.load(out / f"{parallel}-{number}.pt") for number in (0, 1)]
        wrong = [
            name
            for name in parts[0]
            if not torch.equal(
                joined(parallel, name.rpartition(".")[2], [part[name] for part in parts]), stored(tensors, name)
            )
        ]
        print(f"{parallel}: {len(parts[0]) - len(wrong)} parameters equal, {len(wrong)} differ {wrong[:3]}", flush=True)
        good &= not wrong
    return good


def on_load(source: Path, destination: Path) -> bool:
    """Whether both are equal, bit for bit, once they are prepared for the kernel."""
    choose_marlin()
    cast, _ = vllm_loader.load(source, quantization="fp4cast")
    converted, _ = vllm_loader.load(destination)
    expected, found = dict(converted.named_parameters()), dict(cast.named_parameters())
    wrong = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        if name.endswith("_input_global_scale"):
            continue  # vLLM registers them for W4A16 experts too, and reads none
        a, b = expected[name].data, found[name].data
        if a.dtype != b.dtype or not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            wrong.append(name)
    print(f"{len(expected) - len(wrong)} parameters equal, {len(wrong)} differ {wrong[:3]}", flush=True)
    return not wrong


def main() -> int:
    """Do what is asked for."""
    command, *paths = sys.argv[1:]
    if command == "on-load":
        vllm_loader.stub_kernels()
        register()
        return 0 if on_load(*map(Path, paths)) else 1
    if command == "logits":
        vllm_loader.stub_kernels()
        register()
        return 0 if logits(*map(Path, paths)) else 1
    return 0 if ranks(*map(Path, paths)) else 1


if __name__ == "__main__":
    sys.exit(main())
