"""What the tests of models share: loading gpt-oss as BF16, and directories as tensors or as bytes."""

from safetensors.torch import load_file


def load_gpt_oss(path):
    """MXFP4 as transformers dequantizes it."""
    import torch
    import transformers

    config = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    return model.eval()


def tensors(directory):
    """All tensors by name."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def contents(directory):
    """All files' bytes by path, but for the receipt, which only `convert` writes."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "fp4cast.json")
    return {path.relative_to(directory): path.read_bytes() for path in files}
