"""Question: do activation scales with headroom, or one for each expert, cost or gain? On the trained fixture, on a CPU.

    python benchmarks/headroom.py [--model DIR] [--json FILE]

The inputs of the MXFP4 experts are rounded to NVFP4 under scales by four rules, after calibration on all of
`calibration.txt` and on four samples of 32 tokens; weights stay exact. On `heldout.txt`: blocks of 16 that round to
zeros altogether (flushed), blocks with a value beyond the scale's range (saturated), the SNR of the experts' outputs
(mean over the banks' inputs, each under the same input), and perplexity. How far chance alone moves the last two is
measured with the largest magnitude times 2^(i/8). No checkpoint of gpt-oss can hold a scale for
each expert: those rows show what that would be worth.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.formats import NV_BLOCK
from fp4cast.kernels import dynamic_fp4_fake_quant
from fp4cast.ptq import Headroom
from fp4cast.ptq.data import open_dataset, split, tokenize
from fp4cast.ptq.headroom import BlockHistogram
from fp4cast.ptq.load import load_tokenizer, quantization_options
from perplexity import WINDOW, arguments, heldout, logits, perplexity

STEPS = 8
Expert = tuple[str, int]
CALIBRATIONS = {"all": (10**6, WINDOW), "4 samples of 32 tokens": (4, 32)}
RULES: dict[str, tuple[Callable[[BlockHistogram], Tensor], bool]] = {
    "max, per bank": (lambda seen: seen.largest, False),
    "max, per expert": (lambda seen: seen.largest, True),
    "headroom, per bank": (Headroom().amax, False),
    "headroom, per expert": (Headroom().amax, True),
}


class Products(TorchFunctionMode):
    """While active, hands every input of an expert's product to `see`, and multiplies what that returns."""

    def __init__(self, model: torch.nn.Module, see: Callable[[Expert, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.see, self.experts = see, dict[int, Expert]()
        for name, weight in model.named_parameters():
            if "experts" in name and weight.ndim == 3:
                self.experts |= {each.data_ptr(): (name, i) for i, each in enumerate(weight)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__matmul__, Tensor.matmul, torch.matmul) and args[1].data_ptr() in self.experts:
            args = (self.see(self.experts[args[1].data_ptr()], args[0], args[1]), *args[1:])
        return func(*args, **(kwargs or {}))


def observe(model: torch.nn.Module, batches: list[Tensor]) -> dict[Expert, BlockHistogram]:
    """What each expert's input took in."""
    seen: defaultdict[Expert, BlockHistogram] = defaultdict(BlockHistogram)

    def count(expert: Expert, x: Tensor, _: Tensor) -> Tensor:
        seen[expert].add(x)
        return x

    mode = Products(model, count)
    with mode, torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return {expert: seen[expert] for expert in mode.experts.values()}


def choose(seen: Mapping[Expert, BlockHistogram], name: str) -> dict[Expert, Tensor]:
    """The amax of each expert's input by a rule; experts that saw no token have the largest of their bank."""
    rule, alone = RULES[name]
    found: dict[Expert, Tensor] = {}
    for bank in dict.fromkeys(name for name, _ in seen):
        members = {expert: each for expert, each in seen.items() if expert[0] == bank}
        pooled = BlockHistogram()
        for each in members.values():
            pooled.merge(each)
        own = {expert: rule(each) for expert, each in members.items() if float(each.largest) > 0}
        rest = torch.stack(list(own.values())).amax() if alone else rule(pooled)
        found |= {expert: own.get(expert, rest) if alone else rest for expert in members}
    return found


def measure_rule(model: torch.nn.Module, windows: Tensor, amax: Mapping[Expert, Tensor]) -> dict[str, Any]:
    """What becomes of the held-out text under these scales."""
    counts: defaultdict[str, int] = defaultdict(int)
    power: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def round_input(expert: Expert, x: Tensor, weight: Tensor) -> Tensor:
        rounded = dynamic_fp4_fake_quant(x, amax[expert])
        before, after = (each.reshape(-1, NV_BLOCK).abs().amax(dim=1).float() for each in (x, rounded))
        counts["blocks"] += len(before)
        counts["flushed"] += int(((before > 0) & (after == 0)).sum())
        counts["saturated"] += int((before > amax[expert]).sum())
        exact, found = (each.double() @ weight.double() for each in (x, rounded))
        power[expert[0]][0] += float(exact.square().sum())
        power[expert[0]][1] += float((found - exact).square().sum())
        return rounded

    with Products(model, round_input):
        found = logits(model, windows)
    snr = [10 * math.log10(signal / noise) for signal, noise in power.values()]
    return {**counts, "snr_db": sum(snr) / len(snr), "perplexity": perplexity(found, windows)}


def measure(path: Path) -> dict[str, Any]:
    """All rules after both calibrations."""
    import transformers

    checkpoint = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", experts_implementation="eager", **quantization_options(checkpoint)
    ).eval()
    tokenizer, text = load_tokenizer(checkpoint), str(path / "calibration.txt")
    windows, rows = heldout(path), []
    for calibration, sizes in CALIBRATIONS.items():
        samples = tokenize(open_dataset(text), tokenizer, *sizes)
        seen = observe(model, list(split(samples, 16)))
        idle = sum(float(each.largest) == 0 for each in seen.values())
        tokens = sum(sample.numel() for sample in samples)
        for rule in RULES:
            facts = {"calibration": calibration, "tokens": tokens, "idle": idle, "rule": rule}
            rows.append(facts | measure_rule(model, windows, choose(seen, rule)))
        if calibration == "all":  # scales as good as the largest magnitude's, so that what differs is chance
            largest = choose(seen, "max, per bank")
            by = [2 ** (i / STEPS) for i in range(STEPS)]
            chance = [measure_rule(model, windows, {e: amax * f for e, amax in largest.items()}) for f in by]
    return {
        "model": path.name,
        "tokens": windows.numel(),
        "date": datetime.now(UTC).date().isoformat(),
        "unquantized": perplexity(logits(model, windows), windows),
        "chance": {key: [row[key] for row in chance] for key in ("perplexity", "snr_db")},
        "rows": rows,
    }


def main() -> None:
    args = arguments(__doc__)
    found = measure(args.model)
    table = Table("calibration", "rule", "flushed", "saturated", "SNR", "perplexity")
    for row in found["rows"]:
        counts = [f"{row[key]:,}" for key in ("flushed", "saturated")]
        table.add_row(row["calibration"], row["rule"], *counts, f"{row['snr_db']:.2f} dB", f"{row['perplexity']:.3f}")
    Console().print(table)
    Console().print(
        f"{found['rows'][0]['blocks']:,} blocks; perplexity with activations in BF16: {found['unquantized']:.3f}"
    )
    low, high = min(found["chance"]["perplexity"]), max(found["chance"]["perplexity"])
    Console().print(f"perplexity under scales of 1 to 2 times the largest magnitude's: {low:.3f} to {high:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
