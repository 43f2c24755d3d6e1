"""What a GGUF file will hold as NVFP4: which tensors are cast, under which tensor scales, and where each will lie."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.casting.tight_rule import BlockSource, Scaling, Search, choose, choose_unscaled
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.gguf_file import GgufHeader, GgufTensor, read_header, type_name
from fp4cast.conversion.domains import Domain
from fp4cast.conversion.gguf_blocks import GgufBlocks, blocks_of
from fp4cast.conversion.refusals import first_of
from fp4cast.errors import InexactError, UnsupportedError
from fp4cast.formats import Bytes
from fp4cast.layouts import gguf as layout
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.workers import workers


@dataclass(frozen=True, slots=True)
class GgufDomain(Domain):
    """The weights of a GGUF file that share a tensor scale: a tensor, or an expert of a bank.

    Attributes:
        tensor: its name.
    """

    tensor: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return super(GgufDomain, self).to_json() | {"tensors": [self.tensor]}


@dataclass(frozen=True)
class Recast:
    """One tensor to be cast.

    Attributes:
        tensor: where it lies in the source.
        domains: one, or one for each expert.
        scale: the name of the tensor that will hold the tensor scales; None where they are 1.
    """

    tensor: GgufTensor
    domains: tuple[GgufDomain, ...]
    scale: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every value can be written."""
        return all(domain.exact for domain in self.domains)

    def blocks(self, file: File) -> list[GgufBlocks]:
        """The blocks of each domain."""
        return blocks_of(self.tensor, file, len(self.domains))


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file and what will be made of it.

    Attributes:
        header: the source's.
        recasts: by name, the tensors to be cast.
        left: the MXFP4 tensors that stay so.
        stamp: what tells whether the source has changed.
    """

    header: GgufHeader
    recasts: dict[str, Recast]
    left: tuple[GgufTensor, ...]
    stamp: tuple[int, int]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model; empty in the later files of a split one."""
        return str(self.header.value("general.architecture", ""))

    @property
    def copied(self) -> int:
        """The number of tensors that are not cast."""
        return len(self.header.tensors) - len(self.recasts)

    @property
    def domains(self) -> list[GgufDomain]:
        """All scale domains."""
        return [domain for recast in self.recasts.values() for domain in recast.domains]

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        outputs = self.outputs()
        return len(self.head(outputs)) + sum(self.header.pad(tensor.nbytes) for tensor, _ in outputs)

    def outputs(self) -> list[tuple[GgufTensor, Recast | GgufTensor | Bytes]]:
        """The tensors of the new file, each with what it is made of; `start` is relative to the first of them."""
        found: list[tuple[GgufTensor, Recast | GgufTensor | Bytes]] = []
        for tensor in self.header.tensors:
            if (recast := self.recasts.get(tensor.name)) is None:
                found.append((tensor, tensor))
                continue
            nbytes = tensor.nbytes // (2 * layout.MXFP4_BYTES) * layout.NVFP4_BYTES
            found.append((replace(tensor, type=layout.NVFP4, nbytes=nbytes), recast))
            if recast.scale:
                data = np.array([domain.scaling.tensor_scale for domain in recast.domains], "<f4").view(np.uint8)
                shape = (len(recast.domains),)
                found.append((GgufTensor(recast.scale, shape, layout.F32, 0, data.nbytes), data))
        at, placed = 0, []
        for tensor, made_of in found:
            placed.append((replace(tensor, start=at), made_of))
            at += self.header.pad(tensor.nbytes)
        return placed

    def head(self, outputs: Sequence[tuple[GgufTensor, Any]]) -> bytes:
        """Everything before the tensors: the source's metadata byte for byte, but for the type of the file."""
        metadata = bytearray(self.header.metadata)
        kind = self.header.values.get("general.file_type")
        if kind is not None and kind.type == 4 and kind.content in layout.FILE_TYPES and not self.left:
            struct.pack_into("<I", metadata, kind.start, layout.FILE_TYPES[kind.content])
        begin = struct.pack("<4sIQQ", b"GGUF", self.header.version, len(outputs), len(self.header.values))
        head = begin + bytes(metadata) + b"".join(_info(tensor) for tensor, _ in outputs)
        return head.ljust(self.header.pad(len(head)), b"\0")

    def require_exact(self) -> None:
        """Raise unless every value can be written.

        Raises:
            InexactError: it names the tensors and the blocks.
        """
        lost = [recast for recast in self.recasts.values() if not recast.exact]
        if not lost:
            return
        raise InexactError(
            f"{self.header.path}: {len(lost)} of {len(self.recasts)} MXFP4 tensors have no exact form as GGUF's NVFP4. "
            f"{self.why_unscaled()} Keep the MXFP4 file, or convert the safetensors checkpoint, whose layouts have a "
            f"tensor scale:\n{first_of([*map(_reason, lost)])}"
        )

    def why_unscaled(self) -> str:
        """Where tensor scales can stand, in a sentence."""
        if _is_split(self.header):
            return (
                "Its blocks hold no tensor scale, and a tensor for it would have to be counted in all files of a split."
            )
        if self.architecture in layout.PASSES_EXPERT_SCALES | layout.PASSES_DENSE_SCALES:
            return (
                f"{layout.LLAMA_CPP} applies tensor scales to some of {self.architecture}'s tensors; elsewhere S is 1."
            )
        return (
            f"Its blocks hold no tensor scale, and {layout.LLAMA_CPP} applies none for {self.architecture!r}: S is 1."
        )

    def notes(self) -> list[str]:
        """What people should know, in sentences."""
        scaled = sum(recast.scale is not None for recast in self.recasts.values())
        found = []
        if scaled:
            found.append(f"{scaled} tensors have tensor scales beside them, which {layout.LLAMA_CPP} and newer read")
        if self.left:
            found.append(
                f"{len(self.left)} MXFP4 tensors stay so: their rows are no multiple of {layout.NVFP4_ELEMENTS} "
                f"weights, the first is {self.left[0].name}"
            )
        return found


def _info(tensor: GgufTensor) -> bytes:
    name = tensor.name.encode()
    dimensions = len(tensor.shape)
    return struct.pack(
        f"<Q{len(name)}sI{dimensions}QIQ", len(name), name, dimensions, *tensor.shape, tensor.type, tensor.start
    )


def _reason(recast: Recast) -> str:
    domain = next(domain for domain in recast.domains if not domain.exact)
    scaling, search = domain.scaling, domain.search or Search()
    (_, low), (_, high) = search.lo_block, search.hi_block
    if len(recast.domains) > 1 or recast.scale:
        return f"{domain.name}: blocks {low} and {high} need S of 2^{scaling.lo} or more, and of 2^{scaling.hi} or less"
    if search.hi < 0:
        return f"{domain.name}: block {high} needs S of 2^{search.hi} or less; its exponents begin at {scaling.k_min}"
    return f"{domain.name}: block {low} needs S of 2^{search.lo} or more; its exponents end at {scaling.k_max}"


def make_plan(path: Path, *, jobs: int | None = None, progress: AdvanceOf = ignore) -> GgufPlan:
    """Decide what becomes of a GGUF file, by its exponents, and by codes where they decide.

    Args:
        path: the file.
        jobs: threads.
        progress: called with (bytes just read, bytes in all).

    Raises:
        HeaderError: see `read_header`.
        ScaleError: a scale byte of 255.
        UnsupportedError: it holds nothing to cast.
    """
    header, stamp = read_header(path), stamp_of(path)
    found = [tensor for tensor in header.tensors if tensor.type == layout.MXFP4]
    cast = [tensor for tensor in found if tensor.shape[0] % layout.NVFP4_ELEMENTS == 0]
    if not cast:
        what = f"rows of no multiple of {layout.NVFP4_ELEMENTS} weights" if found else "no MXFP4 tensor"
        raise UnsupportedError(f"{path}: holds {what}, so there is nothing to cast: {listed_types(header)}")
    total = sum(tensor.nbytes for tensor in cast)
    with File(path) as file, workers(jobs, lambda n: progress(n, total)) as pool:
        work = partial(_recast, header, file)
        recasts = {}
        for recast in pool.map(work, cast):
            recasts[recast.tensor.name] = recast
            pool.advance(recast.tensor.nbytes)
    return GgufPlan(header, recasts, tuple(tensor for tensor in found if tensor not in cast), stamp)


def listed_types(header: GgufHeader) -> str:
    """How many tensors there are of each type, for people."""
    kinds = Counter(type_name(tensor.type) for tensor in header.tensors)
    return ", ".join(f"{count} {name}" for name, count in kinds.most_common()) or "no tensors"


def stamp_of(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change) of a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _recast(header: GgufHeader, file: File, tensor: GgufTensor) -> Recast:
    """S = 1 where that is exact; else the scales of a bank's experts, where llama.cpp reads them."""
    whole: list[BlockSource] = [*blocks_of(tensor, file, 1)]
    scaling, search = choose_unscaled(whole)
    domains = (_domain(tensor, tensor.name, scaling, search),)
    if scaling.exact or (scale := _place_for_scale(header, tensor)) is None:
        return Recast(tensor, domains)
    parts = tensor.shape[2] if len(tensor.shape) == 3 else 1
    chosen = [choose([blocks]) for blocks in blocks_of(tensor, file, parts)]
    names = [tensor.name] if parts == 1 else [f"{tensor.name} (expert {i})" for i in range(parts)]
    return Recast(tensor, tuple(_domain(tensor, name, *each) for name, each in zip(names, chosen, strict=True)), scale)


def _is_split(header: GgufHeader) -> bool:
    """Whether it is one of several files of a model."""
    count = header.value("split.count", 1)
    return isinstance(count, int) and count > 1


def _place_for_scale(header: GgufHeader, tensor: GgufTensor) -> str | None:
    """The name of a new tensor for tensor scales; None where llama.cpp would not apply it."""
    scale = layout.scale_name(str(header.value("general.architecture")), tensor.name, len(tensor.shape))
    if scale is None or _is_split(header):
        return None
    taken = {scale} | (set() if len(tensor.shape) == 3 else {scale.removesuffix("scale") + "bias"})
    return None if any(each.name in taken for each in header.tensors) else scale


def _domain(tensor: GgufTensor, name: str, scaling: Scaling, search: Search | None) -> GgufDomain:
    return GgufDomain(name, (), scaling, search, tensor=tensor.name)
