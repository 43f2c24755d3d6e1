"""The tools that make miniatures: random weights like those of trained models, the traps, and the files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fp4cast.checkpoints.header import lay_out
from fp4cast.families.merging import shared_scale_group
from fp4cast.formats import Bytes

VOCABULARY = 256
CENTER = 117  # the most frequent scale byte of the lowest domain
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Draft:
    """A miniature checkpoint under construction.

    Attributes:
        rng: the source of all random numbers.
        traps: whether to plant the traps.
        files: by shard, by name: (dtype, array).
        config: config.json.
        documents: other JSON files, by name.
        first_shard: the number in the first shard's name.
        stem: how the shards' names begin.
        metadata: of every shard.
        decoys: files that hold the weights in other formats.
    """

    rng: np.random.Generator
    traps: bool
    files: list[dict[str, tuple[str, Array]]] = field(default_factory=lambda: [{}, {}])
    config: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    first_shard: int = 1
    stem: str = "model-"
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    decoys: tuple[str, ...] = ()

    def add(self, shard: int, name: str, dtype: str, array: Array) -> None:
        """Put a tensor into a shard."""
        self.files[shard][name] = (dtype, np.ascontiguousarray(array))

    def bf16(self, shard: int, name: str, *shape: int, scale: float = 0.02) -> None:
        """Random BF16 weights."""
        values = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self.add(shard, name, "BF16", (values.view(np.uint32) >> 16).astype(np.uint16))

    def ones(self, shard: int, name: str, *shape: int) -> None:
        """BF16 ones, for norms."""
        self.add(shard, name, "BF16", np.full(shape, 0x3F80, np.uint16))

    def f32(self, shard: int, name: str, *shape: int) -> None:
        """Random FP32 weights."""
        self.add(shard, name, "F32", self.rng.standard_normal(shape).astype(np.float32))

    def fp8(
        self,
        shard: int,
        module: str,
        rows: int,
        columns: int,
        block: int,
        scales_as: str = ".scale",
        dtype: str = "F8_E8M0",
    ) -> None:
        """FP8 weights with block scales, named like the MXFP4 ones."""
        codes = self.rng.integers(0, 0x7F, (rows, columns)).astype(np.uint8)
        self.add(shard, f"{module}.weight", "F8_E4M3", codes)
        grid = (-(-rows // block), -(-columns // block))
        scales = np.full(grid, 118, np.uint8) if dtype == "F8_E8M0" else np.full(grid, 2.0**-9, np.float32)
        self.add(shard, f"{module}{scales_as}", dtype, scales)

    def mxfp4(self, module: str, *shape: int, lower: int = 0) -> tuple[Bytes, Bytes]:
        """(codes [.., K/32, 16], scales [.., K/32]) for shape [.., N, K], with the traps.

        Every scale domain lies a few binades higher or lower than the others, so that no two can be confused;
        `lower` sets one of its projections below the others.
        """
        top = CENTER + 4 + zlib.crc32(shared_scale_group(module)[0].encode()) % 7
        codes, scales = mxfp4(self.rng, shape, top - 4 - lower)
        if self.traps:
            _plant(codes.reshape(-1, 16), scales.reshape(-1), top, reaches_top=not lower)
        return codes, scales


def mxfp4(rng: np.random.Generator, shape: tuple[int, ...], center: int = CENTER) -> tuple[Bytes, Bytes]:
    """Random MXFP4 weights with codes and exponents distributed like those of trained models.

    Args:
        rng: the source of randomness.
        shape: [.., N, K] of the weights.
        center: the most frequent scale byte.

    Returns:
        Packed codes uint8 [.., N, K/32, 16] and E8M0 scales uint8 [.., N, K/32] that span about 10 binades.
    """
    blocks = (*shape[:-1], shape[-1] // 32)
    codes = rng.integers(0, 256, (*blocks, 16), np.uint8)
    scales = np.clip(np.rint(rng.normal(center, 1.2, blocks)), center - 6, center + 4).astype(np.uint8)
    return codes, scales


def _plant(codes: Bytes, scales: Bytes, top: int, *, reaches_top: bool) -> None:
    """Traps in the first and the last blocks of a tensor whose domain reaches `top`: codes [n, 16], scales [n]."""
    if reaches_top:
        scales[0] = top
    codes[-1], scales[-1] = 0x00, 0  # how ModelOpt and GGUF write a block of zeros
    codes[-2], scales[-2] = 0x88, 126  # how auto-round does, with -0
    codes[-3], scales[-3] = 0x80, 200  # an exponent that would zero the whole tensor if it counted
    codes[-4], scales[-4] = 0x75, top - 18  # magnitudes {3, 6}: exact one binade below the window, by a shift
    codes[-5, ::2] = 0x08  # -0 beside values


def write_checkpoint(
    path: Path,
    files: Mapping[str, Mapping[str, tuple[str, Array]]],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write safetensors shards, their index and config.json.

    Args:
        path: the directory to make.
        files: by file name, by tensor name: (safetensors dtype, array of the stored bits).
        config: config.json.
        metadata: of every shard.
    """
    path.mkdir(parents=True)
    for file, tensors in files.items():
        placed = lay_out(((n, dtype, array.shape) for n, (dtype, array) in tensors.items()), dict(metadata))
        with (path / file).open("wb") as out:
            out.write(placed.header)
            for name in sorted(tensors, key=lambda n: placed.offsets[n]):
                out.write(tensors[name][1].tobytes())
    index = {
        "metadata": {"total_size": sum(a.nbytes for tensors in files.values() for _, a in tensors.values())},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))
