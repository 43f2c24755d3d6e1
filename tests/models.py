"""What the tests of models share: loading gpt-oss as BF16, and saving models of transformers in MXFP4. Needs torch."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).parent / "fixtures" / "gpt-oss-tiny"


def tensors(directory):
    """All tensors of a directory by name."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def load_gpt_oss(path):
    """MXFP4 as transformers dequantizes it."""
    config = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    return model.eval()


def static(rules, weights_only):
    """A quantization config whose weight quantizers keep their block amax."""
    rules = copy.deepcopy(rules)
    kept = []
    for rule in rules["quant_cfg"]:
        if weights_only and "input_quantizer" in rule["quantizer_name"] and rule.get("cfg"):
            continue
        if "weight_quantizer" in rule["quantizer_name"] and rule.get("cfg"):
            rule["cfg"]["block_sizes"]["type"] = "static"
        kept.append(rule)
    return rules | {"quant_cfg": kept}


TINY = {"vocab_size": 1024, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def mxfp4(weight):
    """Codes uint8 [N, K/2] and E8M0 [N, K/32] by the OCP rule, and the values that they mean."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponents = torch.frexp(blocks.abs().amax(-1)).exponent - 3
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = torch.ldexp(blocks, -exponents[..., None])
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    values = torch.ldexp(table[codes].copysign(scaled), exponents[..., None]).flatten(-2)
    codes = (codes + 8 * scaled.signbit()).to(torch.uint8).flatten(-2)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).to(torch.uint8), values


def fp8(weight):
    """FP8 codes of [N, K], an E8M0 scale for each 128 x 128, and the values that they mean."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    k = torch.randint(-9, -5, (rows, columns))
    steps = torch.exp2(k.float()).repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(weight), : weight.shape[1]]
    codes = (weight.float() / steps).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, (k + 127).to(torch.uint8).view(torch.float8_e8m0fnu), codes.float() * steps


def pack(model, path, keep):
    """Save a model as compressed-tensors would, its matrices in MXFP4, and beside it the values in BF16."""
    plain, tensors, values = save_plain(model, path), {}, {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and not any(word in name for word in keep):
            packed, scales, values[name] = mxfp4(tensor)
            tensors |= {f"{module}.weight_packed": packed, f"{module}.weight_scale": scales}
        else:
            tensors[name] = tensor
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}}
    method = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return finish(path, plain | values, tensors, {**method, "config_groups": groups, "ignore": []})


def pack_deepseek(model, path):
    """Save a DeepSeek-V4 as it is published: its own names, MXFP4 experts, FP8 beside them."""
    plain, tensors, values = save_plain(model, path), {}, {}
    for full, tensor in plain.items():
        name = full.removeprefix("model.").replace("embed_tokens", "embed")
        module = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            packed, scales, values[full] = mxfp4(tensor)
            tensors |= {name: packed.view(torch.int8), f"{module}.scale": scales.view(torch.float8_e8m0fnu)}
        elif module.endswith((".wq_a", ".wq_b", ".wo_b", ".shared_experts.w2")):
            tensors[name], tensors[f"{module}.scale"], values[full] = fp8(tensor)
        else:
            tensors[name] = tensor
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return finish(path, plain | values, tensors, method)


def save_plain(model, path):
    model.to(torch.bfloat16).save_pretrained(path / "bf16")
    plain = load_file(path / "bf16/model.safetensors")
    for name in [name for name in plain if name.endswith("gate.bias")]:
        plain[name] = torch.randn(plain[name].shape) * 1e-3 + 0.5  # FP32, as published: BF16 would choose other experts
    return plain


def finish(path, plain, tensors, quantization):
    """Both directories: the packed one, and one with the values that it means in BF16."""
    (path / "mxfp4").mkdir()
    save_file(tensors, path / "mxfp4/model.safetensors", {"format": "pt"})
    values = {name: value.bfloat16() if value.ndim == 2 else value for name, value in plain.items()}
    save_file(values, path / "bf16/model.safetensors", {"format": "pt"})
    config = json.loads((path / "bf16/config.json").read_text()) | {"quantization_config": quantization}
    (path / "mxfp4/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "mxfp4" / name).write_bytes((FIXTURE / name).read_bytes())
    return path / "mxfp4"


def spoil(path, module, spread):
    """Make the first block hold all magnitudes, so far below the largest that no tensor scale is exact."""
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for suffix in ("_blocks", "_scales"):
        file = path / index[module + suffix]
        raw = bytearray(file.read_bytes())
        base = 8 + int.from_bytes(raw[:8], "little")
        start, end = (base + at for at in json.loads(raw[8:base])[module + suffix]["data_offsets"])
        largest = int(np.bincount(np.frombuffer(raw[start:end], np.uint8)).argmax())  # what most blocks have
        data = bytes([0x21, 0x43, 0x65, 0x77] * 4) if suffix == "_blocks" else bytes([largest - spread])
        raw[start : start + len(data)] = data
        file.write_bytes(bytes(raw))
