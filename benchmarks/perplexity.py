"""Claim: the cast changes nothing, where requantizing costs perplexity. On the trained fixture; a minute on a CPU.

    python benchmarks/perplexity.py [--model DIR] [--json FILE]

Perplexity on `heldout.txt`, windows of 128 tokens, after calibration on `calibration.txt` where activations are
quantized. Weights and activations pass through the quantizers that an export writes; what engines compute beside them
(BF16 here) is not simulated.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.ptq import QFORMATS, apply_to_model, attach, max_calibrate
from fp4cast.ptq.data import open_dataset, split, tokenize
from fp4cast.ptq.load import load_model, load_tokenizer

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "gpt-oss-tiny"
WINDOW = 128
FORMATS = ("w4a16_nvfp4", "nvfp4_experts_only", "nvfp4_omlp_only", "nvfp4")
HOW = {True: "cast", False: "requantized"}


@torch.no_grad()
def logits(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """BF16 [windows, tokens, vocabulary]."""
    found: torch.Tensor = model(input_ids=windows, use_cache=False).logits
    return found


def perplexity(found: torch.Tensor, windows: torch.Tensor) -> float:
    """Exp of the mean loss of every token but the first of a window."""
    loss = torch.nn.functional.cross_entropy(found[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(loss.item())


def quantized(path: Path, qformat: str, cast: bool) -> torch.nn.Module:
    """The model under a format, calibrated."""
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, "cpu")
    samples = tokenize(open_dataset(str(path / "calibration.txt")), load_tokenizer(checkpoint), 512, WINDOW)

    def loop(model: Any) -> None:
        for batch in split(samples, 16):
            model.base_model(input_ids=batch, use_cache=False)

    attach(model, QFORMATS[qformat], static=cast)
    max_calibrate(model, loop if QFORMATS[qformat].activations == "w4a4" else None)
    if cast:
        apply_to_model(model, path)
    return model


def only_experts(model: torch.nn.Module) -> None:
    """Quantize what `fp4cast convert` writes: attention stays BF16."""
    for name, module in model.named_modules():
        if name.endswith("weight_quantizer") and "experts" not in name:
            module.disable()


def heldout(path: Path) -> torch.Tensor:
    """Token ids [windows, tokens] of the held-out text."""
    text = tokenize(open_dataset(str(path / "heldout.txt")), load_tokenizer(open_checkpoint(path)), 10**6, WINDOW)
    return torch.cat([sample for sample in text if sample.shape[1] == WINDOW])


def measure(path: Path) -> dict[str, Any]:
    """Perplexities, and whether logits are the source's bit for bit."""
    checkpoint = open_checkpoint(path)
    windows = heldout(path)
    source = logits(load_model(checkpoint, "cpu"), windows)
    rows = [{"format": "MXFP4 source", "experts": "", "perplexity": perplexity(source, windows), "same_logits": True}]
    for qformat in ("experts, W4A16", *FORMATS):
        for cast in (True, False):
            model = quantized(path, "w4a16_nvfp4" if "," in qformat else qformat, cast)
            if "," in qformat:
                only_experts(model)
            found = logits(model, windows)
            same = torch.equal(found, source)
            row = {"format": qformat, "experts": HOW[cast], "perplexity": perplexity(found, windows)}
            rows.append(row | {"same_logits": same})
    return {"model": path.name, "tokens": windows.numel(), "date": datetime.now(UTC).date().isoformat(), "rows": rows}


def arguments(doc: str | None) -> argparse.Namespace:
    """The options of a script about the fixture."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FIXTURE)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments(__doc__)
    found = measure(args.model)
    table = Table("format", "experts", "perplexity", "logits")
    for row in found["rows"]:
        same = "the source's, bit for bit" if row["same_logits"] else ""
        table.add_row(row["format"], row["experts"], f"{row['perplexity']:.3f}", same)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if not next(row for row in found["rows"] if row["experts"] == "cast")["same_logits"]:
        raise SystemExit("the cast changed the logits")


if __name__ == "__main__":
    main()
