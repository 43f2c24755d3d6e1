"""The commands that run a model: `ptq` and `calibrate`. They need the extra `ptq`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fp4cast.casting.inexact import Inexact
from fp4cast.cli.application import command
from fp4cast.cli.consent import agree_to_download
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import kv_cache_sentence, show_facts, show_inexact, show_next
from fp4cast.cli.modelopt_options import PtqCommand, meaning
from fp4cast.cli.options import DryRun, Jobs, Json, LayoutOption, Overwrite, Source, Yes
from fp4cast.cli.preview import look_ahead
from fp4cast.cli.progress import format_bytes
from fp4cast.conversion.input_scales import ScalesPer
from fp4cast.conversion.preview import Preview
from fp4cast.errors import UsageError

if TYPE_CHECKING:
    from fp4cast.ptq.flow import Options, Quantized
    from fp4cast.ptq.layerwise.calibrate import Calibrated


def _sizes(text: str | None) -> list[int] | None:
    """The numbers of a list such as "256,128"; raise UsageError for one that is none."""
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--calib_size: expected an integer, or several with commas between, got {text!r}") from error


Checkpoint = Annotated[str, typer.Option("--pyt-ckpt-path", "--model", metavar="SRC", help=meaning("--pyt_ckpt_path"))]
Format = Annotated[str, typer.Option(metavar="NAME", help=meaning("--qformat"))]
ExportPath = Annotated[Path, typer.Option("--export-path", metavar="DST", help=meaning("--export_path"))]
CastWeights = Annotated[bool, typer.Option("--cast-mxfp4-to-nvfp4", help=meaning("--cast_mxfp4_to_nvfp4"))]
Dataset = Annotated[str | None, typer.Option(metavar="FILE|ID,...", help=meaning("--dataset"))]
Samples = Annotated[
    str | None,
    typer.Option("--calib-size", metavar="N,...", show_default="512", help=meaning("--calib_size")),
]
Tokens = Annotated[
    int | None,
    typer.Option("--calib-seq", min=1, metavar="N", show_default="512", help=meaning("--calib_seq")),
]
Batch = Annotated[int, typer.Option("--batch-size", min=0, metavar="N", help=meaning("--batch_size"))]
Device = Annotated[str, typer.Option(metavar="NAME", help=meaning("--device"))]
Sequential = Annotated[bool, typer.Option("--use-seq-device-map", help=meaning("--use_seq_device_map"))]
GpuShare = Annotated[
    float, typer.Option("--gpu-max-mem-percentage", metavar="SHARE", help=meaning("--gpu_max_mem_percentage"))
]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help=meaning("--trust_remote_code"))]
Attention = Annotated[
    str | None, typer.Option("--attn-implementation", metavar="NAME", help=meaning("--attn_implementation"))
]
KvCache = Annotated[
    str, typer.Option("--kv-cache-qformat", "--kv-cache-quant", metavar="NAME", help=meaning("--kv_cache_qformat"))
]
LowMemory = Annotated[bool, typer.Option("--low-memory-mode", help=meaning("--low_memory_mode"))]
NoVerbose = Annotated[
    bool, typer.Option("--no-verbose", help="Say only where the result was written, and what was lost.")
]
SkipGenerate = Annotated[bool, typer.Option("--skip-generate", help=meaning("--skip_generate"))]
ExportFmt = Annotated[str, typer.Option("--export-fmt", metavar="hf", help=meaning("--export_fmt"))]
Sparsity = Annotated[str, typer.Option("--sparsity-fmt", metavar="dense", help=meaning("--sparsity_fmt"))]
ServingGpus = Annotated[
    int,
    typer.Option(
        "--inference-tensor-parallel",
        "--inference-pipeline-parallel",
        metavar="N",
        help=meaning("--inference_tensor_parallel"),
    ),
]
ActHeadroom = Annotated[
    bool,
    typer.Option(
        "--act-headroom",
        "--nvfp4-act-headroom",
        help="Scale activations by ModelOpt's nvfp4_act_headroom instead of their largest magnitude: room above for "
        "larger ones while serving.",
    ),
]
ScalesOf = Annotated[
    ScalesPer | None,
    typer.Option(
        "--input-scales-per",
        help="bank: the experts of a layer share an input scale; expert: one each, but not for gpt-oss, whose experts "
        "lie in one tensor.",
        show_default="as the layout holds them",
    ),
]
Nearest = Annotated[
    Inexact, typer.Option(help="With the cast, where no tensor scale is exact: stop, or write the nearest values.")
]


@command(PtqCommand)
def ptq(
    pyt_ckpt_path: Checkpoint,
    qformat: Format,
    export_path: ExportPath,
    cast_mxfp4_to_nvfp4: CastWeights = False,
    dataset: Dataset = None,
    calib_size: Samples = None,
    calib_seq: Tokens = None,
    batch_size: Batch = 0,
    device: Device = "auto",
    use_seq_device_map: Sequential = False,
    gpu_max_mem_percentage: GpuShare = 0.8,
    layout: LayoutOption = "modelopt",
    kv_cache_qformat: KvCache = "none",
    inexact: Nearest = "fail",
    trust_remote_code: Remote = False,
    attn_implementation: Attention = None,
    act_headroom: ActHeadroom = False,
    input_scales_per: ScalesOf = None,
    low_memory_mode: LowMemory = False,
    no_verbose: NoVerbose = False,
    skip_generate: SkipGenerate = False,
    export_fmt: ExportFmt = "hf",
    sparsity_fmt: Sparsity = "dense",
    inference_parallel: ServingGpus = 1,
    jobs: Jobs = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Load a model, quantize and calibrate it, cast its MXFP4 weights, and export it as NVFP4. Needs torch.

    To change only the weights of an MXFP4 checkpoint, use `fp4cast convert`, which needs no model.
    """
    given = dict(locals())  # the options have the names of these

    def preview(_: Any) -> Preview:
        from fp4cast.ptq.preview import preview_export

        return preview_export(_options(given))

    def work(meter: Any) -> Quantized:
        from fp4cast.ptq.flow import quantize

        return quantize(_options(given), meter)

    if dry_run:
        look_ahead(as_json, preview)
        return
    _tell(run_or_exit(as_json, work), as_json, not no_verbose)


def _options(given: Mapping[str, Any]) -> Options:
    """The library's options, from those of the command line by name."""
    from fp4cast.ptq.flow import Options
    from fp4cast.ptq.headroom import Headroom

    read = {"calib_size": _sizes(given["calib_size"]), "act_headroom": Headroom() if given["act_headroom"] else None}
    values = {**given, **read}
    return Options(**{field.name: values[field.name] for field in fields(Options)})


@command()
def calibrate(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .json or .safetensors file: module -> amax.")],
    dataset: Annotated[str, typer.Option(metavar="FILE|ID,...", help=meaning("--dataset"))],
    calib_size: Samples = "512",
    calib_seq: Tokens = 512,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=0, metavar="N", help="Samples of a batch; 0: 4 on a CPU, 16 on a GPU.")
    ] = 0,
    device: Device = "auto",
    trust_remote_code: Remote = False,
    act_headroom: ActHeadroom = False,
    input_scales_per: ScalesOf = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Find the activation scales of an MXFP4 checkpoint for `convert --activations w4a4`. Needs torch.

    The model runs layer by layer: one layer's weights are in memory at a time.
    """
    how: dict[str, Any] = {"dataset": dataset, "calib_seq": calib_seq or 0, "batch_size": batch_size, "device": device}
    how |= {"overwrite": overwrite, "input_scales_per": input_scales_per}

    def preview(_: Any) -> Preview:
        from fp4cast.ptq.layerwise.calibrate import preview_calibration

        return preview_calibration(source, out, calib_size=_sizes(calib_size) or (), **how)

    def work(meter: Any) -> Calibrated:
        from fp4cast.ptq.headroom import Headroom
        from fp4cast.ptq.layerwise.calibrate import calibrate

        sizes, headroom = _sizes(calib_size) or (), Headroom() if act_headroom else None
        rest: dict[str, Any] = {"trust_remote_code": trust_remote_code, "act_headroom": headroom, "progress": meter}
        return calibrate(source, out, calib_size=sizes, **how, **rest)

    if dry_run:
        look_ahead(as_json, preview)
        return
    agree_to_download([source], yes=yes, as_json=as_json)
    done = run_or_exit(as_json, work)
    if as_json:
        print_json(done.to_json())
    else:
        _show_amax(people_console(as_json), done)


def _show_amax(console: Console, done: Calibrated) -> None:
    values = done.amax.values()
    rows = [
        ("modules", f"{len(values)}, with an amax from {min(values):g} to {max(values):g}"),
        (
            "calibration",
            f"{done.samples} samples, {done.tokens:,} tokens in {done.seconds:.1f} s" + _with_headroom(done.rules),
        ),
    ]
    if done.idle:
        rows.append(
            ("idle", f"{done.idle} experts saw no token, and take the largest amax of the others in their layer")
        )
    rows.append(("next", f"fp4cast convert {done.source} DST --activations w4a4 --input-scales {done.out}"))
    show_facts(console, f"wrote {done.out}", rows)


def _with_headroom(rules: Mapping[str, Any]) -> str:
    chosen = rules["act_headroom"]
    if chosen is None:
        return ""
    but = f", but for {chosen['none_left']} inputs whose blocks span too much" if chosen["none_left"] else ""
    return f"; amax with headroom{but}"


def _tell(done: Quantized, as_json: bool, verbose: bool) -> None:
    if as_json:
        print_json(done.to_json())
    else:
        _show(people_console(as_json), done, verbose)


def _show(console: Console, done: Quantized, verbose: bool) -> None:
    exported = done.exported
    t, calibration = exported.tensors, done.calibration
    rows = [
        ("format", f"{done.qformat}: {exported.layout}, {exported.activations.upper()}"),
        ("tensors", f"{t['quantized']} quantized, {t['copied']} copied byte for byte"),
        ("weights", _weights(done)),
    ]
    if kept := done.lossless:
        counts = (
            f"{kept['tensors']} of {kept['of_tensors']} tensors, {kept['blocks']:,} of {kept['of_blocks']:,} blocks"
        )
        rows.append(("lossless", counts))
    if calibration["samples"]:
        text = (
            f"{calibration['samples']} samples, {calibration['tokens']:,} tokens; {calibration['batch_size']} together"
        )
        rows.append(("calibration", text + _with_headroom(done.input_scales)))
        rows.append(("activations", "NVFP4 too, quantized while serving: that part is not lossless"))
    if exported.kv_cache_qformat != "none":
        rows.append(("KV cache", kv_cache_sentence(exported.kv_cache_qformat)))
    rows += [
        ("served by", exported.served),
        ("time", ", ".join(f"{name} {value:.1f} s" for name, value in done.seconds.items())),
        ("memory", ", ".join(f"{name} {format_bytes(size)}" for name, size in done.peak_memory.items() if size)),
    ]
    show_facts(console, f"wrote {exported.destination}", rows if verbose else [])
    if exported.inexact:
        show_inexact(console, exported.inexact)
    if verbose:
        show_next(console, exported.serve)


def _weights(done: Quantized) -> str:
    t = done.exported.tensors
    if done.cast is None:
        return f"requantized; of {t['exact'] + t['inexact']} MXFP4 tensors, {t['exact']} kept every value"
    if done.exact:
        return f"[green]exact[/]: all {done.cast} MXFP4 tensors keep every value, measured on what was written"
    return f"[yellow]not exact[/]: {t['inexact']} of {done.cast} MXFP4 tensors are rounded (measured)"
