"""The conversions whose bits rot, and a map of every byte of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import attention
import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, RECEIPT, open_checkpoint
from fp4cast.checkpoints.header import METADATA, Shard
from fp4cast.families.recognise import read_source
from fp4cast.verification.opened import open_both
from helpers import VARIANTS, edit


@dataclass(frozen=True)
class Case:
    """A conversion.

    Attributes:
        name: its kind, layout and activations.
        source: the MXFP4 checkpoint.
        destination: the NVFP4 one.
        bare: a copy of it without the receipt.
        rounded: some half-blocks are rounded, which only the receipt can tell from damage.
    """

    name: str
    source: Path
    destination: Path
    bare: Path
    rounded: bool = False

    @property
    def directories(self) -> list[Path]:
        """Where lies are told; without the receipt, what is rounded is wrong anyway."""
        return [self.destination] if self.rounded else [self.destination, self.bare]


class Span(NamedTuple):
    """Some bytes of a file.

    Attributes:
        path: the file.
        start: the first byte.
        nbytes: their number.
        names: one of them must be said when they change.
        free: they may change where a note says this; empty if they may not.
    """

    path: Path
    start: int
    nbytes: int
    names: tuple[str, ...]
    free: str = ""


def make_cases(root: Path) -> list[Case]:
    """Every family in every layout, one with attention in FP8, with rounded half-blocks, and with a tensor of zeros."""
    for kind in mini.KINDS:
        mini.make(kind, root / kind)
    cases = [_convert(root, root / variant[0], "-".join(variant), *variant[1:]) for variant in VARIANTS]
    cases.append(_convert(root, attention.kimi_k3(root / "fp8"), "kimi-k3-fp8", "modelopt", "w4a16", fp8="attention"))
    rng, rounded, zeros = (
        np.random.default_rng(0),
        *(shutil.copytree(root / "dense", root / n) for n in ("wide", "zero")),
    )
    for pair in read_source(open_checkpoint(rounded)).pairs.values():
        edit(
            rounded, pair.codes.name, lambda data: data.__setitem__(slice(0, 256), rng.integers(0, 256, 256, np.uint8))
        )
        edit(rounded, pair.scales.name, lambda data: data.__setitem__(slice(0, 16), rng.integers(90, 130, 16)))
    edit(zeros, "model.layers.0.mlp.down_proj.weight_packed", lambda data: data.fill(0))
    cases.append(_convert(root, rounded, "dense-rounded", "modelopt", "w4a16", rounded=True))
    cases.append(_convert(root, zeros, "dense-zeros", "modelopt", "w4a16"))
    return cases


def _convert(
    root: Path, source: Path, name: str, layout: str, activations: str, *, rounded: bool = False, **options: str
) -> Case:
    scales = 1.0 if activations == "w4a4" else None
    destination, bare = root / f"{name}-NVFP4", root / f"{name}-bare"
    options |= {"layout": layout, "activations": activations, "inexact": "nearest"}
    fp4cast.convert(source, destination, input_scales=scales, sync=False, **options)
    shutil.copytree(destination, bare)
    (bare / RECEIPT).unlink()
    return Case(name, source, destination, bare, rounded)


def spans(source: Path, destination: Path) -> dict[str, list[Span]]:
    """Every byte of a destination but the card's, by region."""
    opened = open_both(source, destination, CONFIG)
    regions: dict[str, list[Span]] = {}
    regions_of = ("codes", "block scales", "tensor scales", "input scales")
    weights: dict[str, tuple[str, tuple[str, ...], str]] = {}
    for module in opened.selection.modules:
        names = opened.target.names(module)
        # A weight is judged as a whole, and the receipt knows all input scales at once.
        called = (names[:3], names[:3], names[:3], (*names, RECEIPT))
        free = ("", "", names.tensor_scale, "input scales")
        weights |= {name: (regions_of[i], tuple(called[i]), free[i]) for i, name in enumerate(names)}
    for module in opened.selection.fp8:
        names = (f"{module}.weight", f"{module}.weight_scale")
        weights |= {name: (region, names, "") for name, region in zip(names, ("FP8 codes", "FP8 scales"), strict=True)}
    for tensor in opened.destination.tensors.values():
        region, called_so, note = weights.get(tensor.name, ("copied tensors", (tensor.name,), ""))
        if tensor.nbytes:
            regions.setdefault(region, []).append(Span(tensor.path, tensor.start, tensor.nbytes, called_so, note))
    for shard in opened.destination.shards.values():
        for region, span in _header(shard):
            regions.setdefault(region, []).append(span)
    for file in (CONFIG, QUANT_CONFIG, INDEX, RECEIPT, *map(str, opened.destination.companions())):
        path = destination / file
        if path.exists() and not is_card_file(file):
            region = file if file in (CONFIG, QUANT_CONFIG, INDEX, RECEIPT) else "companions"
            regions.setdefault(region, []).append(Span(path, 0, path.stat().st_size, (file,)))
    _check_complete(destination, regions)
    return regions


def _header(shard: Shard) -> list[tuple[str, Span]]:
    """The regions of a shard's header: length, JSON, `__metadata__`, padding."""
    data = shard.path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].decode()
    names = (shard.path.name, *shard.tensors)
    first = 8 + text.index(f'"{METADATA}"')
    last = first + len(f'"{METADATA}":') + len(json.dumps(shard.metadata, separators=(",", ":")))
    json_end = 8 + len(text.rstrip(" "))
    cuts = [
        ("header length", 0, 8),
        ("header JSON", 8, first),
        (METADATA, first, last),
        ("header JSON", last, json_end),
        ("header padding", json_end, end),
    ]
    return [(region, Span(shard.path, a, b - a, names)) for region, a, b in cuts if b > a]


def _check_complete(destination: Path, regions: dict[str, list[Span]]) -> None:
    """Raise if a byte belongs to no region, or to two."""
    sizes = {
        path: path.stat().st_size for path in destination.rglob("*") if path.is_file() and not is_card_file(path.name)
    }
    mapped = dict.fromkeys(sizes, 0)
    for places in regions.values():
        for span in places:
            mapped[span.path] += span.nbytes
    if mapped != sizes:
        raise ValueError(f"{destination}: bytes of no region, or of two: {set(mapped.items()) ^ set(sizes.items())}")
