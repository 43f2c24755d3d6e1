"""`fp4cast calibrate`: activation amax of a checkpoint's MXFP4 weights, for `convert --activations w4a4`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp4cast.checkpoints.byte_ranges import write_whole
from fp4cast.checkpoints.directory import naming, open_checkpoint
from fp4cast.checkpoints.json_files import json_bytes
from fp4cast.conversion.destination import real_path
from fp4cast.conversion.input_scales import ScalesPer
from fp4cast.conversion.preview import Preview
from fp4cast.errors import DestinationError, UnsupportedError, UsageError
from fp4cast.extras import require
from fp4cast.families.family import Pair, Source
from fp4cast.families.recognise import read_source
from fp4cast.hub.resolve import resolve
from fp4cast.layouts.choose import targets_of
from fp4cast.layouts.layout import castable
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.ptq.data import check_counts, open_datasets, split, tokenize_all
from fp4cast.ptq.devices import choose_device, use_device
from fp4cast.ptq.headroom import BlockHistogram, Headroom, chosen_rules
from fp4cast.ptq.layerwise.observer import Input, Observer
from fp4cast.ptq.layerwise.parameters import Weights
from fp4cast.ptq.layerwise.run import BATCH, find_decoder, run_layers
from fp4cast.ptq.load import empty_model, explain_run_errors, load_tokenizer
from fp4cast.ptq.max_calibration import check_amax


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found.

    Attributes:
        source: the checkpoint.
        out: the file that was written.
        amax: the largest magnitude in the input of each MXFP4 weight, by module.
        idle: the number of experts that saw no token, and take the largest amax of the others in their layer.
        rules: how the amax was chosen: "act_headroom" by its numbers, or None; "input_scales_per" as it was given.
        samples: the number of samples that were run.
        tokens: the number of tokens in all of them.
        seconds: wall time.
    """

    source: str
    out: str
    amax: Mapping[str, float]
    idle: int
    rules: Mapping[str, Any]
    samples: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "source": self.source,
            "out": self.out,
            "modules": len(self.amax),
            "amax": {"least": min(self.amax.values()), "most": max(self.amax.values())},
            "idle": self.idle,
            **self.rules,
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str | Sequence[str],
    calib_size: int | Sequence[int] = 512,
    calib_seq: int = 512,
    batch_size: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    act_headroom: Headroom | None = None,
    input_scales_per: ScalesPer | None = None,
    progress: Progress = ignore,
) -> Calibrated:
    """Run a model layer by layer and write the amax of its MXFP4 weights' inputs.

    One layer is in memory at a time, so a model need not fit on the device, or in memory.

    Args:
        source: an MXFP4 checkpoint: a directory, or a Hugging Face model id.
        out: a .json or .safetensors file: module -> amax, as `convert(input_scales=...)` takes it.
        dataset: text or .jsonl files, or Hub datasets: a list, or commas between.
        calib_size: samples at most, one number for each dataset (the last holds for those left).
        calib_seq: tokens of a sample at most.
        batch_size: samples that run together; 0 for 4 on a CPU and 16 on a GPU.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one.
        trust_remote_code: run the model code in the checkpoint.
        overwrite: replace an existing file.
        act_headroom: the rule for the amax; None for the largest magnitude.
        input_scales_per: "bank" for one amax for all experts of a layer, "expert" for one each; None for what the
            layout holds: one each, unless all experts lie in one tensor.
        progress: called with ("layers", layers just done, total layers).

    Raises:
        UnsupportedError: transformers and the checkpoint name the model's tensors differently.
        UsageError: experts in one tensor shall have an amax each.
        Fp4CastError: see `fp4cast.errors`.
    """
    begin = time.monotonic()
    check_counts(calib_size, calib_seq, batch_size)
    path, chosen, data = _check_out(Path(out), overwrite), choose_device(device), open_datasets(dataset, calib_size)
    found, pairs = _read(resolve(source), input_scales_per)
    checkpoint = found.checkpoint
    samples = tokenize_all(data, load_tokenizer(checkpoint, trust_remote_code), calib_seq)
    batches = split(samples, batch_size or BATCH[torch.device(chosen).type])
    model, observer = empty_model(checkpoint, trust_remote_code), Observer(counting=act_headroom is not None)
    with naming(checkpoint.path), Weights(checkpoint, found.pairs, model, chosen) as weights:
        _check_reached(model, weights, pairs)
        with use_device(chosen), explain_run_errors():
            run_layers(model, weights, batches, observer, lambda n, total: progress("layers", n, total))
    seen = _pooled(observer.seen, lambda name: input_scales_per == "bank" or len(weights.modules(name)) == 1)
    values = {key: float(act_headroom.amax(each) if act_headroom else each.largest) for key, each in seen.items()}
    amax, idle = _by_module(values, weights, pairs)
    _write(path, amax)
    tokens = sum(sample.numel() for sample in samples)
    written = {each for (name, _), each in seen.items() if weights.modules(name)[0][0] in amax}  # attention is not
    cramped = [act_headroom.leaves_none(each) for each in written] if act_headroom else []
    rules, seconds = chosen_rules(act_headroom, input_scales_per, cramped), time.monotonic() - begin
    return Calibrated(str(checkpoint.path), str(out), amax, idle, rules, len(samples), tokens, seconds)


def preview_calibration(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str | Sequence[str],
    calib_size: int | Sequence[int] = 512,
    calib_seq: int = 512,
    batch_size: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    input_scales_per: ScalesPer | None = None,
) -> Preview:
    """What `calibrate`, which explains the arguments, would write; no model is made, and nothing is written."""
    check_counts(calib_size, calib_seq, batch_size)
    _check_out(Path(out), overwrite), choose_device(device), open_datasets(dataset, calib_size)
    found, pairs = _read(resolve(source, download=False), input_scales_per)
    facts = {"source": str(found.checkpoint.path), "modules": len(pairs)}
    return Preview(str(out), {Path(out).name: None}, facts, notes=[f"an amax for each of {len(pairs)} modules"])


def _read(path: Path, per: ScalesPer | None) -> tuple[Source, Sequence[Pair]]:
    """(the source, its MXFP4 weights), if each can have such an amax."""
    found = read_source(open_checkpoint(path))
    pairs = castable(found, targets_of(found.family)[0]).cast
    if per == "expert" and (banks := [pair.module for pair in pairs if pair.bank]):
        raise UsageError(
            f"{path}: {banks[0]} holds all experts of a layer, which have one input scale in every layout; drop "
            "--input_scales_per expert"
        )
    return found, pairs


def _check_out(out: Path, overwrite: bool) -> Path:
    if out.suffix not in (".json", ".safetensors"):
        raise UsageError(f"--out {out}: expected a .json or .safetensors file")
    path = real_path(out)
    if not path.parent.is_dir():
        raise DestinationError(f"{path.parent}: is not a directory")
    if path.exists() and not overwrite:
        raise DestinationError(f"{path}: exists; pass --overwrite to replace it")
    return path


def _check_reached(model: Any, weights: Weights, pairs: Iterable[Pair]) -> None:
    """Check that every MXFP4 weight belongs to a layer that will run."""
    name, decoder = find_decoder(model)
    parameters = (f"{name}.layers.{key}".lstrip(".") for key, _ in decoder.layers.named_parameters())
    reached = {module for key in parameters for modules in weights.modules(key) for module in modules}
    if lost := [pair.module for pair in pairs if pair.module not in reached]:
        raise UnsupportedError(
            f"{weights.checkpoint.path}: {len(lost)} MXFP4 weights, the first is {lost[0]}, belong to none of the "
            f"{len(decoder.layers)} layers that transformers runs, so their inputs cannot be observed"
        )


def _pooled(seen: Mapping[Input, BlockHistogram], shared: Callable[[str], bool]) -> dict[Input, BlockHistogram]:
    """What decides the amax of each input: its own, or what all experts of a weight took in, as one quantizer would."""
    banks = defaultdict[str, BlockHistogram](BlockHistogram)
    for (name, _), each in seen.items():
        if shared(name):
            banks[name].merge(each)
    return {key: banks[key[0]] if shared(key[0]) else each for key, each in seen.items()}


def _by_module(seen: Mapping[Input, float], weights: Weights, pairs: Iterable[Pair]) -> tuple[dict[str, float], int]:
    """(amax by the checkpoint's module, number of experts that saw no token)."""
    amax: dict[str, float] = {}
    largest: dict[str, float] = {}  # of any expert, by parameter
    of: dict[str, str] = {}
    for (parameter, expert), value in seen.items():
        experts = weights.modules(parameter)
        modules = experts[expert if len(experts) > 1 else 0]
        check_amax(modules[0], value)
        for module in modules:
            amax[module] = max(value, amax.get(module, 0.0))
        if parameter not in largest:
            of |= {module: parameter for each in experts for module in each}
        largest[parameter] = max(value, largest.get(parameter, 0.0))
    wanted = [pair.module for pair in pairs]
    if lost := [module for module in wanted if module not in of]:
        raise UnsupportedError(
            f"{weights.checkpoint.path}: {lost[0]}: the model never multiplied it with an input, so it has no amax"
        )
    idle = sum(module not in amax for module in wanted)
    return {module: amax.get(module, largest[of[module]]) for module in wanted}, idle


def _write(path: Path, amax: Mapping[str, float]) -> None:
    if path.suffix == ".json":
        data = json_bytes(amax)
    else:
        save = require("safetensors.torch", "ptq").save
        data = save({module: torch.tensor(value, dtype=torch.float32) for module, value in amax.items()})
    try:
        write_whole(path, data)
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error
