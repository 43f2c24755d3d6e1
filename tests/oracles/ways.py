"""One tensor of the trained fixture by four ways from MXFP4 to NVFP4, each as its own library stores it.

Prints what docs/comparison.md shows, which docs/run_examples.py compares. All are decoded by the same definition.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.export.shard_cast_utils import (
    mxfp4_kmax,
    quantize_mxfp4_to_nvfp4,
    quantize_mxfp4_to_nvfp4_lossless,
)
from safetensors.torch import load_file

import fp4cast
from fp4cast.formats import mxfp4_values, nvfp4_values

FILE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny" / "model.safetensors"
BANK = "model.layers.0.mlp.experts.down_proj"


def ours(codes, scales):
    out = fp4cast.cast(codes.numpy(), scales.numpy())
    return out.codes, out.block_scales, out.tensor_scale


def modelopt_cast(codes, scales):
    packed, block, top, *_ = quantize_mxfp4_to_nvfp4_lossless(codes, scales, mxfp4_kmax(scales), "cpu")
    return packed.numpy(), block.view(torch.uint8).numpy(), float(top)


def modelopt_requantized(codes, scales):
    packed, block, top, _ = quantize_mxfp4_to_nvfp4(codes, scales, None, "cpu")
    return packed.numpy(), block.view(torch.uint8).numpy(), float(top)


def compressed_tensors_requantized(codes, scales):
    """The steps of its NVFP4A16 scheme, from BF16, which holds every MXFP4 value."""
    weight = torch.from_numpy(mxfp4_values(codes.numpy(), scales.numpy())).to(torch.bfloat16)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    blocks, top = weight.unflatten(-1, (-1, 16)), generate_gparam(weight.min(), weight.max())
    block, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, top)
    state = {"weight": weight, "weight_scale": block, "weight_global_scale": top}
    stored = NVFP4PackedCompressor.compress(state, scheme)
    return stored["weight_packed"].numpy(), stored["weight_scale"].view(torch.uint8).numpy(), 1 / float(top)


WAYS = {
    "fp4cast": ours,
    "ModelOpt, cast": modelopt_cast,
    "ModelOpt, requantized": modelopt_requantized,
    "compressed-tensors, requantized": compressed_tensors_requantized,
}


def main():
    tensors = load_file(FILE)
    codes, scales = (tensors[f"{BANK}_{part}"] for part in ("blocks", "scales"))
    codes, scales = codes.flatten(-2).flatten(0, 1), scales.flatten(0, 1)  # [rows of all experts, columns / 2 or / 32]
    truth = mxfp4_values(codes.numpy(), scales.numpy())
    minus = (truth == 0) & np.signbit(truth)
    for name, way in WAYS.items():
        values = nvfp4_values(*way(codes, scales))
        error = ((values - truth) ** 2).sum()
        ratio = f"{10 * np.log10((truth**2).sum() / error):.1f} dB" if error else "exact"
        kept = (np.signbit(values) & minus).sum() / minus.sum()
        print(f"{name:32} {ratio:>8}, {np.mean(values != truth):5.1%} of values changed, {kept:4.0%} of -0 kept")


if __name__ == "__main__":
    main()
