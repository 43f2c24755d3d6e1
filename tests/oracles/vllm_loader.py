"""Check that vLLM's own loader reads NVFP4 checkpoints exactly.

Usage: python vllm_loader.py [--generate] DST [DST ...]

Each DST is built and loaded by vLLM (config, layer methods, weight loaders and
post-load processing are vLLM's).  Only kernel choice is replaced, because no
NVFP4 kernel exists for CPU: see `stub_kernels`.  Every parameter is filled with
0xFF before loading, so a float parameter that vLLM did not load reads as NaN.
"""

import os

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.experts import nvfp4_emulation_moe
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as ct_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as ct_linear,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])
INPUT_SCALES = ("input_scale", "input_global_scale")
BANK_BIASES = {"w13_bias": "gate_up_proj_bias", "w2_bias": "down_proj_bias"}


class Projection(NamedTuple):
    """A dequantized projection; `input_scale` is a multiplier, None when weight-only."""

    values: torch.Tensor
    input_scale: float | None


def dequantize(packed: torch.Tensor, block: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 (low nibble first) times E4M3 block scale times tensor scale, in float64."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return E2M1[codes.long()] * block.double().repeat_interleave(16, -1) * scale.double()


def dequantize_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 codes [N, K] times the scale of each block of 128 x 128, [N / 128, K / 128] rounded up, in float64."""
    rows, columns = codes.shape
    wide = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return codes.double() * wide


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the index names, or of the one file."""
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for shard in sorted(set(index.values())):
        with safe_open(path / shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    assert tensors.keys() == index.keys(), "index and shards name different tensors"
    return tensors


def input_multiplier(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor | None:
    """Return the input scale under a prefix, whichever format; a divisor's float32 reciprocal, as vLLM takes it."""
    if (divisor := tensors.get(f"{prefix}input_global_scale")) is not None:
        return 1 / divisor
    return tensors.get(f"{prefix}input_scale")


def stored_projection(tensors: dict[str, torch.Tensor], name: str) -> Projection:
    """Decode one projection straight from the files."""
    if (scale := tensors[f"{name}.weight_scale"]).ndim == 4:
        return Projection(dequantize_fp8(tensors[f"{name}.weight"], scale[:, 0, :, 0]), None)
    if (divisor := tensors.get(f"{name}.weight_global_scale")) is not None:
        packed, scale = tensors[f"{name}.weight_packed"], 1 / divisor.double()
    else:
        packed, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_2"]
    values = dequantize(packed, tensors[f"{name}.weight_scale"], scale.reshape(()))
    given = input_multiplier(tensors, f"{name}.")
    return Projection(values, None if given is None else given.item())


class WeightOnlyKernel(EmulationNvFp4LinearKernel):
    """W4A16 counterpart of vLLM's emulation kernel: dequantize, then multiply."""

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        """Multiply by the dequantized weight."""
        scales = layer.weight_scale, layer.weight_global_scale
        weight = dequantize_to_dtype(layer.weight, *scales, x.dtype, 16, swizzle=False)
        return torch.nn.functional.linear(x, weight, bias)


def stub_kernels() -> None:
    """Choose vLLM's emulation for every NVFP4 layer, and build no MoE kernel (it is Triton)."""

    def linear(use_a16: bool = False) -> EmulationNvFp4LinearKernel:
        return (WeightOnlyKernel if use_a16 else EmulationNvFp4LinearKernel)(None)

    def backend(**_: Any) -> tuple[Any, type]:
        experts = nvfp4_emulation_moe.Nvfp4QuantizationEmulationTritonExperts
        return NvFp4MoeBackend.EMULATION, experts

    def kernel(**_: Any) -> SimpleNamespace:
        experts = SimpleNamespace(process_weights_after_loading=lambda _: None)
        return SimpleNamespace(fused_experts=experts, is_monolithic=False)

    class NoKernel:
        """Of an FP8 linear layer, whose kernels need a GPU."""

        process_weights_after_loading = staticmethod(lambda _: None)
        input_quant_key = staticmethod(lambda: None)

    modelopt.init_fp8_linear_kernel = lambda **_: NoKernel()
    torch.accelerator.empty_cache = lambda: None  # raises where there is no accelerator
    for module in (modelopt, ct_linear):
        module.init_nvfp4_linear_kernel = linear
    for module in (modelopt, ct_moe):
        module.select_nvfp4_moe_backend = backend
        module.make_nvfp4_moe_kernel = kernel


class RecordingLoader(DefaultModelLoader):
    """vLLM's default loader; poisons parameters before it and copies them after it."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load, keeping what each parameter held before post-load processing."""
        for module in (m for m in model.modules() if not isinstance(m, Attention)):
            regions = getattr(module, "fp4cast_regions", {})  # without the plugin's padding
            for name, parameter in module.named_parameters(recurse=False):
                regions.get(name, lambda p: p)(parameter.data).view(torch.uint8).fill_(0xFF)
        super().load_weights(model, model_config)
        self.loaded = {n: p.detach().clone() for n, p in model.named_parameters()}


def load(
    path: Path, rank: int = 0, store: Path | None = None, **options: Any
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return the model after vLLM's post-load processing, and its parameters before that; on one of several ranks."""
    config: VllmConfig = EngineArgs(
        model=str(path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        use_tqdm_on_load=False,
        **options,
    ).create_engine_config()
    ranks = config.parallel_config.tensor_parallel_size
    loader = RecordingLoader(config.load_config)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = store or Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        destroy_model_parallel()  # the groups depend on the model: only an MoE has an expert group
        initialize_model_parallel(ranks)
        model = loader.load_model(config, config.model_config)
    return model, loader.loaded


def shards(model: torch.nn.Module, name: str, layer: Any, tensor: torch.Tensor) -> Iterator[tuple[str, slice]]:
    """Checkpoint name and rows of each projection fused into a vLLM layer's tensor."""
    parent, _, leaf = name.rpartition(".")
    leaves = model.packed_modules_mapping.get(leaf, [leaf])
    sizes = layer.output_partition_sizes if len(leaves) > 1 else [len(tensor)]
    start = 0
    for leaf, size in zip(leaves, sizes, strict=True):
        yield f"{parent}.{leaf}".lstrip("."), slice(start, start + size)
        start += size


def vllm_values(layer: Any, prefix: str, scale: torch.Tensor) -> torch.Tensor:
    """Our decode of what vLLM holds, confirmed by vLLM's own decode in float32."""
    packed, block = (getattr(layer, f"{prefix}weight{s}").data for s in ("", "_scale"))
    wide = scale[:, None, None] if packed.ndim == 3 else scale
    values = dequantize(packed, block, wide)
    theirs = dequantize_to_dtype(packed, block, scale, torch.float32, 16, swizzle=False)
    torch.testing.assert_close(theirs.double(), values, rtol=1e-6, atol=0)
    return values


def is_plain(layer: torch.nn.Module) -> bool:
    """Whether vLLM treats the layer as unquantized (norms have no method at all)."""
    method = getattr(layer, "quant_method", None)
    return method is None or isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def linear_projections(model: torch.nn.Module, name: str, layer: Any) -> Iterator[tuple[str, Projection]]:
    """Projections of a quantized linear layer, with the scales vLLM settled on."""
    method = layer.quant_method
    if isinstance(method, modelopt.ModelOptLinearMethod) and method.spec.weight == modelopt.kFp8Static128BlockSym:
        for shard, rows in shards(model, name, layer, layer.weight):
            yield shard, Projection(dequantize_fp8(layer.weight, layer.weight_scale)[rows], None)
        return
    if isinstance(method, modelopt.ModelOptLinearMethod):
        assert method.spec.weight == modelopt.kNvfp4Static, f"{name}: {method.spec}"
        weight_only = method.spec.activation is None
    else:
        assert isinstance(layer.scheme, ct_linear.CompressedTensorsW4A4Fp4), f"{name}: {layer.scheme}"
        weight_only = layer.scheme.use_a16
    values = vllm_values(layer, "", layer.weight_global_scale.data)
    given = None if weight_only else layer.input_global_scale.item()
    for shard, rows in shards(model, name, layer, values):
        yield shard, Projection(values[rows], given)


def stored_bank(tensors: dict[str, torch.Tensor], name: str) -> Projection:
    """Decode one bank of experts straight from the files; the output channel is last there."""
    codes, block = (tensors[f"{name}{suffix}"].transpose(1, 2) for suffix in ("", "_weight_scale"))
    given = tensors.get(f"{name}_input_scale")
    values = dequantize(codes, block, tensors[f"{name}_weight_scale_2"])
    return Projection(values, None if given is None else given.item())


def bank_projections(name: str, layer: Any, loaded: dict[str, torch.Tensor]) -> Iterator[tuple[str, Projection]]:
    """The banks of gpt-oss's experts, whose padding must be zeros."""
    base = name[: name.index(".experts") + len(".experts")]
    for held, stored in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        region = layer.fp4cast_regions[f"{held}_weight_scale"]
        scale = getattr(layer, f"{held}_weight_scale_2").data
        values = vllm_values(layer, f"{held}_", scale)
        rows, columns = region(getattr(layer, f"{held}_weight_scale")).shape[1:]
        assert not values[:, rows:].any() and not values[..., 16 * columns :].any(), (
            f"{name}: {held} has no clean padding"
        )
        given = None if layer.quant_method.use_a16 else loaded[f"{name}.{held}_input_scale"].unique().item()
        yield f"{base}.{stored}", Projection(values[:, :rows, : 16 * columns], given)


def expert_projections(name: str, layer: Any, loaded: dict[str, torch.Tensor]) -> Iterator[tuple[str, Projection]]:
    """Projections of NVFP4 routed experts; w13 uses the one tensor scale vLLM kept (gate's)."""
    if hasattr(layer, "fp4cast_regions"):
        yield from bank_projections(name, layer, loaded)
        return
    base = name[: name.index(".experts") + len(".experts")]
    gate, up = vllm_values(layer, "w13_", layer.w13_weight_scale_2.data).chunk(2, dim=1)
    down = vllm_values(layer, "w2_", layer.w2_weight_scale_2.data)
    w13, w2 = (input_multiplier(loaded, f"{name}.{part}_") for part in ("w13", "w2"))
    parts = {"gate_proj": (gate, w13[:, 0]), "up_proj": (up, w13[:, 1]), "down_proj": (down, w2)}
    for leaf, (values, given) in parts.items():
        for expert, value in enumerate(values):
            scale = None if layer.quant_method.use_a16 else given[expert].item()
            yield f"{base}.{expert}.{leaf}", Projection(value, scale)


def quantized_tensors(model: torch.nn.Module, loaded: dict[str, torch.Tensor]) -> dict[str, Projection]:
    """Collect the projections of every layer that vLLM treats as NVFP4."""
    found: dict[str, Projection] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedExperts):
            found |= expert_projections(name, layer, loaded)
        elif not is_plain(layer) and not isinstance(layer, Attention):
            found |= linear_projections(model, name, layer)
    return found


def plain_tensors(model: torch.nn.Module, loaded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Collect the tensors of every layer that vLLM leaves unquantized, and any linear bias, under checkpoint names."""
    found = {}
    for key, tensor in loaded.items():
        name, _, leaf = key.rpartition(".")
        layer = model.get_submodule(name)
        if leaf in BANK_BIASES:
            bias = layer.fp4cast_regions[leaf](tensor)
            assert bias.norm() == tensor.norm(), f"{key} has no clean padding"
            found[f"{name.removesuffix('.routed_experts')}.{BANK_BIASES[leaf]}"] = bias
        elif is_plain(layer) or leaf == "bias":
            for shard, rows in shards(model, name, layer, tensor):
                found[f"{shard}.{leaf}"] = tensor[rows]
    if model.config.model_type == "gpt_oss":
        found = {
            name.replace(".attn.", ".self_attn.").replace(".embedding.", ".embed_tokens."): t
            for name, t in found.items()
        }
    return found


def unloaded(model: torch.nn.Module, loaded: dict[str, torch.Tensor], weight_only: bool) -> Iterator[str]:
    """Float parameters that still hold poison; W4A16 never reads an input scale."""
    for name, tensor in loaded.items():
        unread = weight_only and name.endswith(INPUT_SCALES)
        unread |= isinstance(model.get_submodule(name.rpartition(".")[0]), Attention)  # not poisoned
        if not unread and tensor.is_floating_point() and tensor.float().isnan().any():
            yield name


def differences(stored: dict[str, Projection], held: dict[str, Projection]) -> dict[str, str]:
    """Why each name is not the same on both sides."""
    found = dict.fromkeys(stored.keys() - held.keys(), "only in the checkpoint")
    found |= dict.fromkeys(held.keys() - stored.keys(), "only in vLLM")
    for name in stored.keys() & held.keys():
        (values, given), (loaded, used) = stored[name], held[name]
        if values.dtype != loaded.dtype or not torch.equal(values, loaded):
            found[name] = "values differ"
        elif given != used:
            found[name] = f"input scale {given} is {used} in vLLM"
    return found


def cache_scales(model: torch.nn.Module) -> dict[str, float]:
    """The scales of every KV cache that vLLM quantizes, by the attention's name in a checkpoint."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and layer.kv_cache_dtype != "auto":
            base = f"{name.removesuffix('.self_attn.attn').removesuffix('.attn.attn')}.self_attn"
            found |= {f"{base}.k": layer._k_scale_float, f"{base}.v": layer._v_scale_float}
    return found


def as_kept(scale: torch.Tensor) -> tuple[float, float]:
    """A scale as it is stored, and in BF16, as vLLM keeps those of ModelOpt's layout while it loads."""
    return scale.item(), scale.bfloat16().item()


def check_cache(path: Path, model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> bool:
    """Print how many scales of a quantized KV cache are the stored ones, or 1 where none are; whether all are."""
    expected = {re.sub(r"(\.[kv]_proj)?\.([kv])_scale$", r".\2", name): scale for name, scale in stored.items()}
    held = cache_scales(model)
    wrong = [
        name
        for name in held.keys() | expected.keys()
        if held.get(name) not in as_kept(expected.get(name, torch.ones(())))
    ]
    if held or stored:
        print(
            f"{path.name}: {len(held) - len(wrong)} of {len(held)} scales of the KV cache equal ({len(stored)} stored)"
        )
    return not wrong


def check(path: Path) -> bool:
    """Load DST, print its line and what differs; whether all of it is equal."""
    tensors = read_checkpoint(path)
    stored_cache = {n: tensors.pop(n) for n in list(tensors) if n.endswith((".k_scale", ".v_scale"))}
    names = {n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")}
    banks = {n.removesuffix("_weight_scale") for n in tensors if n.endswith("_proj_weight_scale")}
    stored = {name: stored_projection(tensors, name) for name in names}
    stored |= {name: stored_bank(tensors, name) for name in banks}
    names |= banks
    parts = {f"{bank}{suffix}" for bank in banks for suffix in ("", "_weight_scale", "_weight_scale_2", "_input_scale")}
    rest = {
        n: Projection(t, None)
        for n, t in tensors.items()
        if n not in parts and (n.rpartition(".")[0] not in names or n.endswith(".bias"))
    }
    weight_only = all(p.input_scale is None for p in stored.values())

    model, loaded = load(path)
    plain = {n: Projection(t, None) for n, t in plain_tensors(model, loaded).items()}
    wrong = differences(stored, quantized_tensors(model, loaded))
    wrong_rest = differences(rest, plain) | dict.fromkeys(unloaded(model, loaded, weight_only), "not loaded")

    equal, same = len(names - wrong.keys()), len(rest.keys() - wrong_rest.keys())
    print(
        f"{path.name}: {equal} projections equal, {len(wrong)} differ "
        f"({'W4A16' if weight_only else 'W4A4'}; {same} of {len(rest)} other tensors equal)",
        flush=True,
    )
    for name, reason in sorted((wrong | wrong_rest).items()):
        print(f"  {name}: {reason}")
    return check_cache(path, model, stored_cache) and bool(names) and not wrong and not wrong_rest


def generate(path: Path) -> None:
    """Run a few greedy steps through vLLM's engine (no MoE: it would need a kernel).

    vLLM's CPU attention takes no head_dim of 16, so such heads are read as half as many
    of 32: every tensor keeps its shape, and the linear layers do the same work.
    """
    config = json.loads((path / "config.json").read_text())
    heads = {k: config[k] // 2 for k in ("num_attention_heads", "num_key_value_heads")}
    override = {"head_dim": 32} | heads if config.get("head_dim") == 16 else {}
    destroy_model_parallel()
    destroy_distributed_environment()
    llm = LLM(
        str(path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        hf_overrides=override,
        use_tqdm_on_load=False,
    )
    prompt = TokensPrompt(prompt_token_ids=[1, 2, 3])
    sampling = SamplingParams(max_tokens=4, temperature=0, detokenize=False)
    output = llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]
    print(f"{path.name}: generated {list(output.token_ids)}", flush=True)


def main() -> int:
    """Check every DST."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dst", nargs="+", type=Path)
    parser.add_argument("--generate", action="store_true", help="also run dense checkpoints")
    parser.add_argument("--only-load", action="store_true", help="compare nothing")
    parser.add_argument("--quantization", help="vLLM's option, with --only-load")
    parser.add_argument("--plugin", action="store_true", help="with fp4cast.vllm")
    options = parser.parse_args()
    stub_kernels()
    if options.plugin:
        from fp4cast.vllm import register

        register()
    equal = []
    for path in options.dst:
        try:
            equal.append(bool(load(path, quantization=options.quantization)) if options.only_load else check(path))
        except Exception as error:  # vLLM refused it: report, and go on with the next
            print(f"{path.name}: not loaded: {type(error).__name__}: {error}", flush=True)
            equal.append(False)
    for path in options.dst if options.generate else ():
        if "num_experts" not in json.loads((path / "config.json").read_text()):
            generate(path)
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
