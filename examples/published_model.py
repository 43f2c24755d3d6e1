"""Take a model that others trained and published from MXFP4 to NVFP4, and see that it computes the same, bit for bit.

The model is IBM's RXNMapper (MIT): an ALBERT of 12 layers that has learnt chemical reactions, in a package of 3 MB.
It is quantized by compressed-tensors, and both checkpoints are read by transformers. Nothing is downloaded. Needs

    pip install 'fp4cast[ptq]' compressed-tensors && pip install --no-deps rxnmapper
"""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForMaskedLM

import fp4cast
import fp4cast.hf  # transformers reads ModelOpt's layout from here on

REACTIONS = (
    "O=C(O)c1ccccc1.CCO>>CCOC(=O)c1ccccc1",  # an acid and an alcohol make an ester
    "OB(O)c1ccccc1.Brc1ccncc1>>c1ccc(-c2ccncc2)cc1",  # Suzuki's coupling
    "CC(=O)Cl.NCC>>CCNC(C)=O",  # an acid chloride and an amine make an amide
)


def published() -> Path:
    """The directory of the model in its package, which is found and not imported."""
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install --no-deps rxnmapper")
    return next(Path(spec.origin).parent.glob("models/transformers/*/config.json")).parent


def quantize(model: Any, directory: Path) -> None:
    """Write a checkpoint in MXFP4, by compressed-tensors alone; the output layer shares its weights and stays."""
    linear = preset_name_to_scheme("MXFP4A16", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": linear}, ignore=["predictions.decoder"]))
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            blocks = module.weight.detach().unflatten(-1, (-1, 32))
            module.weight_scale.data, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))


def masked(vocabulary: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reactions with one token masked in each copy: tokens [n, length], which is masked [n], what it was [n]."""
    number = {word: i for i, word in enumerate(vocabulary.read_text().split())}
    cells: list[list[int]] = []
    for reaction in REACTIONS:
        tokens = [number[word] for word in re.findall(r"\[[^]]+\]|Br|Cl|>>|.", reaction)]
        cells.append([number["[CLS]"], *tokens, number["[SEP]"]])
    rows = [(cell, at) for cell in cells for at in range(1, len(cell) - 1)]
    length = max(map(len, cells))
    ids = torch.tensor([cell + [number["[PAD]"]] * (length - len(cell)) for cell, _ in rows])
    at = torch.tensor([at for _, at in rows])[:, None]
    return ids.scatter(1, at, number["[MASK]"]), at[:, 0], ids.gather(1, at)[:, 0]


def answers(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """What the model of a directory makes of tokens: logits [n, length, vocabulary], BF16."""
    model = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, attention_mask=(ids > 0).long()).logits
    return logits


def main(scratch: Path) -> None:
    """Quantize, convert into both layouts, ask every model the same."""
    source, original = scratch / "MXFP4", published()
    quantize(AutoModelForMaskedLM.from_pretrained(original, dtype=torch.bfloat16), source)
    report = fp4cast.convert(source, scratch / "NVFP4")
    fp4cast.convert(source, scratch / "NVFP4-compressed-tensors", layout="compressed-tensors")
    print(f"{report.tensors['cast']} weights cast, half-blocks {dict(report.half_blocks)}")

    ids, at, expected = masked(original / "vocab.txt")
    before = answers(source, ids)
    for path in (original, *sorted(scratch.iterdir())):
        logits = answers(path, ids)
        right = (logits[torch.arange(len(at)), at].argmax(-1) == expected).sum()
        same = torch.equal(logits.view(torch.int16), before.view(torch.int16))
        name = "published, BF16" if path == original else path.name
        print(f"{name:24}  {right} of {len(at)} masked tokens right, outputs {'equal' if same else 'other'}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
