"""The Report of a conversion or a verification: what is exact, what is not, and by how much, as measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fp4cast.checkpoints.byte_ranges import CHUNK_BYTES, Files
from fp4cast.checkpoints.header import Tensor

__all__ = ["Difference", "InexactTensor", "Report", "digest", "digest_bytes", "inexact_tensor"]


def _number(value: float) -> float | None:
    """JSON has no NaN, which is what a damaged scale decodes to."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class InexactTensor:
    """A tensor that could not be written exactly, with its error against the source's values.

    Attributes:
        name: the module.
        rounded_half_blocks: how many half-blocks of 16 weights hold a rounded value.
        max_abs_error: largest absolute error of a weight.
        mse: mean squared error over all weights of the tensor.
        snr_db: 10 log10(energy of the source / squared error).
    """

    name: str
    rounded_half_blocks: int
    max_abs_error: float
    mse: float
    snr_db: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.name,
            "rounded_half_blocks": self.rounded_half_blocks,
            "max_abs_error": _number(self.max_abs_error),
            "mse": _number(self.mse),
            "snr_db": _number(self.snr_db),
        }


def inexact_tensor(
    name: str, rounded: int, elements: int, squared_error: float, max_error: float, energy: float
) -> InexactTensor:
    """Figures from sums: squared_error and energy over all `elements` weights."""
    snr = 10 * math.log10(energy / squared_error) if energy > 0 and squared_error > 0 else 0.0
    return InexactTensor(name, rounded, max_error, squared_error / elements, snr)


@dataclass(frozen=True)
class Difference:
    """One thing that verification found wrong.

    Attributes:
        name: the tensor or file.
        kind: "missing", "unexpected", "dtype", "shape", "bytes", "values", "scale", "index", "config" or "file".
        detail: expected and actual, in words.
    """

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """What `convert` did or `verify` found.

    Attributes:
        source: the source directory.
        destination: the destination directory.
        family: of the source.
        layout: of the destination.
        activations: "w4a16" or "w4a4".
        exact: every value of every cast tensor equals the source's.
        tensors: counts of MXFP4 tensors "cast", "exact", "inexact", and of tensors "copied".
        half_blocks: counts "verbatim", "shifted", "rounded".
        inexact: the tensors that are not exact.
        marlin_exact: vLLM's Marlin kernels keep every value too.
        bytes: "read" and "written".
        seconds: wall time.
        verified: the figures were measured on what was written.
        served: where the result can be served, in words.
        differences: what verification found wrong; empty when all is well.
    """

    source: str
    destination: str
    family: str
    layout: str
    activations: str
    exact: bool
    tensors: Mapping[str, int]
    half_blocks: Mapping[str, int]
    inexact: Sequence[InexactTensor]
    marlin_exact: bool
    bytes: Mapping[str, int]
    seconds: float
    verified: bool
    served: str
    differences: Sequence[Difference] = field(default=())

    @property
    def ok(self) -> bool:
        """Nothing was found wrong; inexact tensors that were asked for are not wrong."""
        return not self.differences

    def facts(self) -> dict[str, Any]:
        """What does not depend on when, where and how fast: a JSON object."""
        return {
            "family": self.family,
            "layout": self.layout,
            "activations": self.activations,
            "exact": self.exact,
            "tensors": dict(self.tensors),
            "half_blocks": dict(self.half_blocks),
            "inexact": [tensor.to_json() for tensor in self.inexact],
            "marlin_exact": self.marlin_exact,
        }

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return {
            "source": self.source,
            "destination": self.destination,
            **self.facts(),
            "bytes": dict(self.bytes),
            "seconds": round(self.seconds, 3),
            "verified": self.verified,
            "served": self.served,
            "differences": [{"name": d.name, "kind": d.kind, "detail": d.detail} for d in self.differences],
        }


def digest_bytes(data: bytes) -> str:
    """BLAKE2b of a document."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest(tensors: Sequence[Tensor]) -> str:
    """BLAKE2b of the bytes of some tensors: how a rounded tensor, which no source value pins down, is recognised."""
    state = hashlib.blake2b(digest_size=16)
    with Files() as files:
        for tensor in tensors:
            for start in range(0, tensor.nbytes, CHUNK_BYTES):
                chunk = files[tensor.path].read(tensor.start + start, min(CHUNK_BYTES, tensor.nbytes - start))
                state.update(chunk.data)
    return state.hexdigest()
