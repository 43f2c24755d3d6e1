"""The Report of a conversion or a verification: what is exact, what is not, and by how much, as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, get_args

from fp4cast.families.family import Source
from fp4cast.formats import Activations, KvCache
from fp4cast.layouts.layout import Selection, Target
from fp4cast.verification.figures import Fp8Tensor, InexactTensor


class TensorCounts(TypedDict):
    """Counts of cast MXFP4 tensors, of exact and inexact ones among them, and of copied tensors."""

    cast: int
    exact: int
    inexact: int
    copied: int


class HalfBlockCounts(TypedDict):
    """Counts of half-blocks that keep their codes, that have shifted codes, and that hold other values."""

    verbatim: int
    shifted: int
    rounded: int


class ByteCounts(TypedDict):
    """Bytes read and written."""

    read: int
    written: int


Area = Literal["weights", "documents", "companions"]
AREAS: tuple[Area, ...] = get_args(Area)
_AREAS: dict[str, Area] = {"file": "companions", "config": "documents", "header": "documents", "index": "documents"}
_AREAS["metadata"] = "companions"  # what another tool wrote around weights that are right


@dataclass(frozen=True)
class Difference:
    """One thing that verification found wrong.

    Attributes:
        name: the tensor or file.
        kind: "missing", "unexpected", "dtype", "shape", "bytes", "values", "scale", "header", "index", "config",
            "file" or "metadata".
        detail: expected and actual, for people.
    """

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"

    @property
    def area(self) -> Area:
        """What differs: the weights, the documents that an engine reads, or the companions that people may edit."""
        return _AREAS.get(self.kind, "weights")


def passes(differences: Sequence[Difference], *, strict: bool) -> bool:
    """Whether none of these counts as wrong: companions do so only if `strict`."""
    return not any(strict or difference.area != "companions" for difference in differences)


def verdicts(differences: Sequence[Difference]) -> dict[str, bool]:
    """By area, whether nothing differs."""
    return {area: all(each.area != area for each in differences) for area in AREAS}


def differences_json(differences: Sequence[Difference]) -> list[dict[str, str]]:
    """A JSON array."""
    return [{"name": each.name, "kind": each.kind, "detail": each.detail} for each in differences]


@dataclass(frozen=True)
class Report:
    """What `convert` did or `verify` found.

    Attributes:
        source: the source directory.
        destination: the destination directory.
        family: the source's.
        layout: the destination's; "mxfp4" on the way back.
        activations: "w4a16" or "w4a4".
        exact: every value of every cast tensor equals the source's, and nothing else was quantized.
        tensors: counts of MXFP4 tensors "cast", "exact", "inexact", and of tensors "copied".
        half_blocks: counts "verbatim", "shifted", "rounded".
        inexact: the tensors that are not exact.
        marlin_exact: vLLM's Marlin kernels keep every value too.
        bytes: "read" and "written".
        seconds: wall time.
        verified: the figures were measured on what was written.
        served: where the result is served, for people.
        serve: the command that does it, or that there is none.
        marlin_zeroed: half-blocks that vLLM's Marlin kernels zero; None where that was not measured.
        kv_cache_qformat: the format of the KV cache that the destination asks for.
        differences: what verification found wrong; empty when all is well.
        strict: a companion that differs counts as wrong, too.
        notes: what else people should know, in sentences.
        card: the path of its model card, of a conversion that has one.
        left_out: what of the source a conversion has not carried along, as `left_out` lists it.
        original: on the way back, whether every byte is proved to be the original's; None where nothing proves it.
        fp8: the other weights that were quantized to FP8.
    """

    source: str
    destination: str
    family: str
    layout: str
    activations: Activations
    exact: bool
    tensors: TensorCounts
    half_blocks: HalfBlockCounts
    inexact: Sequence[InexactTensor]
    marlin_exact: bool
    bytes: ByteCounts
    seconds: float
    verified: bool
    served: str
    serve: str = ""
    marlin_zeroed: int | None = None
    kv_cache_qformat: KvCache = "none"
    differences: Sequence[Difference] = field(default=())
    strict: bool = False
    notes: Sequence[str] = ()
    card: str | None = None
    left_out: Sequence[str] = ()
    original: bool | None = None
    fp8: Sequence[Fp8Tensor] = ()

    @classmethod
    def of(
        cls,
        source: Source,
        target: Target,
        selection: Selection,
        destination: str,
        *,
        half_blocks: HalfBlockCounts,
        inexact: Sequence[InexactTensor],
        marlin_exact: bool,
        marlin_zeroed: int | None = None,
        bytes: ByteCounts,  # noqa: A002
        unmeasured: int = 0,
        differences: Sequence[Difference] = (),
        strict: bool = False,
        seconds: float = 0.0,
        verified: bool = False,
        notes: Sequence[str] = (),
        fp8: Sequence[Fp8Tensor] = (),
    ) -> Report:
        """A report from what was selected and measured; the other arguments are those of the class.

        Args:
            source: the MXFP4 checkpoint.
            target: how the destination is stored.
            selection: what was cast, and what was not.
            destination: its name.
            half_blocks: measured.
            inexact: the tensors that are not exact.
            marlin_exact: measured.
            marlin_zeroed: measured, or None.
            bytes: measured.
            unmeasured: the number of tensors that could not be compared, which count as inexact.
            differences: what is wrong.
            strict: companions count, too.
            seconds: wall time.
            verified: measured on what was written.
            notes: what else people should know.
            fp8: measured.
        """
        cast, lost = len(selection.cast), len(inexact) + unmeasured
        others = selection.quantized or selection.fp8
        return cls(
            source=str(source.checkpoint.path),
            destination=destination,
            family=source.family.name,
            layout=target.layout.name,
            activations=target.activations,
            exact=not lost and not others and not any(each.area == "weights" for each in differences),
            tensors={"cast": cast, "exact": cast - lost, "inexact": lost, "copied": len(selection.untouched)},
            half_blocks=half_blocks,
            inexact=inexact,
            marlin_exact=marlin_exact and not lost,
            bytes=bytes,
            seconds=seconds,
            verified=verified,
            served=target.served,
            serve=target.serving_command(destination),
            marlin_zeroed=marlin_zeroed,
            kv_cache_qformat=target.kv_cache,
            differences=tuple(differences),
            strict=strict,
            notes=tuple(notes),
            fp8=tuple(fp8),
        )

    def as_way_back(self, source: str, destination: str) -> Report:
        """The same, of the way back from an NVFP4 checkpoint."""
        said = "what served the original"
        serve = f"fp4cast inspect {destination}"
        plain = replace(self, layout="mxfp4", activations="w4a16", served=said, serve=serve, kv_cache_qformat="none")
        return replace(plain, source=source, destination=destination, marlin_zeroed=None, marlin_exact=True)

    def wrong(self, area: Area) -> list[Difference]:
        """The differences of one area."""
        return [difference for difference in self.differences if difference.area == area]

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong; inexact tensors that were asked for are not wrong."""
        return passes(self.differences, strict=self.strict)

    def facts(self) -> dict[str, Any]:
        """The figures that do not depend on time, place or speed: a JSON object."""
        return {
            "family": self.family,
            "layout": self.layout,
            "activations": self.activations,
            "kv_cache_qformat": self.kv_cache_qformat,
            "exact": self.exact,
            "tensors": dict(self.tensors),
            "half_blocks": dict(self.half_blocks),
            "inexact": [tensor.to_json() for tensor in self.inexact],
            "marlin_exact": self.marlin_exact,
            **({"fp8": [tensor.to_json() for tensor in self.fp8]} if self.fp8 else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return {
            "source": self.source,
            "destination": self.destination,
            **self.facts(),
            "fp8": [tensor.to_json() for tensor in self.fp8],
            "bytes": dict(self.bytes),
            "seconds": round(self.seconds, 3),
            "verified": self.verified,
            "served": self.served,
            "serve": self.serve,
            "marlin_zeroed": self.marlin_zeroed,
            "card": self.card,
            "left_out": list(self.left_out),
            "original": self.original,
            "ok": self.ok,
            "notes": list(self.notes),
            "verdicts": verdicts(self.differences),
            "differences": differences_json(self.differences),
        }
