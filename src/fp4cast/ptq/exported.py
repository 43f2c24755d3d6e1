"""What an export wrote, for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from fp4cast.formats import Activations, KvCache
from fp4cast.verification.figures import InexactTensor
from fp4cast.verification.report import ByteCounts


class WeightCounts(TypedDict):
    """Counts of quantized weights, of exact and inexact ones from MXFP4, and of copied tensors."""

    quantized: int
    exact: int
    inexact: int
    copied: int


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        source: the directory that the model was loaded from.
        destination: the new directory.
        layout: as in `fp4cast.convert`.
        activations: "w4a16" or "w4a4".
        kv_cache_qformat: the format of the KV cache.
        tensors: counts of weights "quantized", of those from MXFP4 "exact" and "inexact", and of tensors "copied".
        inexact: weights from MXFP4 whose written values are not the source's, with the measured errors.
        bytes: "read" from the source's files, and "written".
        seconds: wall time.
        served: where the result is served, for people.
        serve: the command that serves the result, or that none is known yet.
    """

    source: str
    destination: str
    layout: str
    activations: Activations
    kv_cache_qformat: KvCache
    tensors: WeightCounts
    inexact: Sequence[InexactTensor]
    bytes: ByteCounts
    seconds: float
    served: str
    serve: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "source": self.source,
            "destination": self.destination,
            "layout": self.layout,
            "activations": self.activations,
            "kv_cache_qformat": self.kv_cache_qformat,
            "tensors": dict(self.tensors),
            "inexact": [tensor.to_json() for tensor in self.inexact],
            "bytes": dict(self.bytes),
            "seconds": round(self.seconds, 3),
            "served": self.served,
            "serve": self.serve,
        }
