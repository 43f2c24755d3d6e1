"""Small GGUF files, made with the `gguf` package's own writer."""

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

LENGTHS = {Type.MXFP4: 17, Type.NVFP4: 36}


def records(rng, shape, low, high):
    """MXFP4 blocks of a tensor [..., K]: uint8 [..., K / 32 * 17], exponents in [low, high], all codes."""
    found = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, 17), dtype=np.uint8)
    found[..., 0] = rng.integers(low + 127, high + 128, found.shape[:-1])
    return found.reshape(*shape[:-1], -1)


def make(path, tensors=None, *, architecture="qwen3moe", low=-9, high=8, seed=0, lists=None, **metadata):
    """A file with a bank of 4 experts, and other tensors; `tensors` adds some by name, of floats or of blocks."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    if "general.file_type" not in (lists or {}):
        writer.add_file_type(38)
    for name, values in (lists or {}).items():
        writer.add_array(name, values)
    writer.add_quantization_version(2)
    writer.add_key_value("general.description", "", GGUFValueType.STRING)  # the writer drops empty ones otherwise
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ü"])
    writer.add_array("tokenizer.ggml.scores", [1.0, -2.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, value in metadata.items():
        writer.add_uint16(name.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", rng.normal(size=(5, 64)).astype(np.float32))
    bank = records(rng, (4, 8, 128), low, high)
    writer.add_tensor("blk.0.ffn_up_exps.weight", bank, raw_dtype=Type.MXFP4)
    writer.add_tensor("blk.0.ffn_up_exps.bias", rng.normal(size=(4, 3)).astype(np.float32))
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=Type.MXFP4 if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path):
    """name -> the package's view of a tensor."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def change(path, name, at, value):
    """Change one byte of a tensor in place."""
    with path.open("r+b") as file:
        file.seek(tensors(path)[name].data_offset + at)
        file.write(bytes([value]))
