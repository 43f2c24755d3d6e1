"""When a cast from MXFP4 to NVFP4 is exact, and the tensor scale that makes it so: the tight rule.

NVFP4's tensor scale is S = 2^m and E4M3 holds every power of two from 2^-9 to 2^8, so a half-block with exponent k
keeps its codes under the block scale 2^(k-m) when -9 <= k-m <= 8. A half-block whose codes leave room may also be
written with all its codes divided by 2^a, which widens its own window to -9 - a_max <= k-m <= 8 - a_min. Over a scale
domain this gives an interval [lo, hi] of m; the domain is exact under some power of two if and only if lo <= hi.
(Another S could help only a domain whose every magnitude is 1.5, 3 or 6: s * S * c' = c * 2^k makes S's odd part divide
c's. No trained weight is like that, so such an S is not tried.)

Codes are read only where exponents do not decide: never when all exponents span at most 17 binades.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fp4cast.errors import ScaleError
from fp4cast.formats import E2M1, E4M3, E8M0_BIAS, E8M0_NAN, Bytes

Ints = npt.NDArray[np.int64]

E_MIN, E_MAX = -9, 8  # E4M3 holds 2^e exactly for e in [E_MIN, E_MAX]
WINDOW = E_MAX - E_MIN  # binades that the exponents of a domain may span without a shift
MARLIN_BINADES = 14  # vLLM's Marlin kernels zero block scales further below the largest
M_NORMAL = -126  # 2^m is a normal FP32 number from here up; a GPU flushes subnormal ones to zero
_BATCH = 4096  # blocks whose codes are read together

_POWER_CODE = {e: int(np.flatnonzero(E4M3.values == 2.0**e)[0]) for e in range(E_MIN, E_MAX + 1)}
_MAGNITUDES = [E2M1.decode(code) for code in range(8)]


def _shifts(mask: int) -> tuple[int, int]:
    """(a_min, a_max): the shifts a for which every magnitude of the set, divided by 2^a, is a magnitude too."""
    members = [_MAGNITUDES[i] for i in range(1, 8) if mask >> i & 1]
    allowed = [a for a in range(-3, 4) if all(value / 2.0**a in _MAGNITUDES for value in members)]
    return min(allowed), max(allowed)


# A set of magnitudes is a bit mask: bit i stands for magnitude code i. Code 0 has no bit, so mask 0 is "only zeros".
A_MIN, A_MAX = (
    np.array(column, np.int64) for column in zip(*(_shifts(mask) for mask in range(0, 256, 2)), strict=True)
)
_BYTE_MASK = np.array([((1 << (b & 7)) | (1 << (b >> 4 & 7))) & 0xFE for b in range(256)], np.uint8)


def _shifted_code(code: int, a: int) -> int:
    value = abs(E2M1.decode(code)) / 2.0**a
    return (code & 8) | _MAGNITUDES.index(value) if value in _MAGNITUDES else code


# [a + 3, byte]: both codes of a byte divided by 2^a.
_CODE_SHIFT = np.array([[_shifted_code(code, a) for code in range(16)] for a in range(-3, 4)], np.uint8)
_SHIFT: Bytes = _CODE_SHIFT[:, np.arange(256) & 15] | _CODE_SHIFT[:, np.arange(256) >> 4] * np.uint8(16)


def half_masks(codes: Bytes) -> Bytes:
    """The magnitudes of each half-block: packed uint8 [..., 8] -> bit mask uint8 [...], 0 where all codes are zero."""
    return np.asarray(np.bitwise_or.reduce(_BYTE_MASK[codes], axis=-1), np.uint8)


def shift_bounds(masks: Bytes) -> tuple[Ints, Ints]:
    """(a_min, a_max) of half-blocks by their masks; exact shifts are the whole interval between them."""
    return A_MIN[masks >> 1], A_MAX[masks >> 1]


def shift_codes(codes: Bytes, shifts: Ints) -> Bytes:
    """Packed half-blocks uint8 [n, 8] with codes divided by 2^a, a int [n] within `shift_bounds`."""
    return _SHIFT[shifts[:, None] + 3, codes]


@lru_cache(maxsize=1024)
def scale_table(m: int, bias: int = E8M0_BIAS) -> Bytes:
    """uint8 [256], read-only: the E4M3 code of 2^(k-m) for every E8M0 byte.

    Exponents outside of the window are clamped to its ends: that is the scale of an all-zero block, whose value no
    scale can change. Byte 255 maps to NaN, so that it cannot pass unseen.
    """
    table = [_POWER_CODE[min(max(b - bias - m, E_MIN), E_MAX)] for b in range(256)]
    table[E8M0_NAN] = 0x7F
    return np.frombuffer(bytes(table), np.uint8)


def closed_form(k_max: int) -> int:
    """The m of a domain that spans at most 17 binades: the largest exponent takes the largest power of two, 2^8."""
    return max(k_max - E_MAX, M_NORMAL)


def outside_window(k: Ints, m: int | None) -> Ints:
    """Indices of the blocks outside of the window of S = 2^m, whose codes decide; of all under another S (m None)."""
    return np.flatnonzero((k < m + E_MIN) | (k > m + E_MAX)) if m is not None else np.arange(len(k))


def halve(scales: Bytes, table: Bytes) -> Bytes:
    """The scales of both halves of each block: uint8 [n] looked up in uint8 [256] -> uint8 [2n]."""
    # bytes.translate and a multiplication: four times as fast as indexing, and NumPy's repeat is slower still.
    wide = np.frombuffer(scales.tobytes().translate(table.tobytes()), np.uint8).astype(np.uint16)
    wide *= 0x0101
    return wide.view(np.uint8)


class BlockSource(Protocol):
    """One MXFP4 tensor as a stream of blocks."""

    @property
    def name(self) -> str:
        """The tensor's name, for errors."""

    @property
    def bias(self) -> int:
        """The exponent bias: a block's exponent k is its E8M0 byte minus this."""

    def exponents(self) -> Iterator[tuple[int, Bytes]]:
        """Chunks in order: (index of the first block, E8M0 bytes uint8 [n])."""

    def codes(self, blocks: Ints) -> Bytes:
        """Packed codes of the given blocks (ascending): uint8 [len(blocks), 16]."""


@dataclass(frozen=True, slots=True)
class ArrayBlocks:
    """A `BlockSource` over arrays: packed uint8 [n, 16] and E8M0 uint8 [n]."""

    name: str
    packed: Bytes
    scales: Bytes
    bias: int = E8M0_BIAS
    chunk: int = 1 << 20

    def exponents(self) -> Iterator[tuple[int, Bytes]]:
        """See `BlockSource`."""
        for start in range(0, len(self.scales), self.chunk):
            yield start, self.scales[start : start + self.chunk]

    def codes(self, blocks: Ints) -> Bytes:
        """See `BlockSource`."""
        return self.packed[blocks]


@dataclass(frozen=True, slots=True)
class Scaling:
    """The tensor scale of a scale domain.

    Attributes:
        tensor_scale: S, a float32 value. 2^m, unless `m` is None.
        m: log2 of S, or None for a scale that is not a power of two (from `choose_nearest` alone).
        k_min: smallest exponent of blocks with a non-zero code, or of all if no code was read; None if all are zero.
        k_max: largest exponent of the same blocks; None if all are zero.
        lo: smallest m under which every half-block is exact.
        hi: largest such m; the domain is exact if and only if lo <= hi.
        verbatim: every half-block keeps its codes, and its scale follows from its exponent alone.
    """

    tensor_scale: float
    m: int | None
    k_min: int | None
    k_max: int | None
    lo: int
    hi: int
    verbatim: bool

    @property
    def exact(self) -> bool:
        """Whether NVFP4 represents every value of the domain."""
        return self.lo <= self.hi

    def undecided(self, k: Ints) -> Ints:
        """Indices of the blocks, by their exponents k [n], whose codes must be read; none in a verbatim domain."""
        return np.empty(0, np.int64) if self.verbatim else outside_window(k, self.m)

    @property
    def spread(self) -> int:
        """Binades between `k_min` and `k_max`."""
        return 0 if self.k_min is None or self.k_max is None else self.k_max - self.k_min

    @property
    def marlin_exact(self) -> bool:
        """Whether vLLM's Marlin kernels, with their narrower window, keep every value too."""
        return self.exact and self.spread <= MARLIN_BINADES


@dataclass
class Search:
    """The bounds that the half-blocks seen so far set on m, and the blocks that set them."""

    lo: int = -(1 << 16)
    hi: int = 1 << 16
    k_min: int | None = None
    k_max: int | None = None
    lo_block: tuple[str, int] = field(default=("", 0))
    hi_block: tuple[str, int] = field(default=("", 0))

    def see(self, source: BlockSource, k: int, blocks: Ints) -> None:
        """Narrow [lo, hi] by the codes of blocks that share the exponent k."""
        masks = half_masks(source.codes(blocks).reshape(-1, 2, 8))
        used = np.flatnonzero(masks)
        if not used.size:
            return
        self.k_min = k if self.k_min is None else min(k, self.k_min)
        self.k_max = k if self.k_max is None else max(k, self.k_max)
        a_min, a_max = shift_bounds(masks.reshape(-1)[used])
        top, bottom = int(np.argmax(a_min)), int(np.argmin(a_max))
        if (lo := k + int(a_min[top]) - E_MAX) > self.lo:
            self.lo, self.lo_block = lo, (source.name, int(blocks[used[top] // 2]))
        if (hi := k + int(a_max[bottom]) - E_MIN) < self.hi:
            self.hi, self.hi_block = hi, (source.name, int(blocks[used[bottom] // 2]))

    def scan(self, source: BlockSource) -> None:
        """Narrow [lo, hi] by one tensor, from both ends of its exponents, reading no code that cannot matter."""
        for start, chunk in source.exponents():
            levels = [int(b) for b in np.flatnonzero(np.bincount(chunk, minlength=256))]
            for b in reversed(levels):
                if self.k_max is not None and b - source.bias - E_MAX <= self.lo:
                    break
                self._scan_level(source, start, chunk, b)
            for b in levels:
                if self.k_min is not None and b - source.bias - E_MIN >= self.hi:
                    break
                self._scan_level(source, start, chunk, b)

    def _scan_level(self, source: BlockSource, start: int, chunk: Bytes, b: int) -> None:
        k, blocks = b - source.bias, np.flatnonzero(chunk == b) + start
        for i in range(0, len(blocks), _BATCH):
            self.see(source, k, blocks[i : i + _BATCH])
            if self.lo >= k - E_MAX and self.hi <= k - E_MIN:
                return  # nothing at this exponent can narrow them further


def extents_of(exponents: Sequence[Bytes], biases: Sequence[int]) -> list[tuple[int, int]]:
    """Extents of many small tensors, uint8 [n > 0] each; none where a scale byte is 255, which `choose` then names."""
    ends = np.cumsum([len(each) for each in exponents])
    together, starts = np.concatenate(exponents), np.array([0, *ends[:-1]])
    lows, highs = np.minimum.reduceat(together, starts), np.maximum.reduceat(together, starts)
    if highs.max() == E8M0_NAN:
        return []
    return [(low - bias, high - bias) for low, high, bias in zip(lows.tolist(), highs.tolist(), biases, strict=True)]


def _extent(source: BlockSource) -> tuple[int, int]:
    """(smallest, largest) exponent over all blocks, whatever their codes."""
    low, high = 255, 0
    for start, chunk in source.exponents():
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        if high == E8M0_NAN:
            block = start + int(np.argmax(chunk == E8M0_NAN))
            raise ScaleError(
                f"{source.name}: block {block} has scale byte 255, which is NaN in E8M0; expected 0 to 254. "
                "The checkpoint is damaged: download the shard again."
            )
    return low - source.bias, high - source.bias


def _power(m: int, k_min: int | None, k_max: int | None, lo: int, hi: int) -> Scaling:
    verbatim = k_min is None or k_max is None or (m + E_MIN <= k_min and k_max <= m + E_MAX)
    return Scaling(2.0**m, m, k_min, k_max, lo, hi, verbatim)


def choose(domain: Sequence[BlockSource], extents: Sequence[tuple[int, int]] = ()) -> tuple[Scaling, Search | None]:
    """Choose a domain's tensor scale by the tight rule.

    Args:
        domain: its tensors.
        extents: (smallest, largest) exponent over all blocks of each, where they are known.

    Returns:
        The scaling, and the search behind it where exponents alone did not decide. A scaling that is not exact has
        m = lo, which keeps the largest blocks; `choose_nearest` finds a better one.
    """
    extents = extents or [_extent(source) for source in domain]
    k_min, k_max = min(low for low, _ in extents), max(high for _, high in extents)
    if k_max - k_min <= WINDOW:
        return _power(closed_form(k_max), k_min, k_max, k_max - E_MAX, k_min - E_MIN), None
    search = Search()
    for source in domain:
        search.scan(source)
    if search.k_max is None:
        return _power(0, None, None, 0, 0), search
    m = min(search.k_max - E_MAX, search.hi) if search.lo <= search.hi else search.lo
    return _power(max(m, M_NORMAL), search.k_min, search.k_max, search.lo, search.hi), search


def choose_unscaled(domain: Sequence[BlockSource]) -> tuple[Scaling, Search | None]:
    """Like `choose`, where nothing holds a tensor scale: S is 1, and the scaling is exact where that is."""
    extents = [_extent(source) for source in domain]
    k_min, k_max = min(low for low, _ in extents), max(high for _, high in extents)
    if k_min >= E_MIN and k_max <= E_MAX:
        return _power(0, k_min, k_max, 0, 0), None
    search = Search()
    for source in domain:
        search.scan(source)
    return _power(0, search.k_min, search.k_max, max(search.lo, 0), min(search.hi, 0)), search
