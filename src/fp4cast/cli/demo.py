"""The demo: a miniature of each family made, inspected, cast, verified, and verified again with one bit flipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.convert import convert
from fp4cast.conversion.inspection import inspect
from fp4cast.miniatures import KINDS, make
from fp4cast.verification.verify import verify


def run_demo(directory: Path) -> Iterator[dict[str, Any]]:
    """Make, inspect, cast and verify every kind below `directory`; yields one JSON object for each."""
    for kind in KINDS:
        source, destination = make(kind, directory / kind), directory / f"{kind}-NVFP4"
        info = inspect(source)
        activations = info.targets[0].activations
        report = convert(
            source, destination, activations=activations, input_scales=1.0 if activations == "w4a4" else None
        )
        again = verify(source, destination)
        yield {
            "kind": kind,
            **report.facts(),
            "exact": report.exact and again.exact,
            "spread": max(domain.spread for domain in info.domains),
            "flip_found": _flip_is_found(source, destination),
        }


def _flip_is_found(source: Path, destination: Path) -> bool:
    """Flip one bit of a weight's code, verify, and flip it back."""
    tensors = open_checkpoint(destination).tensors.values()
    codes = next(tensor for tensor in tensors if tensor.dtype == "U8")
    _flip(codes.path, codes.start)
    found = not verify(source, destination).ok
    _flip(codes.path, codes.start)
    return found


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
