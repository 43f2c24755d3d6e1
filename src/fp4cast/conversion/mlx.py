"""Convert MLX's mxfp4 into its nvfp4: the same tensors under the same names, and no tensor scale."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from fp4cast.casting.tight_rule import choose_unscaled
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.checksums import Checksum
from fp4cast.checkpoints.directory import (
    CONFIG,
    RECEIPT,
    Checkpoint,
    Stamps,
    check_stamps,
    open_checkpoint,
    stamp,
)
from fp4cast.checkpoints.json_files import json_bytes
from fp4cast.checkpoints.origin import origin_of
from fp4cast.conversion.destination import check_place, companions_to_carry, real_path
from fp4cast.conversion.domains import Domain, FileBlocks
from fp4cast.conversion.execute import execute, tallies_of
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.conversion.recipe import BlockScalesOf, CodesOf, CopyOf, Output, OutputShard, index, place
from fp4cast.conversion.refusals import first_of, only_scaled, refuse_options, unlike
from fp4cast.conversion.staging import ONCE, Staging, staging
from fp4cast.errors import InexactError, UnsupportedError
from fp4cast.families.family import Pair
from fp4cast.families.mlx import mxfp4_modules
from fp4cast.hub.resolve import resolve
from fp4cast.layouts import mlx as layout
from fp4cast.parallel.engines import Local
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.parallel.workers import workers
from fp4cast.verification.mlx import mlx_report, verify_mlx
from fp4cast.verification.receipt import Receipt
from fp4cast.verification.report import Report


@dataclass(frozen=True)
class MlxPlan:
    """What an MLX checkpoint will become.

    Attributes:
        checkpoint: the source.
        stamps: of its shards.
        domains: each mxfp4 tensor, with its scaling.
        shards: the files to write.
        documents: config.json and the index.
        companions: the files to carry along, with their sizes.
    """

    checkpoint: Checkpoint
    stamps: Stamps
    domains: tuple[Domain, ...]
    shards: tuple[OutputShard, ...]
    documents: Mapping[str, bytes]
    companions: Mapping[PurePosixPath, int]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all files but the receipt."""
        found = {shard.file: shard.layout.size for shard in self.shards}
        found |= {name: len(data) for name, data in self.documents.items()}
        return found | {str(name): size for name, size in self.companions.items()}

    @property
    def copied(self) -> int:
        """The number of tensors that are not cast."""
        return len(self.checkpoint.tensors) - 2 * len(self.domains)


def convert_mlx(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    sync: bool = True,
    progress: Progress = ignore,
    **others: bool,
) -> Report:
    """Convert MLX's mxfp4 into its nvfp4; arguments and errors as for `convert`.

    Args:
        src: a directory or a model id.
        dst: the directory to make.
        options: of the conversion; those that MLX has no place for are refused.
        jobs: threads.
        overwrite: replace an existing `dst`.
        verify: compare every value first.
        sync: wait for the disk.
        progress: see `convert`.
        others: options of `convert` by name, whether they were given; none of them is for MLX.
    """
    begin = time.monotonic()
    destination, plan = prepare_mlx(src, dst, options, jobs=jobs, progress=progress, **others)
    source, total = plan.checkpoint.path, sum(shard.layout.size for shard in plan.shards)
    with staging(source, destination, overwrite=overwrite, keep=False, sync=sync) as stage:
        stage.adopt(ONCE + layout.MLX)
        stage.check_space(plan.sizes)
        finished = execute(
            plan.shards,
            stage.out,
            fingerprint=ONCE + layout.MLX,
            state=stage.state,
            engine=Local(jobs),
            sync=sync,
            progress=lambda n: progress("write", n, total),
        )
        check_stamps(plan.checkpoint, plan.stamps, "convert")
        shifted = sum(tally.shifted for tally in tallies_of(finished.values()).values())
        report = _report(plan, str(dst), shifted, total)
        _write_rest(plan, stage, report, {name: shard.checksum for name, shard in finished.items()}, options)
        if verify:
            report = _verified(plan, stage, report, jobs, progress)
        stage.publish(source, overwrite=overwrite)
    return replace(report, seconds=time.monotonic() - begin)


def prepare_mlx(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, jobs: int | None, progress: Progress, **others: bool
) -> tuple[Path, MlxPlan]:
    """(DST without links, the plan): everything that is decided before a byte is written.

    Raises:
        UsageError: options that MLX has no place for.
        UnsupportedError: SRC holds no MLX mxfp4.
        InexactError: it names the tensors and the blocks.
    """
    refuse_options(only_scaled(options) | others, "MLX, which is cast in one go, exactly or not at all")
    source, destination = resolve(src), real_path(dst)
    check_place(source, destination)
    return destination, make_mlx_plan(source, jobs=jobs, progress=progress)


def make_mlx_plan(path: Path, *, jobs: int | None = None, progress: Progress = ignore) -> MlxPlan:
    """Decide everything; raises as `prepare_mlx`."""
    checkpoint = open_checkpoint(path)
    pairs = [_pair(checkpoint, module) for module in mxfp4_modules(checkpoint.tensors)]
    if not pairs:
        raise UnsupportedError(
            f"{path}: holds no MLX mxfp4 (codes U32, scales U8), which --layout mlx casts; leave the option out for a "
            "checkpoint of the Hub, or let mlx_lm.convert make it"
        )
    total = sum(pair.scales.nbytes for pair in pairs)
    with Files() as files, workers(jobs, lambda n: progress("scan", n, total)) as pool:

        def scan(pair: Pair) -> Domain:
            scaling, search = choose_unscaled([FileBlocks(pair, files, pool.check)])
            pool.advance(pair.scales.nbytes)
            return Domain(pair.module, (pair,), scaling, search)

        domains = tuple(pool.map(scan, pairs))
    _require_exact(path, domains)
    new = {name: [output] for domain in domains for name, output in _outputs(domain).items()}
    shards = tuple(place(checkpoint, new))
    config = {CONFIG: json_bytes(layout.nvfp4_config(checkpoint.config))}
    companions = companions_to_carry(checkpoint)
    return MlxPlan(checkpoint, stamp(checkpoint), domains, shards, index(shards) | config, companions)


def _pair(checkpoint: Checkpoint, module: str) -> Pair:
    if (mode := layout.mode_of(checkpoint.config, module)) != "mxfp4":
        raise UnsupportedError(
            f"{checkpoint.path / CONFIG}: quantization says {mode[:50]!r} of {module[:200]}, whose tensors are those "
            "of mxfp4; expected mode mxfp4"
        )
    codes, scales = checkpoint.tensors[module + layout.CODES], checkpoint.tensors[module + layout.SCALES]
    return Pair(module, codes, scales)


def _require_exact(path: Path, domains: tuple[Domain, ...]) -> None:
    if not (lost := [domain for domain in domains if not domain.exact]):
        return
    raise InexactError(
        f"{path}: {len(lost)} of {len(domains)} tensors have no exact form as MLX's nvfp4, which has no tensor scale: "
        f"S is 1. Keep the mxfp4 checkpoint:\n{first_of([*map(_reason, lost)])}"
    )


def _reason(domain: Domain) -> str:
    search, scaling = domain.search, domain.scaling
    low, high = (search.lo_block[1], search.hi_block[1]) if search else (0, 0)
    if search and search.hi < 0:
        return f"{domain.name}: block {high} needs S of 2^{search.hi} or less; exponents begin at {scaling.k_min}"
    return f"{domain.name}: block {low} needs S of 2^{scaling.lo} or more; exponents end at {scaling.k_max}"


def _outputs(domain: Domain) -> dict[str, Output]:
    (pair,), scaling = domain.pairs, domain.scaling
    codes, scales = pair.codes, pair.scales
    step = CopyOf.tensor(codes) if scaling.verbatim else CodesOf(pair, scaling, False, True)
    shape = (*scales.shape[:-1], 2 * scales.shape[-1])
    return {
        codes.name: Output(codes.name, codes.dtype, codes.shape, step),
        scales.name: Output(scales.name, scales.dtype, shape, BlockScalesOf(pair, scaling, False)),
    }


def _write_rest(
    plan: MlxPlan, stage: Staging, report: Report, shards: Mapping[str, Checksum], options: ConvertOptions
) -> None:
    files = stage.write_documents(plan.documents, plan.companions, plan.checkpoint) | dict(shards)
    origin = origin_of(plan.checkpoint.path, options.source_id)
    receipt = Receipt.of(report, digests={}, input_scales=None, kv_scales=None, files=files, source=origin)
    stage.write_receipt(RECEIPT, receipt.to_bytes())


def _report(plan: MlxPlan, destination: str, shifted: int, written: int) -> Report:
    halves = sum(2 * pair.blocks for domain in plan.domains for pair in domain.pairs)
    return mlx_report(
        str(plan.checkpoint.path),
        destination,
        cast=len(plan.domains),
        copied=plan.copied,
        half_blocks={"verbatim": halves - shifted, "shifted": shifted, "rounded": 0},
        bytes={"read": plan.checkpoint.total_size, "written": written},
    )


def _verified(plan: MlxPlan, stage: Staging, report: Report, jobs: int | None, progress: Progress) -> Report:
    look = partial(verify_mlx, plan.checkpoint.path, stage.out, config=stage.config, jobs=jobs, strict=True)
    found = look(progress=lambda n, total: progress("verify", n, total))
    if not found.ok:
        raise unlike(report.destination, report.source, found.differences)
    return replace(found, destination=report.destination, serve=report.serve, bytes=report.bytes)
