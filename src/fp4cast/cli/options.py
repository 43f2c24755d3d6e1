"""The command line's arguments and options: what commands share, and the values that an option takes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "Activations",
    "Engine",
    "Finish",
    "Inexact",
    "InputScales",
    "Jobs",
    "Json",
    "Layout",
    "Shards",
    "Source",
    "Where",
]


class Layout(StrEnum):
    """Values of --layout."""

    modelopt = "modelopt"
    compressed_tensors = "compressed-tensors"


class Activations(StrEnum):
    """Values of --activations."""

    w4a16 = "w4a16"
    w4a4 = "w4a4"


class Inexact(StrEnum):
    """Values of --inexact."""

    fail = "fail"
    nearest = "nearest"


class Engine(StrEnum):
    """Values of --engine."""

    local = "local"
    ray = "ray"


Source = Annotated[str, typer.Argument(metavar="SRC", help="A directory, or a Hugging Face model id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; everything else on stderr.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Worker threads; 1 works inline.",
        show_default="one a core, 16 at most",
        metavar="N",
    ),
]
Where = Annotated[Engine, typer.Option("--engine", help="This machine, or the tasks of a Ray cluster, N threads each.")]
InputScales = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|FILE",
        help="For w4a4: the input_scale of every projection, or a JSON or safetensors file "
        "of projection name -> amax of its input.",
    ),
]
Shards = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Write only the I-th of N parts of the shards, as a task of a job array does."),
]
Finish = Annotated[bool, typer.Option("--finish", help="When all parts are written: verify them, let DST appear.")]
