"""Say what a command would write, and write nothing: its `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.card_files import CARD, PICTURE
from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.checkpoints.gguf_file import names_gguf
from fp4cast.checkpoints.left_out import left_out
from fp4cast.conversion.complete import looks_complete
from fp4cast.conversion.convert import prepare
from fp4cast.conversion.destination import check_destination
from fp4cast.conversion.gguf import preview_gguf
from fp4cast.conversion.job_array import parse_part
from fp4cast.conversion.mlx import prepare_mlx
from fp4cast.conversion.plan import ConvertOptions, Plan
from fp4cast.conversion.staging import ONCE, other_conversion, require_space
from fp4cast.conversion.working_directory import finished_shards, plan_of, state_of
from fp4cast.errors import DestinationError
from fp4cast.hub.resolve import resolve
from fp4cast.layouts.layout import Selection
from fp4cast.layouts.mlx import MLX
from fp4cast.parallel.progress import Progress, ignore


@dataclass(frozen=True)
class Preview:
    """What a command would write.

    Attributes:
        destination: the directory or file.
        files: their sizes in bytes by name; None where only the work itself would tell.
        facts: what else is known, a JSON object; "exact" and "tensors" of a conversion.
        left_out: see `Report`.
        notes: what else people should know, in sentences.
    """

    destination: str
    files: Mapping[str, int | None]
    facts: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all files whose sizes are known."""
        return sum(size or 0 for size in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return {
            "dry_run": True,
            "destination": self.destination,
            **self.facts,
            "files": dict(self.files),
            "bytes": self.bytes,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def preview_conversion(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions,
    *,
    shards: str | None = None,
    finish: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress = ignore,
) -> Preview:
    """What `convert` would write; arguments as for `convert`, `shards` as "i/n".

    Raises:
        Fp4CastError: what `convert` would raise before it writes.
    """
    if names_gguf(src, dst):
        return _preview_gguf(src, dst, options, jobs=jobs, progress=progress)
    if options.layout == MLX:
        return _preview_mlx(src, dst, options, overwrite=overwrite, jobs=jobs, progress=progress)
    part, parts = parse_part(shards) if shards is not None else (1, 1)
    destination, plan = prepare(resolve(src, download=False), dst, options, jobs=jobs, progress=progress)
    exact = [domain.exact for domain in plan.domains]
    facts = {
        "source": str(plan.source.checkpoint.path),
        "family": plan.source.family.name,
        "layout": "mxfp4" if plan.back else plan.target.layout.name,
        "activations": plan.target.activations,
        "exact": all(exact) and not plan.selection.fp8,
        "tensors": _counts(plan.selection),
        "scale_domains": {"exact": sum(exact), "all": len(exact)},
    }
    missing = left_out(plan.source.checkpoint)
    if not overwrite and looks_complete(plan, destination):
        return Preview(str(dst), {}, facts, missing, ["it looks complete already; it would be compared, not written"])
    check_destination(plan.source.checkpoint.path, destination, overwrite=overwrite)
    kept = () if restart else _kept(plan, destination, finish=finish)
    wanted = {shard.file: shard.layout.size for shard in plan.shards[part - 1 :: parts] if shard.file not in kept}
    files: dict[str, int | None] = {**wanted, **({} if shards else _others(plan))}
    there = next(path for path in destination.parents if path.exists())
    require_space(destination, there, sum(size or 0 for size in files.values()))
    notes = [f"shards that an earlier run has finished, and that would be kept: {len(kept)}"] if kept else []
    return Preview(str(dst), files, facts, missing, [*plan.notes, *notes])


def _counts(selection: Selection) -> dict[str, int]:
    fp8 = {"fp8": len(selection.fp8)} if selection.fp8 else {}
    return {"cast": len(selection.cast), **fp8, "copied": len(selection.untouched)}


def _kept(plan: Plan, destination: Path, *, finish: bool) -> set[str]:
    """The finished shards that a conversion would go on with.

    Raises:
        DestinationError: they are another conversion's, or `finish` lacks some.
    """
    state = state_of(destination)
    found, before = set(finished_shards(state)), plan_of(state)
    if found and before != plan.fingerprint and not before.startswith(ONCE):
        raise other_conversion(state)
    missing = [shard.file for shard in plan.shards if shard.file not in found]
    if finish and missing:
        raise DestinationError(
            f"{state}: {len(missing)} of {len(plan.shards)} shards are not finished, the first is {missing[0]}; run "
            "their parts (--shards i/n), then --finish"
        )
    return found if before == plan.fingerprint else set()


def _others(plan: Plan) -> dict[str, int | None]:
    """Everything beside the shards; what is measured while writing is not known yet."""
    sizes: dict[str, int | None] = {name: len(data) for name, data in plan.documents.items()}
    sizes |= {str(plan.place(name)): size for name, size in plan.companions.items()}
    return sizes | {RECEIPT: None} | ({CARD: None, PICTURE: None} if plan.card else {})


def _preview_gguf(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, jobs: int | None, progress: Progress
) -> Preview:
    plan, size = preview_gguf(src, dst, options, jobs=jobs, progress=progress)
    facts = {
        "source": str(plan.header.path),
        "family": "gguf",
        "layout": "gguf",
        "activations": "w4a16",
        "exact": True,
        "tensors": {"cast": len(plan.recasts), "copied": plan.copied},
        "scale_domains": {"exact": len(plan.domains), "all": len(plan.domains)},
    }
    return Preview(str(dst), {Path(dst).name: size}, facts, (), plan.notes())


def _preview_mlx(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, overwrite: bool, jobs: int | None, progress: Progress
) -> Preview:
    destination, plan = prepare_mlx(resolve(src, download=False), dst, options, jobs=jobs, progress=progress)
    source = plan.checkpoint.path
    check_destination(source, destination, overwrite=overwrite)
    there = next(path for path in destination.parents if path.exists())
    require_space(destination, there, sum(plan.sizes.values()))
    facts = {
        "source": str(source),
        "family": MLX,
        "layout": MLX,
        "activations": "w4a16",
        "exact": True,
        "tensors": {"cast": len(plan.domains), "copied": plan.copied},
        "scale_domains": {"exact": len(plan.domains), "all": len(plan.domains)},
    }
    return Preview(str(dst), {**plan.sizes, RECEIPT: None}, facts, left_out(plan.checkpoint))
