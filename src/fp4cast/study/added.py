"""The scenarios that the original lacks: domains, zeros, the ends of E8M0, code-poor and rare blocks, real weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fp4cast.casting.tight_rule import Ints
from fp4cast.checkpoints.header import read_header
from fp4cast.extras import require
from fp4cast.formats import E8M0_BIAS, MX_BLOCK, pack
from fp4cast.study.scenarios import Rng, Scenario, generator
from fp4cast.study.tensors import Mxfp4, Values, quantize

_BLOCKS = 8192
_RICH = (1, 2, 3, 4, 5, 6, 7)  # every magnitude but zero
_REAL_ROWS = 8192


def tensor(rng: Rng, exponents: Sequence[int] | Ints, members: Sequence[Sequence[int]]) -> Mxfp4:
    """Blocks with given exponents k, codes drawn from given magnitude codes, one set a block, and random signs.

    Both half-blocks of a block hold every magnitude of its set, so that the set is what the tight rule sees.
    """
    codes = np.empty((len(exponents), 2, MX_BLOCK // 2), np.uint8)
    for key in set(map(tuple, members)):
        rows = [i for i, each in enumerate(members) if tuple(each) == key]
        codes[rows] = rng.choice(np.array(key, np.uint8), (len(rows), 2, MX_BLOCK // 2))
        codes[rows, :, : len(key)] = key
    codes |= rng.integers(0, 2, codes.shape, np.uint8) << np.uint8(3)
    k = np.asarray(exponents, np.int64) + E8M0_BIAS
    return Mxfp4(pack(codes.reshape(-1, MX_BLOCK)), k.astype(np.uint8), (len(exponents), MX_BLOCK))


def _ends(spread: int, top: Sequence[int], bottom: Sequence[int]) -> Scenario:
    """Blocks of all magnitudes in the middle, and 16 at each end, `spread` binades apart, of given magnitudes only."""

    def build(rng: Rng) -> Mxfp4:
        high = (spread - 1) // 2
        k = rng.integers(-2, 2, _BLOCKS)
        k[:16], k[16:32] = high, high - spread
        members: list[Sequence[int]] = [top] * 16 + [bottom] * 16 + [_RICH] * (_BLOCKS - 32)
        return tensor(rng, k, members)

    poor = [end for end, codes in (("above", top), ("below", bottom)) if tuple(codes) != _RICH]
    kind = f"code-poor {' and '.join(poor)}" if poor else "code-rich"
    names = f"{_words(top)} above, {_words(bottom)} below"
    return Scenario(f"{kind}, spread {spread}", names, build, _BLOCKS * MX_BLOCK)


def _words(codes: Sequence[int]) -> str:
    if tuple(codes) == _RICH:
        return "all magnitudes"
    return "{" + ", ".join((".5", "1", "1.5", "2", "3", "4", "6")[code - 1] for code in codes) + "}"


def _bank(members: int, binades: int, std: float = 1.0) -> Values:
    """[members, 256, 1024]: each matrix 2^-binades times as loud as the one before, so each alone is narrow."""
    x = generator(f"bank of {members}").standard_normal((members, 256, 1024), dtype=np.float32) * np.float32(std)
    return np.asarray(np.ldexp(x, -binades * np.arange(members)[:, None, None]))


def _zero_blocks(rng: Rng) -> Mxfp4:
    """One block in 20 holds only zeros, under the smallest or the largest exponent byte."""
    made = quantize(rng.standard_normal((256, 1024), dtype=np.float32))
    codes, exponents = made.codes.copy(), made.exponents.copy()
    rows = rng.permutation(len(exponents))[: len(exponents) // 20]
    codes[rows] = rng.choice(np.array([0x00, 0x08, 0x80, 0x88], np.uint8), codes[rows].shape)
    exponents[rows] = rng.choice(np.array([0, 254], np.uint8), len(rows))
    return Mxfp4(codes, exponents, made.shape)


def _finite(k: int) -> tuple[int, ...]:
    """Magnitudes below 2^128 under an exponent: larger ones are infinite in BF16 and FP32."""
    return _RICH[: 3 if k == 127 else 5 if k == 126 else 7]


def _between(*ranges: tuple[int, int]) -> Scenario:
    def build(rng: Rng) -> Mxfp4:
        parts = [rng.integers(low, high + 1, _BLOCKS // len(ranges)) for low, high in ranges]
        for part, (low, high) in zip(parts, ranges, strict=True):
            part[:2] = low, high
        k = np.concatenate(parts)
        return tensor(rng, k, [_finite(int(each)) for each in k])

    where = {(-127, -112): "bottom", (112, 127): "top"}
    name = where[ranges[0]] + " of E8M0" if len(ranges) == 1 else "both ends of E8M0"
    about = " and ".join(f"exponents {low} to {high}" for low, high in ranges).replace("-", "−")
    return Scenario(name, about, build, _BLOCKS * MX_BLOCK)


def _rare_blocks(rng: Rng) -> Mxfp4:
    """2 of 524,288 blocks 18 and 19 binades below the top: as rare as where gpt-oss-120b has any.

    1,214 of its 3.58 billion blocks are reported outside, in 5 tensors. If those are gate_up_proj, of 128 * 5760 * 90
    blocks each, it is 3.7 in a million of theirs. How far down they lie was not reported.
    """
    made = quantize(rng.standard_normal((2048, 8192), dtype=np.float32) * np.float32(0.02))
    rows = rng.permutation(len(made.exponents))[:2]
    exponents = made.exponents.copy()
    exponents[rows] = made.exponents.max() - np.array([18, 19], np.uint8)
    return Mxfp4(made.codes, exponents, (2048, 8192))


def _real(_: Rng) -> Mxfp4:
    """Token embeddings of WordLlama (MIT; drawn from Llama 2), quantized to MXFP4 by Graphcore's gfloat."""
    values = _wordllama()
    gfloat = require("gfloat", "study")
    element = require("gfloat.formats", "study").format_info_mxfp4_e2m1.etype
    blocks = values.reshape(-1, MX_BLOCK)
    scales = np.array([gfloat.compute_scale_amax(element.emax, block) for block in blocks])
    rounded = gfloat.round_ndarray(element, blocks / scales[:, None], sat=True)
    codes = gfloat.encode_ndarray(element, rounded).astype(np.uint8)
    return Mxfp4(pack(codes), (np.log2(scales) + E8M0_BIAS).astype(np.uint8), values.shape)


def _wordllama() -> Values:
    require("wordllama", "study")
    spec = importlib.util.find_spec("wordllama")
    path = Path(str(spec.origin)).parent / "weights" / "l2_supercat_256.safetensors" if spec else Path()
    shard = read_header(path)
    (table,) = shard.tensors.values()
    columns = table.shape[1]
    return (
        np.fromfile(path, np.float16, _REAL_ROWS * columns, offset=table.start).reshape(-1, columns).astype(np.float64)
    )


def _domains(names: Sequence[str], together: str, binades: int) -> Iterator[Scenario]:
    """Matrices of one bank as one scale domain, and each as one of its own."""
    many = len(names)
    about = f"{many} matrices, each 2^{binades} times as loud as the next, share one tensor scale"
    yield Scenario(together, about, lambda _: quantize(_bank(many, binades)), many * 256 * 1024)
    for i, name in enumerate(names):
        about = f"number {i + 1} of them, with a tensor scale of its own"
        yield Scenario(name, about, lambda _, i=i: quantize(_bank(many, binades)[i : i + 1]), 256 * 1024)  # type: ignore[misc]


def _loudness(name: str, std: float, about: str) -> Scenario:
    about = f"4 experts, each an eighth as loud as the one before, the first N(0, {about})"
    return Scenario(name, about, lambda _: quantize(_bank(4, 3, std)), 1 << 20)


ADDED = (
    *_domains([f"expert {i} apart" for i in range(1, 5)], "experts, one domain", 9),
    *_domains(["gate apart", "up apart"], "gate and up, one domain", 17),
    _loudness("quiet bank", 0.02, "0.02²"),
    _loudness("loud bank", 2048, "2048²"),
    Scenario("zero blocks", "N(0, 1), 5 % blocks of zeros under bytes 0 and 254", _zero_blocks),
    _between((112, 127)),
    _between((-127, -112)),
    _between((-127, -120), (120, 127)),
    _ends(18, _RICH, _RICH),
    _ends(18, _RICH, (2, 4, 5, 6, 7)),
    _ends(19, _RICH, (4, 6, 7)),
    _ends(20, _RICH, (6,)),
    _ends(18, (1, 2, 3, 4, 5), _RICH),
    _ends(19, (1, 2, 3), _RICH),
    _ends(20, (1,), _RICH),
    _ends(23, (1,), (6,)),
    Scenario(
        "rare blocks",
        "N(0, 0.02²), 2 of 524,288 blocks 18 and 19 binades down: the rate of gpt-oss-120b's tensors that have any",
        _rare_blocks,
        1 << 24,
    ),
    Scenario(
        "real weights",
        "WordLlama's first 8,192 token embeddings, made MXFP4 by gfloat",
        _real,
        _REAL_ROWS * 256,
        extra=("wordllama", "gfloat"),
        weights=lambda _: _wordllama(),
    ),
)
