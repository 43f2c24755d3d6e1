"""A Plan is data: for every output tensor, what it is made of. `execute` follows it without another decision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fp4cast.cards.subject import source_date
from fp4cast.casting.inexact import check_inexact
from fp4cast.checkpoints.card_files import beside_card
from fp4cast.checkpoints.directory import (
    CONFIG,
    QUANT_CONFIG,
    Checkpoint,
    Stamps,
    check_stamps,
    gc_paused,
    open_checkpoint,
    stamp,
)
from fp4cast.checkpoints.json_files import json_bytes
from fp4cast.checkpoints.origin import UNKNOWN, Origin, origin_of
from fp4cast.checkpoints.readable import ReadableFiles
from fp4cast.conversion.destination import companions_to_carry
from fp4cast.conversion.direction import WayBack
from fp4cast.conversion.domains import Domain, find_domains
from fp4cast.conversion.fp8_attention import fp8_outputs, quantize_attention
from fp4cast.conversion.input_scales import InputScales, InputScalesLike, load_input_scales
from fp4cast.conversion.recipe import (
    BlockScalesOf,
    CodesOf,
    Constant,
    CopyOf,
    Output,
    OutputShard,
    index,
    kv_constants,
    nvfp4,
    place,
)
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.families.family import Pair, Source
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import DEFAULT_LAYOUT, choose_target
from fp4cast.layouts.documents import documents
from fp4cast.layouts.engine_view import read_claims
from fp4cast.layouts.layout import Selection, Target, castable
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.verification.configs import config_faults


@dataclass(frozen=True)
class ConvertOptions:
    """The options that decide the bytes of a conversion; all parts of a job array share them.

    Attributes:
        layout: "modelopt" or "compressed-tensors".
        activations: "w4a16" or "w4a4"; None for w4a16 where the family can be served so.
        input_scales: for w4a4: a number (the input_scale of every projection), or a mapping or file (JSON,
            safetensors) of projection name -> amax of its input.
        inexact: "fail" stops before a byte is written when a domain is not exact; "nearest" rounds there.
        kv_cache_qformat: "none", or "fp8_cast" for a KV cache in FP8 with scales of 1.
        card: write a model card; the source's then lies beside it. It and the next decide no weight and no config: only
            the process that publishes asks for them.
        source_id: the source's id on the Hub, ORG/NAME or ORG/NAME@REVISION, where its path does not say it.
        to: "nvfp4", or "mxfp4" for the way back, which asks for nothing else.
        fp8: "none", or "attention" for attention in FP8 beside the cast weights; that is not exact.
    """

    layout: str = DEFAULT_LAYOUT
    activations: str | None = None
    input_scales: InputScalesLike | None = None
    inexact: str = "fail"
    kv_cache_qformat: str = "none"
    card: bool = True
    source_id: str | None = None
    to: str = "nvfp4"
    fp8: str = "none"


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do.

    Attributes:
        source: the checkpoint and its MXFP4 pairs.
        target: the layout.
        selection: which of the source's tensors it casts.
        domains: the scale domains that are cast, with their tensor scales.
        shards: the files to write.
        documents: the other files to write, as bytes by name; config.json among them.
        companions: the files to carry along, relative to the source, and their sizes.
        stamps: the source's, when the plan was made.
        origin: the source's id and revision, as far as they are known.
        card: whether to write a model card.
        day: the date for the card, if somebody says it.
        back: it goes from NVFP4 to MXFP4.
        notes: what people should know beforehand, in sentences.
    """

    source: Source
    target: Target
    selection: Selection
    domains: tuple[Domain, ...]
    shards: tuple[OutputShard, ...]
    documents: Mapping[str, bytes]
    companions: Mapping[PurePosixPath, int]
    stamps: Stamps
    origin: Origin = UNKNOWN
    card: bool = True
    day: date | None = None
    back: WayBack | None = None
    notes: tuple[str, ...] = ()

    def place(self, companion: PurePosixPath) -> PurePosixPath:
        """The name of one of the source's companions in the destination."""
        if self.back is not None:
            return self.back.renamed.get(companion, companion)
        return beside_card(companion) if self.card else companion

    @property
    def compare_bytes(self) -> int:
        """Bytes of all tensors of both sides."""
        headers = sum(len(shard.layout.header) for shard in self.shards)
        return self.source.checkpoint.total_size + self.write_bytes - headers

    @property
    def write_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.layout.size for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every large file to write by its name: shards and companions."""
        companions = {str(name): size for name, size in self.companions.items()}
        return companions | {shard.file: shard.layout.size for shard in self.shards}

    def read_by(self, files: Collection[str]) -> int:
        """Bytes of the source's counterparts of some shards."""
        return sum(shard.size for file, shard in self.source.checkpoint.shards.items() if file in files)

    @cached_property
    def fingerprint(self) -> str:
        """A digest: equal for two plans if and only if they read and write the same bytes; cards do not count."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.stamps}\n".encode())
        for output in self.shards:
            digest.update(output.file.encode() + output.layout.header)
            constants = (tensor.step for tensor in output.outputs)
            digest.update(b"".join([step.data for step in constants if isinstance(step, Constant)]))
        text = lru_cache(str)  # half a million domains have a few scalings
        for domain in self.domains:
            digest.update(f"{domain.name} {text(domain.scaling)}\n".encode())
        if self.back is not None:
            digest.update(json.dumps(self.back.original.to_json()).encode())
        for name, data in sorted(self.documents.items()):
            digest.update(name.encode() + data)
        return digest.hexdigest()


def check_unchanged(plan: Plan) -> None:
    """Raise if the source changed after planning.

    Raises:
        CheckpointError: it did.
    """
    check_stamps(plan.source.checkpoint, plan.stamps, "convert")


def make_plan(
    path: Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    jobs: int | None = None,
    progress: AdvanceOf = ignore,
) -> Plan:
    """Like `plan_conversion`, of a directory."""
    checkpoint = open_checkpoint(path)
    return plan_conversion(checkpoint, stamp(checkpoint), options, jobs=jobs, progress=progress)


@gc_paused()
def plan_conversion(
    checkpoint: Checkpoint,
    stamps: Stamps,
    options: ConvertOptions,
    *,
    jobs: int | None = None,
    progress: AdvanceOf = ignore,
    reader: ReadableFiles | None = None,
) -> Plan:
    """Read a checkpoint's scales and decide everything; nothing is written.

    Args:
        checkpoint: the opened source.
        stamps: what tells its shards from others.
        options: see `ConvertOptions`.
        jobs: threads; None for one a core.
        progress: called with (scale bytes just read, total scale bytes).
        reader: reads the scales; None where the shards lie on this machine.

    Raises:
        CheckpointError: the source is malformed, or holds nothing to cast.
        UsageError: the options do not fit the source's family.
        InexactError: a domain is not exact and `inexact` is "fail".
        InputScaleError: w4a4 without usable scales.
    """
    check_inexact(options.inexact)
    path, source = checkpoint.path, read_source(checkpoint)
    origin, day = origin_of(path, options.source_id), source_date()
    target = choose_target(source.family, options.layout, options.activations, path, options.kv_cache_qformat)
    if target.kv_cache == "fp8":
        raise UsageError(
            "--kv_cache_qformat fp8 needs scales that only running the model can find: use fp4cast ptq, or fp8_cast, "
            "whose scales are 1"
        )
    target, selection, notes = quantize_attention(source, target, castable(source, target), options.fp8)
    amax = _activation_scales(target, options.input_scales, selection.modules)
    found = find_domains(selection.cast, inexact=options.inexact, jobs=jobs, progress=progress, files=reader)
    domains = tuple(_storable(domain, target) for domain in found)
    new = fp8_outputs(selection) | _new(domains, target, amax)
    shards = tuple(place(source.checkpoint, new, kv_constants(source.checkpoint, target)))
    del new  # before the index, which takes as much, is made
    table = index(shards)
    files = documents(
        source.checkpoint, target, selection.modules, selection.replaced, bank=source.family.bank, fp8=selection.fp8
    )
    _check_configs(path, files, source, target, selection)
    return Plan(
        source=source,
        target=target,
        selection=selection,
        domains=domains,
        shards=shards,
        documents=table | {name: json_bytes(document) for name, document in files.items()},
        companions=companions_to_carry(source.checkpoint),
        stamps=stamps,
        origin=origin,
        card=options.card,
        day=day,
        notes=notes,
    )


def _check_configs(
    path: Path, files: Mapping[str, Mapping[str, Any]], source: Source, target: Target, selection: Selection
) -> None:
    """Refuse now what verification would refuse once everything is written: much of a config is the source's."""
    claims = read_claims(files[CONFIG], path / CONFIG)
    for file, detail in config_faults(files[CONFIG], files.get(QUANT_CONFIG), claims, source, target, selection):
        whose = path / file if file == CONFIG else f"{path / CONFIG}: the {file} made from it"
        raise CheckpointError(f"{whose}: cannot be converted as {target.layout.name} {target.activations}: {detail}")


def _activation_scales(target: Target, value: InputScalesLike | None, modules: Sequence[str]) -> InputScales | None:
    if target.activations == "w4a16":
        if value is not None:
            raise UsageError("--input-scales belongs to --activations w4a4; w4a16 has no activation scales")
        return None
    amax = load_input_scales(value)
    amax.require(modules)
    return amax


def _storable(domain: Domain, target: Target) -> Domain:
    """The domain under the tensor scale that a reader will see: a layout that stores 1/S rounds it to FP32."""
    scaling = domain.scaling
    if not target.form.reciprocal or scaling.m is not None:
        return domain
    seen = 1.0 / float(np.float32(1.0 / scaling.tensor_scale))
    return replace(domain, scaling=replace(scaling, tensor_scale=seen))


def _new(domains: Iterable[Domain], target: Target, amax: InputScales | None) -> dict[str, list[Output]]:
    """All new tensors, by the name of the source tensor that they replace."""
    new: dict[str, list[Output]] = {}
    for domain in domains:
        for pair in domain.pairs:
            new |= _outputs(pair, domain, target, amax)
    return new


def _outputs(pair: Pair, domain: Domain, target: Target, amax: InputScales | None) -> dict[str, list[Output]]:
    """A pair's new tensors, by the name of the source tensor that they replace."""
    form, scaling = target.form, domain.scaling
    stays = scaling.verbatim and not form.transposed
    codes = CopyOf.tensor(pair.codes) if stays else CodesOf(pair, scaling, form.transposed, not scaling.verbatim)
    scales = BlockScalesOf(pair, scaling, form.transposed)
    input_scale = None if amax is None else float(amax.scale([member.module for member in domain.pairs]))
    home, block_scales = nvfp4(form, pair.module, pair.shape, codes, scales, scaling.tensor_scale, input_scale)
    return {pair.codes.name: home, pair.scales.name: [block_scales]}
