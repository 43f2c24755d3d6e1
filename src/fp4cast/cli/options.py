"""Arguments and options that several commands share; the library defines an option's values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp4cast.casting.inexact import Inexact
from fp4cast.conversion.direction import Direction
from fp4cast.formats import Activations, Fp8
from fp4cast.layouts.choose import ConvertLayout, LayoutName
from fp4cast.parallel.engines import EngineName

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory, a Hugging Face model (ORG/NAME, ORG/NAME@REVISION or its page), or a GGUF file.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Worker threads, in several processes where there is much to do; 1 works in the main thread.",
        show_default="one a core, 16 at most",
        metavar="N",
    ),
]
Where = Annotated[
    EngineName, typer.Option("--engine", help="This machine, or the tasks of a Ray cluster with --jobs threads each.")
]
InputScales = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|FILE",
        help="For w4a4: the input_scale of every projection, or a JSON or safetensors file "
        "that maps each projection to the amax of its input.",
    ),
]
Shards = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Write only part I of N, some of the shards, as one task of a job array."),
]
Finish = Annotated[bool, typer.Option("--finish", help="When all parts are written: verify them and publish DST.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The directory to make, or the GGUF file.")]
To = Annotated[
    Direction,
    typer.Option("--to", help="mxfp4: the way back, from an NVFP4 SRC whose weights were cast from MXFP4."),
]
LayoutOption = Annotated[LayoutName, typer.Option("--layout", help="How the tensors are named and stored.")]
ConvertLayoutOption = Annotated[
    ConvertLayout,
    typer.Option("--layout", help="How the tensors are named and stored; mlx is for MLX's mxfp4, which stays MLX's."),
]
OptionalActivations = Annotated[
    Activations | None,
    typer.Option("--activations", help="w4a4 needs --input-scales.", show_default="w4a16 where it can be served"),
]
InexactOption = Annotated[
    Inexact,
    typer.Option("--inexact", help="Where no tensor scale is exact: stop before writing, or write the nearest values."),
]
KvCacheOption = Annotated[
    str,
    typer.Option(
        "--kv-cache-qformat",
        metavar="none|fp8_cast",
        help="Ask engines for a KV cache in FP8, with scales of 1; none: leave it to them.",
    ),
]
Fp8Option = Annotated[
    Fp8,
    typer.Option(
        "--fp8",
        help="attention: quantize it from BF16 to FP8, in blocks of 128 x 128; measured, and not exact.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a DST of fp4cast, once the new one is complete.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Insist: refuse to begin anew where an interrupted run had other options.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew; lose what an interrupted run has finished.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Of a model on the Hub, have only the shards on the disk that are being converted, and DST."
    ),
]
Push = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME", help="Upload DST to this repository on the Hub then; private, and asked for."),
]
Public = Annotated[bool, typer.Option("--public", help="With --push: everybody may see the repository.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree beforehand, as to a download of more than 1 GB.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not read the result back.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Do not wait for the disk; a power cut may then cost data.")]
NoCard = Annotated[bool, typer.Option("--no-card", help="Write no model card; README.md stays the source's.")]
SourceId = Annotated[
    str | None,
    typer.Option(metavar="ORG/NAME[@REV]", help="SRC's id on the Hub, for card and receipt, if SRC does not say it."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say each step on stderr.")]
Log = Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Append each step, with its time, to FILE.")]
