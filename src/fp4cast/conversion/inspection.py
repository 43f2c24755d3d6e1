"""Inspect a checkpoint: what it is, and what a conversion would do; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import Checkpoint, gc_paused, open_checkpoint
from fp4cast.checkpoints.gguf_file import is_gguf
from fp4cast.checkpoints.readable import ReadableFiles
from fp4cast.conversion.domains import Domain, find_domains
from fp4cast.conversion.gguf_plan import listed_types, make_plan
from fp4cast.errors import Fp4CastError
from fp4cast.families.family import Source
from fp4cast.families.mlx import MLX
from fp4cast.families.recognise import read_source
from fp4cast.hub.opened import CONNECTIONS, open_repository
from fp4cast.hub.ranges import RemoteFiles
from fp4cast.hub.repository import look_up
from fp4cast.hub.resolve import in_cache, resolve
from fp4cast.layouts import gguf as layout
from fp4cast.layouts.choose import targets_of
from fp4cast.layouts.documents import documents
from fp4cast.layouts.layout import Target, castable
from fp4cast.parallel.progress import AdvanceOf, ignore

_MLX_NOTE = (
    "--layout mlx makes MLX's own nvfp4 of it, which has no tensor scale; the layouts above are for other engines"
)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        source: the directory.
        family: the family's name.
        title: the family's name for people.
        domains: every scale domain that would be cast, with its tensor scale.
        cast: MXFP4 tensors that would be cast.
        copied: tensors that would be carried over byte for byte.
        bytes: of "source", its "codes", its "scales", its "other" tensors, and of the "destination"; of a model on the
            Hub also those that were "downloaded" to find all this.
        targets: the family's layouts, and the engines that serve each.
        refused: by target, why its configs cannot describe what the checkpoint holds besides; None where they can.
        notes: what else people should know, in sentences.
    """

    source: str
    family: str
    title: str
    domains: Sequence[Domain]
    cast: int
    copied: int
    bytes: dict[str, int]
    targets: Sequence[Target]
    refused: Sequence[str | None]
    notes: Sequence[str] = ()

    @property
    def exact(self) -> bool:
        """Whether every domain can be cast exactly."""
        return all(domain.exact for domain in self.domains)

    @property
    def marlin_exact(self) -> bool:
        """Whether every domain also fits the window of vLLM's Marlin kernels."""
        return all(domain.marlin_exact for domain in self.domains)

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return {
            "source": self.source,
            "family": self.family,
            "exact": self.exact,
            "marlin_exact": self.marlin_exact,
            "tensors": {"cast": self.cast, "copied": self.copied},
            "domains": [domain.to_json() for domain in self.domains],
            "bytes": self.bytes,
            "layouts": [
                {"layout": t.layout.name, "activations": t.activations, "served": t.served, "refused": why}
                for t, why in zip(self.targets, self.refused, strict=True)
            ],
            "notes": list(self.notes),
        }


def inspect(src: str | Path, *, jobs: int | None = None, progress: AdvanceOf = ignore) -> Inspection:
    """Say what a checkpoint is and what a conversion would do; nothing is written.

    Of a model on the Hub that its cache does not hold, headers and scales are read, and nothing else: by ranges.

    Args:
        src: a directory, a Hugging Face model id, or a GGUF file.
        jobs: threads; None for one a core, or for 16 requests at a time.
        progress: called, from worker threads, with (scale bytes just read, total scale bytes).

    Returns:
        Family, scale domains with their spreads and windows, sizes.

    Raises:
        CheckpointError: the source is malformed, or holds nothing to cast.
    """
    if is_gguf(src):
        return _inspect_gguf(src, jobs=jobs, progress=progress)
    repository = look_up(src)
    if repository is None or not repository.missing():
        return _inspect(open_checkpoint(in_cache(str(repository or src)) or resolve(src)), jobs, progress)
    with RemoteFiles(repository) as files:
        checkpoint = open_repository(files, Path(str(repository)))
        found = _inspect(checkpoint, jobs or CONNECTIONS, progress, files)
        return replace(found, bytes=found.bytes | {"downloaded": files.downloaded})


@gc_paused()
def _inspect(
    checkpoint: Checkpoint, jobs: int | None, progress: AdvanceOf, files: ReadableFiles | None = None
) -> Inspection:
    source = read_source(checkpoint)
    targets = targets_of(source.family)
    selection = castable(source, targets[0])
    cast = selection.cast
    domains = find_domains(cast, inexact="report", jobs=jobs, progress=progress, files=files)
    codes, scales = sum(pair.codes.nbytes for pair in cast), sum(pair.scales.nbytes for pair in cast)
    total = checkpoint.total_size
    return Inspection(
        source=str(checkpoint.path),
        family=source.family.name,
        title=source.family.title,
        domains=domains,
        cast=len(cast),
        copied=len(selection.untouched),
        bytes={
            "source": total,
            "codes": codes,
            "scales": scales,
            "other": total - codes - scales,
            "destination": total + scales + 4 * len(cast),
        },
        targets=targets,
        refused=[_refusal(source, target) for target in targets],
        notes=[_MLX_NOTE] if source.family.name == MLX.name else [],
    )


def _inspect_gguf(src: str | Path, *, jobs: int | None, progress: AdvanceOf) -> Inspection:
    plan = make_plan(Path(src), jobs=jobs, progress=progress)
    blocks = sum(recast.tensor.nbytes for recast in plan.recasts.values()) // layout.MXFP4_BYTES
    size = plan.header.size
    return Inspection(
        source=str(src),
        family="gguf",
        title=f"GGUF, {plan.architecture or 'a later file of a split model'}",
        domains=plan.domains,
        cast=len(plan.recasts),
        copied=plan.copied,
        bytes={
            "source": size,
            "codes": 16 * blocks,
            "scales": blocks,
            "other": size - layout.MXFP4_BYTES * blocks,
            "destination": plan.size,
        },
        targets=(),
        refused=(),
        notes=[
            f"its tensors by type: {listed_types(plan.header)}",
            *plan.notes(),
            *([] if all(each.exact for each in plan.domains) else [plan.why_unscaled()]),
        ],
    )


def _refusal(source: Source, target: Target) -> str | None:
    """Why `convert` would refuse a target, if it would: other formats beside MXFP4 that the layout has no word for."""
    selection = castable(source, target)
    try:
        documents(source.checkpoint, target, selection.modules, selection.replaced, bank=source.family.bank)
    except Fp4CastError as error:
        return str(error)
    return None
