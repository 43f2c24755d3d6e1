"""The commands that run a model: `ptq` and `calibrate`. They need the extra `ptq`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fp4cast.casting.inexact import Inexact
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import show_facts, show_inexact
from fp4cast.cli.options import Jobs, Json, LayoutOption, Overwrite, Source
from fp4cast.cli.progress import format_bytes
from fp4cast.layouts.choose import LAYOUTS

if TYPE_CHECKING:
    from fp4cast.ptq.flow import Quantized
    from fp4cast.ptq.layerwise.calibrate import Calibrated


def _underscores(word: str) -> str:
    """Accept `--calib-size` for `--calib_size`, ModelOpt's spelling, which the help shows; values stay as they are."""
    return word if word in {layout.name for layout in LAYOUTS} else word.replace("-", "_")


ANY_SPELLING: dict[str, Any] = {"context_settings": {"token_normalize_func": _underscores}}

Checkpoint = Annotated[
    str, typer.Option("--pyt_ckpt_path", metavar="SRC", help="A directory, or a Hugging Face model id.")
]
Format = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="nvfp4, nvfp4_mlp_only, nvfp4_experts_only, nvfp4_omlp_only: W4A4; w4a16_nvfp4: weights only.",
    ),
]
ExportPath = Annotated[Path, typer.Option("--export_path", metavar="DST", help="The directory to make.")]
CastWeights = Annotated[
    bool, typer.Option("--cast_mxfp4_to_nvfp4", help="Keep the weights of an MXFP4 checkpoint, bit for bit.")
]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="FILE|ID", help="A text file, a .jsonl file or a Hub dataset, to calibrate activations on."),
]
Samples = Annotated[
    int | None,
    typer.Option("--calib_size", min=1, metavar="N", show_default="512", help="At most N samples."),
]
Tokens = Annotated[
    int | None,
    typer.Option("--calib_seq", min=1, metavar="N", show_default="512", help="At most N tokens of a sample."),
]
Batch = Annotated[int, typer.Option("--batch_size", min=0, metavar="N", help="Samples of a batch; 0: as many as fit.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")]
Remote = Annotated[bool, typer.Option("--trust_remote_code", help="Run the model code in the checkpoint.")]
Nearest = Annotated[
    Inexact, typer.Option(help="With the cast, where no tensor scale is exact: stop, or write the nearest values.")
]


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
    layout: LayoutOption = "modelopt",
    inexact: Nearest = "fail",
    trust_remote_code: Remote = False,
    jobs: Jobs = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Load a model, quantize and calibrate it, cast its MXFP4 weights, and export it as NVFP4. Needs torch.

    To change only the weights of an MXFP4 checkpoint, use `fp4cast convert`, which needs no model.
    """

    def work(meter: Any) -> Quantized:
        from fp4cast.ptq.flow import Options, quantize

        options = Options(
            pyt_ckpt_path,
            export_path,
            qformat,
            cast_mxfp4_to_nvfp4,
            dataset=dataset,
            calib_size=calib_size,
            calib_seq=calib_seq,
            batch_size=batch_size,
            device=device,
            layout=layout,
            inexact=inexact,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            jobs=jobs,
        )
        return quantize(options, meter)

    done = run_or_exit(as_json, work)
    if as_json:
        print_json(done.to_json())
    else:
        _show(people_console(as_json), done)


def calibrate(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .json or .safetensors file: module -> amax.")],
    dataset: Annotated[str, typer.Option(metavar="FILE|ID", help="A text file, a .jsonl file or a Hub dataset.")],
    calib_size: Samples = 512,
    calib_seq: Tokens = 512,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=0, metavar="N", help="Samples of a batch; 0: 4 on a CPU, 16 on a GPU.")
    ] = 0,
    device: Device = "auto",
    trust_remote_code: Remote = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Find the activation scales of an MXFP4 checkpoint for `convert --activations w4a4`. Needs torch.

    The model runs layer by layer: one layer's weights are in memory at a time.
    """

    def work(meter: Any) -> Calibrated:
        from fp4cast.ptq.layerwise.calibrate import calibrate

        return calibrate(
            source,
            out,
            dataset=dataset,
            calib_size=calib_size or 0,
            calib_seq=calib_seq or 0,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=meter,
        )

    done = run_or_exit(as_json, work)
    if as_json:
        print_json(done.to_json())
    else:
        _show_amax(people_console(as_json), done)


def _show_amax(console: Console, done: Calibrated) -> None:
    values = done.amax.values()
    rows = [
        ("modules", f"{len(values)}, with an amax from {min(values):g} to {max(values):g}"),
        ("calibration", f"{done.samples} samples, {done.tokens:,} tokens in {done.seconds:.1f} s"),
    ]
    if done.idle:
        rows.append(
            ("idle", f"{done.idle} experts saw no token, and take the largest amax of the others in their layer")
        )
    rows.append(("next", f"fp4cast convert {done.source} DST --activations w4a4 --input-scales {done.out}"))
    show_facts(console, f"wrote {done.out}", rows)


def _show(console: Console, done: Quantized) -> None:
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
        rows.append(("calibration", text))
        rows.append(("activations", "NVFP4 too, quantized while serving: that part is not lossless"))
    rows += [
        ("served by", exported.served),
        ("time", ", ".join(f"{name} {value:.1f} s" for name, value in done.seconds.items())),
        ("memory", ", ".join(f"{name} {format_bytes(size)}" for name, size in done.peak_memory.items() if size)),
    ]
    show_facts(console, f"wrote {exported.destination}", rows)
    if exported.inexact:
        console.print(show_inexact(exported.inexact))


def _weights(done: Quantized) -> str:
    t = done.exported.tensors
    if done.cast is None:
        return f"requantized; of {t['exact'] + t['inexact']} MXFP4 tensors, {t['exact']} kept every value"
    if done.exact:
        return f"[green]exact[/]: all {done.cast} MXFP4 tensors keep every value, measured on what was written"
    return f"[yellow]not exact[/]: {t['inexact']} of {done.cast} MXFP4 tensors are rounded (measured)"
