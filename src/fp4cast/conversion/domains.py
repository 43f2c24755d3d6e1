"""Find the tensor scale of every scale domain of a checkpoint: the only step that must see all scales first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np

from fp4cast.casting.nearest import choose_nearest, cost_of_nearest
from fp4cast.casting.tight_rule import BlockSource, Ints, Scaling, Search, choose, extents_of, outside_window
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.readable import ReadableFiles
from fp4cast.conversion.outside import join
from fp4cast.errors import InexactError
from fp4cast.families.family import Pair
from fp4cast.families.merging import shared_scale_group
from fp4cast.formats import MX_BLOCK_BYTES, Bytes
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.ranges import grouped, spans
from fp4cast.parallel.workers import workers

_SLICE = 128  # domains that one task of the pool scans at most
_SLICE_BYTES = 8 << 20  # scale bytes after which a task is large enough
_SHOWN = 5  # inexact domains that an error names


@dataclass(frozen=True, slots=True)
class FileBlocks:
    """A `BlockSource` over a pair on disk: reads scales in chunks, and codes only on request.

    Attributes:
        pair: the tensor.
        files: the open files that it reads.
        check: called before every read; may raise to stop.
    """

    pair: Pair
    files: ReadableFiles
    check: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        """The module's name and the path of its scales."""
        return f"{self.pair.module} ({self.pair.scales.path})"

    @property
    def bias(self) -> int:
        """The pair's exponent bias."""
        return self.pair.bias

    def exponents(self) -> Iterator[tuple[int, Bytes]]:
        """See `BlockSource`."""
        scales = self.pair.scales
        file = self.files[scales.path]
        for start, end in spans(0, scales.nbytes, tiles.LIMITS.scan_bytes):
            self.check()
            yield start, file.read(scales.start + start, end - start)

    def codes(self, blocks: Ints) -> Bytes:
        """See `BlockSource`."""
        self.check()
        codes = self.pair.codes
        return self.files[codes.path].gather(codes.start, blocks, MX_BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Domain:
    """Pairs that share a tensor scale.

    Attributes:
        name: the module's name, or `parent.w1+w3` for projections that engines merge.
        pairs: its MXFP4 tensors.
        scaling: the tensor scale, and the bounds within which it is exact.
        search: the blocks that decided it, where exponents alone did not.
        outside: then, for each pair, the exponents that its block scales will not tell, as a text; None where that is
            too long, or rounding loses more. Empty otherwise: block scales tell all.
    """

    name: str
    pairs: tuple[Pair, ...]
    scaling: Scaling
    search: Search | None = None
    outside: tuple[str | None, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every value of the domain can be written."""
        return self.scaling.exact

    @property
    def marlin_exact(self) -> bool:
        """Whether vLLM's Marlin kernels keep every value too, by exponents alone where codes were not read."""
        return self.scaling.marlin_exact

    @property
    def spread(self) -> int:
        """Binades between its smallest and its largest exponent."""
        return self.scaling.spread

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.name,
            "tensors": [pair.module for pair in self.pairs],
            "k_min": self.scaling.k_min,
            "k_max": self.scaling.k_max,
            "spread": self.spread,
            "m": self.scaling.m if self.exact else None,
            "exact": self.exact,
            "marlin_exact": self.marlin_exact,
        }


def group_domains(pairs: Sequence[Pair]) -> list[tuple[str, tuple[Pair, ...]]]:
    """Pairs by scale domain, in the order of each domain's first pair; partners may lie in different shards."""
    table = {pair.module: pair for pair in pairs}
    domains: dict[str, tuple[Pair, ...]] = {}
    for pair in pairs:
        name, modules = shared_scale_group(pair.module)
        members = tuple(table[module] for module in modules if module in table)
        domains.setdefault(name if len(members) > 1 else pair.module, members)
    return list(domains.items())


def _scan_one(
    name: str,
    pairs: tuple[Pair, ...],
    extents: Sequence[tuple[int, int]],
    files: ReadableFiles,
    nearest: bool,
    check: Callable[[], None],
) -> Domain:
    blocks: list[BlockSource] = [FileBlocks(pair, files, check) for pair in pairs]
    scaling, search = choose(blocks, extents)
    if nearest and not scaling.exact:
        scaling = choose_nearest(blocks)
    return Domain(name, pairs, scaling, search, () if search is None else _outside(blocks, pairs, scaling))


def _outside(sources: Sequence[BlockSource], pairs: Sequence[Pair], scaling: Scaling) -> tuple[str | None, ...]:
    """See `Domain`."""
    m = scaling.m
    if not scaling.exact or m is None:
        return (None,) * len(pairs)
    texts = []
    for source, pair in zip(sources, pairs, strict=True):
        found = []
        for start, chunk in source.exponents():
            odd = outside_window(chunk.astype(np.int64) - source.bias, m)
            found.append((odd + start, chunk[odd]))
        texts.append(join(found).encode(pair.blocks))
    return tuple(texts)


def _extents(pairs: Sequence[Pair], files: ReadableFiles, check: Callable[[], None]) -> list[tuple[int, int]]:
    """The extents of pairs that are small enough to be read together; none where they are not."""
    check()
    if sum(pair.blocks for pair in pairs) > tiles.LIMITS.scan_bytes:
        return []
    read = [
        file.read(pair.scales.start, pair.scales.nbytes)
        for path, group in groupby(pairs, lambda pair: pair.scales.path)
        for file in [files[path]]
        for pair in group
    ]
    return extents_of(read, [pair.bias for pair in pairs])


def find_domains(
    pairs: Sequence[Pair],
    *,
    inexact: str = "fail",
    jobs: int | None = None,
    progress: AdvanceOf = ignore,
    files: ReadableFiles | None = None,
) -> list[Domain]:
    """Read every scale once and choose every domain's tensor scale.

    Args:
        pairs: the MXFP4 tensors to cast.
        inexact: "nearest" looks for the scale of least error where none is exact, "fail" and "report" do not.
        jobs: threads.
        progress: called with (scale bytes just read, total scale bytes).
        files: reads the source; None where it lies on this machine.

    Raises:
        ScaleError: a scale byte of 255.
        InexactError: some domain is not exact and `inexact` is "fail".
    """
    groups = group_domains(pairs)
    total = sum(pair.scales.nbytes for pair in pairs)
    with files or Files() as opened, workers(jobs) as pool:

        def work(part: Sequence[tuple[str, tuple[Pair, ...]]]) -> list[Domain]:
            scales = (pair.scales for _, members in part for pair in members)
            opened.prefetch((tensor.path, tensor.start, tensor.nbytes) for tensor in scales)
            known = iter(_extents([pair for _, members in part for pair in members], opened, pool.check))
            domains = [
                _scan_one(name, members, list(islice(known, len(members))), opened, inexact == "nearest", pool.check)
                for name, members in part
            ]
            progress(sum(pair.scales.nbytes for domain in domains for pair in domain.pairs), total)
            return domains

        sized = ((group, sum(pair.scales.nbytes for pair in group[1])) for group in groups)
        domains = [domain for part in pool.map(work, grouped(sized, _SLICE_BYTES, _SLICE)) for domain in part]
    if inexact == "fail" and (bad := [domain for domain in domains if not domain.exact]):
        with files or Files() as opened:
            raise InexactError(f"{pairs[0].codes.path.parent}: {_explain(bad, domains, opened)}")
    return domains


def _explain(bad: Sequence[Domain], domains: Sequence[Domain], files: ReadableFiles) -> str:
    """Name the first inexact domains, what decides them, and what rounding would cost them, as measured."""
    total = sum(pair.blocks for domain in domains for pair in domain.pairs)
    lines = [f"{len(bad)} of {len(domains)} scale domains cannot be represented exactly in NVFP4; nothing was written."]
    rounded = 0
    for domain in bad[:_SHOWN]:
        scaling, search = domain.scaling, domain.search
        lines.append(f"  {domain.name}: exponents {scaling.k_min} to {scaling.k_max}, a spread of {domain.spread}")
        if search is not None:
            (top, top_block), (low, low_block) = search.lo_block, search.hi_block
            lines.append(f"    block {top_block} of {top} needs a tensor scale of at least 2^{search.lo},")
            lines.append(f"    block {low_block} of {low} one of at most 2^{search.hi}")
        cost = cost_of_nearest([FileBlocks(pair, files) for pair in domain.pairs])
        rounded += cost.rounded
        lines.append(
            f"    nearest would round {cost.rounded:,} of its {cost.blocks:,} blocks: "
            f"SNR of these {cost.snr_db:.1f} dB, largest error {cost.max_error:.3g}"
        )
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    lines.append(
        f"In {'these' if len(bad) <= _SHOWN else f'the first {_SHOWN}'}, {rounded:,} of the {total:,} blocks that are "
        "cast would change. (gpt-oss-120b is reported to have 1,214 of 3.58 billion, in 5 of its 72 tensors.)"
    )
    lines.append("To write the nearest values instead, with the error measured and reported: --inexact nearest")
    return "\n".join(lines)
