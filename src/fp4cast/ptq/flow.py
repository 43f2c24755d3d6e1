"""The whole flow: check everything, load, calibrate, cast, export."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp4cast.checkpoints.directory import check_stamps, naming
from fp4cast.conversion.destination import check_destination, real_path
from fp4cast.errors import UsageError
from fp4cast.extras import require
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.documents import check_kv_cache
from fp4cast.layouts.layout import Target
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.ptq.attention import attach_kv_cache
from fp4cast.ptq.cast import LosslessCounts, Scaled, apply_domains, cast_domains, count_lossless, lossless_modules
from fp4cast.ptq.data import open_datasets, split, tokenize_all
from fp4cast.ptq.devices import Placement, choose_device, place, use_device
from fp4cast.ptq.export import write_model
from fp4cast.ptq.exported import Exported
from fp4cast.ptq.headroom import chosen_rules
from fp4cast.ptq.layerwise.loop import LayerLoop
from fp4cast.ptq.layerwise.parameters import Weights
from fp4cast.ptq.load import empty_model, explain_run_errors, load_model, load_tokenizer
from fp4cast.ptq.max_calibration import max_calibrate
from fp4cast.ptq.model_weights import matching_weights
from fp4cast.ptq.modules import attach
from fp4cast.ptq.opened import OpenedModel, model_target, open_model
from fp4cast.ptq.options import Options, check_options
from fp4cast.ptq.qformats import QFORMATS
from fp4cast.ptq.quantizer import TensorQuantizer

__all__ = ["Options", "Quantized", "quantize"]

CALIB_SIZE, CALIB_SEQ = 512, 512
_FIRST_BATCH = {"cpu": 8, "cuda": 64}  # halved until one fits


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did.

    Attributes:
        qformat: the format's name.
        cast: the number of weights cast from the MXFP4 checkpoint in closed form; None without the cast.
        lossless: tensors and blocks of which the cast keeps every value; None without the cast.
        calibration: counts "samples" and "tokens", and the "batch_size".
        input_scales: how they were chosen: "act_headroom" by its numbers, or None; "input_scales_per" as it was given.
        exported: what was written.
        seconds: wall time of "load", "calibrate", "cast" and "export".
        peak_memory: bytes of the "host" process and of the "device", the fullest GPU (0 without one).
    """

    qformat: str
    cast: int | None
    lossless: LosslessCounts | None
    calibration: Mapping[str, int]
    input_scales: Mapping[str, Any]
    exported: Exported
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]

    @property
    def exact(self) -> bool:
        """Whether the weights were cast and every one equals the source's."""
        return bool(self.cast) and not self.exported.inexact

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            **self.exported.to_json(),
            "qformat": self.qformat,
            "cast": self.cast,
            "lossless": None if self.lossless is None else dict(self.lossless),
            "exact": self.exact,
            "calibration": dict(self.calibration),
            **self.input_scales,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory": dict(self.peak_memory),
        }


def quantize(options: Options, progress: Progress = ignore) -> Quantized:
    """Load a checkpoint's model, quantize and calibrate it, cast its weights if asked to, and export it.

    Args:
        options: see `Options`.
        progress: called, maybe from threads, with (phase, amount just done, amount in all); "calibrate" counts samples,
            the other phases bytes.

    Raises:
        UsageError: options that do not fit together, or not the checkpoint; before anything is loaded.
        Fp4CastError: see `fp4cast.errors`; `export_path` is as it was before.
    """
    job = check(options)
    with naming(job.opened.checkpoint.path), use_device(job.device), ExitStack() as stack:
        return _quantize(options, job, stack, progress)


def _quantize(options: Options, job: _Job, stack: ExitStack, progress: Progress) -> Quantized:
    checkpoint, samples, clock = job.opened.checkpoint, job.samples, dict[str, float]()
    asked = (options.trust_remote_code, options.attn_implementation)
    with _timed(clock, "load"):
        if options.low_memory_mode:
            model = empty_model(checkpoint, *asked)
        else:
            model = load_model(checkpoint, job.placement, *asked)
    with _timed(clock, "calibrate"):
        loop = _prepare(model, options, job, stack, progress)
        read = loop.rows if isinstance(loop, LayerLoop) else None
        max_calibrate(model, loop if samples or read else None, headroom=options.act_headroom)
    with _timed(clock, "cast"):
        applied = apply_domains(model, job.domains) if options.cast_mxfp4_to_nvfp4 else None
    check_stamps(checkpoint, job.opened.stamps, "export")
    with _timed(clock, "export"):
        exported = write_model(
            model,
            options.export_path,
            job.opened,
            job.target,
            lossless=lossless_modules(job.domains, applied or {}),
            cast=[each.module for each in job.domains] if applied else [],
            overwrite=options.overwrite,
            jobs=options.jobs,
            progress=progress,
            read=read,
        )
    tokens = sum(sample.numel() for sample in samples)
    return Quantized(
        qformat=options.qformat,
        cast=None if applied is None else len(applied),
        lossless=None if applied is None else count_lossless(applied),
        calibration={"samples": len(samples), "tokens": tokens, "batch_size": loop.batch_size},
        input_scales=chosen_rules(options.act_headroom, options.input_scales_per, _cramped(model)),
        exported=exported,
        seconds=clock,
        peak_memory=_peaks(),
    )


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the model is loaded.

    Attributes:
        opened: the model's checkpoint.
        target: how the result is stored.
        domains: what the cast will set; empty where nothing is cast.
        samples: token ids to calibrate on.
        device: where its inputs go.
        placement: where the model runs: that device, or several.
    """

    opened: OpenedModel
    target: Target
    domains: list[Scaled]
    samples: list[Tensor]
    device: str
    placement: Placement


def check(options: Options, *, tokenized: bool = True) -> _Job:
    """Check everything that can be checked before the model is loaded; without `tokenized`, samples are left out."""
    check_options(options)
    device = choose_device(options.device)
    sizes = CALIB_SIZE if options.calib_size is None else options.calib_size
    data = open_datasets(options.dataset or (), sizes)
    require("transformers", "ptq")
    opened = open_model(options.pyt_ckpt_path)
    _check_cast(opened, options)
    model = empty_model(opened.checkpoint, options.trust_remote_code, options.attn_implementation)
    placement: Placement = device
    if not options.low_memory_mode:
        placement = place(model, device, options.gpu_max_mem_percentage, options.use_seq_device_map)
    target, domains = _check_source(opened, options, model)
    check_destination(opened.checkpoint.path, real_path(options.export_path), overwrite=options.overwrite)
    samples: list[Tensor] = []
    if data and tokenized:
        tokenizer = load_tokenizer(opened.checkpoint, options.trust_remote_code)
        samples = tokenize_all(data, tokenizer, options.calib_seq or CALIB_SEQ)
    return _Job(opened, target, domains, samples, device, placement)


def _check_cast(opened: OpenedModel, options: Options) -> None:
    """Check that there are MXFP4 weights if they are to be cast."""
    if opened.source is None and options.cast_mxfp4_to_nvfp4:
        raise UsageError(
            f"--cast_mxfp4_to_nvfp4 keeps the weights of an MXFP4 checkpoint, but {opened.why_not} Drop the option to "
            "quantize a BF16 model."
        )


def _check_source(opened: OpenedModel, options: Options, model: nn.Module) -> tuple[Target, list[Scaled]]:
    """Check the options against the checkpoint: (the target, what the cast will set), if nothing would be lost.

    The format is attached to the model on the meta device, which shows whether all that it quantizes can be written.
    """
    domains: list[Scaled] = []
    target = None
    if opened.source is not None:
        activations = QFORMATS[options.qformat].activations
        path, cache = opened.checkpoint.path, options.kv_cache_qformat
        target = choose_target(opened.source.family, options.layout, activations, path, cache)
        if options.cast_mxfp4_to_nvfp4:
            domains = cast_domains(opened.source, target, options.inexact)
    _attach(model, options)
    target = target or model_target(opened, model, options.layout, options.kv_cache_qformat)
    check_kv_cache(opened.checkpoint, target)
    matching_weights(model, opened, target)
    return target, domains


def _attach(model: nn.Module, options: Options, static: bool = False) -> None:
    """Attach the quantizers that the options ask for."""
    attach(model, QFORMATS[options.qformat], static, options.input_scales_per)
    if options.kv_cache_qformat == "fp8":
        attach_kv_cache(model)


def _prepare(model: nn.Module, options: Options, job: _Job, stack: ExitStack, progress: Progress) -> _Loop | LayerLoop:
    """Attach the format; returns what runs the model. `stack` holds the source's files open until all is written."""
    loop = _Loop(job.samples, options.batch_size, job.device, progress)
    if not options.low_memory_mode:
        loop.fit(model)  # before there are quantizers: trial runs must leave no trace
    _attach(model, options, static=options.cast_mxfp4_to_nvfp4)
    if not options.low_memory_mode:
        return loop
    weights = stack.enter_context(Weights(job.opened.checkpoint, job.opened.pairs, model, job.device))
    return LayerLoop(model, weights, job.samples, options.batch_size, progress)


@dataclass
class _Loop:
    """Runs a model on samples, without its head, which no format quantizes."""

    samples: Sequence[Tensor]
    batch_size: int
    device: str
    progress: Progress

    def __call__(self, model: nn.Module) -> None:
        with explain_run_errors():
            for batch in split(self.samples, self.batch_size):
                self._run(model, batch)
                self.progress("calibrate", len(batch), len(self.samples))

    def _run(self, model: nn.Module, tokens: Tensor) -> None:
        body: Any = model.base_model
        with torch.no_grad():
            body(input_ids=tokens.to(self.device), use_cache=False)

    def fit(self, model: nn.Module) -> None:
        """If no batch size was given, find the largest that fits, on copies of the longest sample."""
        if self.batch_size or not self.samples:
            return
        find = require("accelerate.utils", "ptq").find_executable_batch_size
        longest = max(self.samples, key=lambda sample: sample.shape[1])

        def attempt(batch_size: int) -> int:
            self._run(model, longest.expand(batch_size, -1))
            return batch_size

        first = min(_FIRST_BATCH[torch.device(self.device).type], len(self.samples))
        with explain_run_errors():
            self.batch_size = find(attempt, starting_batch_size=first)()


def _cramped(model: nn.Module) -> list[bool]:
    return [module.cramped for module in model.modules() if isinstance(module, TensorQuantizer)]


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    clock[name] = time.monotonic() - begin


def _peaks() -> dict[str, int]:
    import resource  # Windows has none, and imports this module, too

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    devices = range(torch.cuda.device_count())
    return {"host": host, "device": max((torch.cuda.max_memory_allocated(each) for each in devices), default=0)}
