"""Changes of tensors after which shards and index are mostly consistent: they pass the checks of headers."""

import math
import random

from attacks.starts import Tensors, Tree, decode, encode, index_of
from fp4cast.checkpoints.directory import INDEX
from fp4cast.checkpoints.header import DTYPE_BITS, METADATA

_LARGEST = 1 << 18  # bytes of a tensor that grows
_ENDS = (
    ".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_global_scale", ".input_scale", ".weight", ".scale",
    ".input_global_scale", "_blocks", "_scales", "_bias", ".weight_scale_inv", "_scale", "_scale_2", "",
)  # fmt: skip
_NAMES = (
    "", ".", "..", "a" * 4096, "a" * 5000, "a/b", "../a", "a\0b", "a\nb", "\x1b[31m", "é", METADATA, "re:.*", "*", " ",
    f"{METADATA}_blocks", "a." * 2000, ".weight", "_blocks", ".experts.0.", "x.experts.99999999999999999999.w1.weight",
)  # fmt: skip
_PARTS = (
    ".experts.",
    ".ffn.",
    "layers.0",
    "layers.",
    "model.",
    ".mlp.",
    "proj",
    "gate_",
    "w1",
    "w3",
    "mtp.",
    "weight",
    ".",
)


def change_tensors(rng: random.Random, tree: Tree) -> str:
    """Change tensors of a tree whose shards are well-formed.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: they are not.
    """
    files = [name for name in tree if name.endswith(".safetensors") and "/" not in name]
    shards = {name: decode(tree[name]) for name in files}
    tables = {name: tensors for name, (tensors, _) in shards.items()}
    file = rng.choice(files)
    name = rng.choice(list(tables[file]))
    way = rng.choice(_WAYS)
    if way is _rename_all:
        _rename_all(rng, tables)
    else:
        way(rng, tables, file, name)
    if rng.random() < 0.05:
        shards[file][1][rng.choice(("format", "x", ""))] = rng.choice(("tf", "", "x" * 5000, "\n"))
    for each in files:
        tree[each] = encode(tables[each], shards[each][1])
    if INDEX in tree and rng.random() < 0.9:
        tree[INDEX] = index_of(tables)
    return f"{way.__name__.strip('_')} {name[:60]!r} of {file!r}"


def _name(rng: random.Random, name: str) -> str:
    way = rng.random()
    if way < 0.2:
        return rng.choice(_NAMES)
    end = next((end for end in _ENDS if end and name.endswith(end)), "")
    if way < 0.6:
        return name.removesuffix(end) + rng.choice(_ENDS)
    return rng.choice(_NAMES) + (end if way < 0.8 else name)


def _rename(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    tables[file][_name(rng, name)] = tables[file].pop(name)


def _rename_all(rng: random.Random, tables: dict[str, Tensors], *_: str) -> None:
    """Change a part of all names, so that partners still find each other."""
    old, new = rng.choice(_PARTS), rng.choice((*_PARTS, *_NAMES))
    count = rng.choice((1, -1))
    for file, tensors in tables.items():
        tables[file] = {name.replace(old, new, count): tensor for name, tensor in tensors.items()}


def _rename_module(rng: random.Random, tables: dict[str, Tensors], _: str, name: str) -> None:
    """Change the name of one module with all its tensors."""
    module, new = name.rpartition(".")[0] or name, rng.choice(_NAMES)
    for file, tensors in tables.items():
        tables[file] = {
            new + each.removeprefix(module) if each.startswith(module) else each: tensor
            for each, tensor in tensors.items()
        }


def _drop(_: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    del tables[file][name]


def _move(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    tensor = tables[file].pop(name)
    tables[rng.choice(list(tables))][name] = tensor


def _copy(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    new = name if rng.random() < 0.3 else _name(rng, name)
    tables[rng.choice(list(tables))][new] = tables[file][name]


def _exchange(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    other = rng.choice(list(tables[file]))
    table = tables[file]
    table[name], table[other] = table[other], table[name]


def _retype(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    """Another dtype, mostly of the same width; the last axis changes with the width."""
    dtype, shape, data = tables[file][name]
    same = [each for each in DTYPE_BITS if DTYPE_BITS[each] == DTYPE_BITS[dtype]]
    new = rng.choice(same if rng.random() < 0.7 else list(DTYPE_BITS))
    if shape and new not in same:
        shape = (*shape[:-1], shape[-1] * DTYPE_BITS[dtype] // DTYPE_BITS[new])
    tables[file][name] = _fitted(new, shape, data)


def _reshape(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    """Another shape of as many elements."""
    dtype, shape, data = tables[file][name]
    sizes = list(shape)
    way = rng.randrange(5)
    if way == 0:
        rng.shuffle(sizes)
    elif way == 1:
        sizes = [math.prod(sizes)]
    elif way == 2:
        sizes.insert(rng.randrange(len(sizes) + 1), 1)
    elif way == 3 and sizes:
        factor = rng.choice((2, 16, 32))
        at = rng.randrange(len(sizes))
        if sizes[at] % factor == 0:
            sizes[at : at + 1] = [sizes[at] // factor, factor]
    elif len(sizes) > 1:
        sizes[:2] = [sizes[0] * sizes[1]]
    tables[file][name] = (dtype, tuple(sizes), data)


def _resize(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    """Another size of one axis, with the bytes for it."""
    dtype, shape, data = tables[file][name]
    sizes = list(shape) or [1]
    at = rng.randrange(len(sizes))
    sizes[at] = rng.choice((0, 1, sizes[at] // 2, sizes[at] * 2, sizes[at] + 1, max(0, sizes[at] - 1), 2**62))
    if sizes[at] == 2**62:
        sizes.append(0)  # no bytes
    tables[file][name] = _fitted(dtype, tuple(sizes), data)


def _fitted(dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or not 0 <= bits // 8 <= _LARGEST:
        shape, bits = (8,), 8 * DTYPE_BITS[dtype]
    return dtype, shape, (data * (bits // 8 // max(1, len(data)) + 1))[: bits // 8].ljust(bits // 8, b"\0")


def _fill(rng: random.Random, tables: dict[str, Tensors], file: str, name: str) -> None:
    """Other bytes: one, all, or random ones."""
    dtype, shape, data = tables[file][name]
    byte = bytes([rng.choice((0, 1, 126, 127, 128, 200, 254, 255, rng.randrange(256)))])
    at = rng.randrange(len(data) or 1)
    new = rng.choice((data[:at] + byte + data[at + 1 :], byte * len(data), rng.randbytes(len(data))))
    tables[file][name] = (dtype, shape, new[: len(data)])


_WAYS = (
    _rename, _rename, _rename_all, _rename_module, _drop, _move, _copy, _exchange, _retype, _reshape, _resize, _resize,
    _fill, _fill, _fill,
)  # fmt: skip
