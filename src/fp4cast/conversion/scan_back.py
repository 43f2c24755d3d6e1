"""Which blocks of NVFP4 weights are MXFP4 blocks? All scales are read once, and codes where these do not decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp4cast.casting.tight_rule import Ints
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.conversion.nvfp4_blocks import count_units, exponents_of, parts, read_scalar
from fp4cast.conversion.outside import Outside
from fp4cast.errors import InexactError
from fp4cast.formats import E2M1, E4M3, NV_BLOCK_BYTES, Bytes, unpack, usable_scale
from fp4cast.layouts.read_back import Readable, Weight
from fp4cast.parallel.progress import AdvanceOf
from fp4cast.parallel.ranges import grouped, spans
from fp4cast.parallel.workers import workers

_SHOWN = 5  # weights that an error names
_PART_BLOCKS = 1 << 20  # blocks after which a task of the scan is large enough
_AHEAD = 8 << 20  # bytes that are read ahead, at most


@dataclass
class Scanned:
    """What the scan of one weight found.

    Attributes:
        tensor_scale: S.
        changed: half-blocks whose codes change.
        lost: the number of blocks that no MXFP4 block holds.
        first: the number of the first of them, its codes uint8 [16] and its scales uint8 [2].
        outside: the exponents that a receipt knows.
    """

    tensor_scale: float = 1.0
    changed: int = 0
    lost: int = 0
    first: tuple[int, Bytes, Bytes] | None = None
    outside: Outside | None = None

    def see(self, numbers: Callable[[Ints], Ints], lost: Ints, codes: Bytes, scales: Bytes) -> None:
        """Add the lost blocks of a part."""
        if lost.size:
            at = int(lost[0])
            number = int(numbers(lost[:1])[0])
            if self.first is None or number < self.first[0]:
                self.first = (number, codes[at].copy(), scales[at].copy())
        self.lost += lost.size

    def merge(self, other: Scanned) -> None:
        """Add another part of the same weight."""
        self.tensor_scale = other.tensor_scale
        self.changed += other.changed
        self.lost += other.lost
        if other.first is not None and (self.first is None or other.first[0] < self.first[0]):
            self.first = other.first


def scan_weights(
    weights: Sequence[Weight], outside: Mapping[str, Outside], jobs: int | None, progress: AdvanceOf
) -> dict[str, Scanned]:
    """Read every block scale once, and the codes where these do not decide.

    Args:
        weights: what to read.
        outside: by module, exponents that a receipt knows; those of a weight that cannot have them are forgotten.
        jobs: threads.
        progress: called with (scale bytes just read, total scale bytes).

    Raises:
        InexactError: a tensor scale is not usable.
    """
    known = _scan(weights, outside, jobs, progress)
    again = [weight for weight in weights if known[weight.pair.module].outside and known[weight.pair.module].lost]
    return known | _scan(again, {}, jobs, progress) if again else known


def _scan(
    weights: Sequence[Weight], outside: Mapping[str, Outside], jobs: int | None, progress: AdvanceOf
) -> dict[str, Scanned]:
    total = sum(weight.block_scales.nbytes for weight in weights)
    with Files() as files, workers(jobs) as pool:
        known = {name: Scanned(outside=outside.get(name)) for name in (weight.pair.module for weight in weights)}

        def work(group: Sequence[tuple[Weight, int, int]]) -> list[tuple[str, Scanned]]:
            found = []
            for scales in {weight.pair.module: weight.block_scales for weight, *_ in group}.values():
                files[scales.path].prefetch(scales.start, min(scales.nbytes, _AHEAD))
            for weight, first, last in group:
                pool.check()
                scanned = Scanned(_tensor_scale(weight, files), outside=outside.get(weight.pair.module))
                seen = _scan_units(weight, first, last, files, scanned)
                found.append((weight.pair.module, scanned))
                progress(2 * seen, total)
            return found

        for found in pool.map(work, grouped(_units(weights), _PART_BLOCKS)):
            for module, scanned in found:
                known[module].merge(scanned)
    return known


def _scan_units(weight: Weight, first: int, last: int, files: Files, scanned: Scanned) -> int:
    """Scan some units; returns how many blocks they hold."""
    seen = 0
    for part in parts(weight, first, last, files):
        exponents, turned = exponents_of(part, scanned.tensor_scale, weight.pair.bias, scanned.outside)
        seen += len(exponents)
        if turned is not None:
            scanned.changed += turned.changed
            if turned.lost.size:
                scanned.see(part.numbers, turned.lost, part.codes(), part.scales())
    return seen


def _units(weights: Sequence[Weight]) -> Iterator[tuple[tuple[Weight, int, int], int]]:
    """((weight, first unit, last unit), its blocks)."""
    for weight in weights:
        units, size = count_units(weight)
        for first, last in spans(0, units, max(1, min(_PART_BLOCKS, tiles.LIMITS.scan_bytes) // size)):
            yield (weight, first, last), (last - first) * size


def _tensor_scale(weight: Weight, files: Files) -> float:
    stored = read_scalar(weight.tensor_scale, files)
    if not usable_scale(stored):
        raise InexactError(
            f"{weight.tensor_scale.path}: {weight.tensor_scale} is {stored}; expected a positive normal FP32 number"
        )
    return 1.0 / stored if weight.form.reciprocal else stored


def explain(bad: Sequence[str], known: Mapping[str, Scanned], found: Readable) -> str:
    """Name the first weights that are no MXFP4 values, and the first block of each: expected and actual."""
    lines = [f"{len(bad)} of {len(known)} NVFP4 weights hold values that no MXFP4 block has; nothing was written."]
    for module in bad[:_SHOWN]:
        scanned, pair = known[module], found.source.pairs[module]
        lines.append(f"  {module}: {scanned.lost:,} of {pair.blocks:,} blocks")
        if scanned.first is not None:
            number, codes, scales = scanned.first
            halves = (
                f"{sorted(set(abs(E2M1.values[unpack(half)]).tolist()))} times {E4M3.values[scale]:g} * "
                f"{scanned.tensor_scale:g}"
                for half, scale in zip(codes.reshape(2, NV_BLOCK_BYTES), scales, strict=True)
            )
            lines.append(
                f"    block {number}: expected magnitudes of E2M1 times one power of two, got {' and '.join(halves)}"
            )
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    lines.append("They were quantized or rounded, not cast exactly: only the MXFP4 checkpoint itself has the original.")
    return "\n".join(lines)
