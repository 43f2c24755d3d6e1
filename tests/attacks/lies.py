"""Larger lies than a flipped bit: whole tensors swapped, permuted, scaled, dropped, added, renamed; configs changed."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, SINGLE, Checkpoint, open_checkpoint
from fp4cast.checkpoints.header import Tensor, lay_out
from helpers import edit, raw


class Told(NamedTuple):
    """A lie: one of the names must be said, unless a note says `free`; no names where nothing could be changed."""

    names: tuple[str, ...] = ()
    free: str = ""


SUFFIXES = ("_weight_scale_2", ".weight_scale_2", ".weight_global_scale", "_weight_scale", ".weight_scale",
            ".weight_packed", ".weight", "_input_scale", ".input_scale", ".input_global_scale")  # fmt: skip


def module_of(name: str) -> str:
    """The module whose weight a tensor belongs to: verification judges a weight as a whole."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _tensors(path: Path) -> list[Tensor]:
    return list(open_checkpoint(path).tensors.values())


def _put(path: Path, name: str, data: np.ndarray) -> None:
    edit(path, name, lambda old: old.__setitem__(slice(None), data.reshape(-1)))


def swap(rng: Random, path: Path) -> Told:
    """Swap two tensors of one shape and dtype: two experts' codes, say."""
    tensors = _tensors(path)
    a = rng.choice(tensors)
    alike = [b for b in tensors if (b.dtype, b.shape) == (a.dtype, a.shape) and b.name != a.name]
    differ = [b for b in alike if not np.array_equal(raw(path, a.name), raw(path, b.name))]
    if not differ:
        return Told()
    b = rng.choice(differ)
    first, second = raw(path, a.name).copy(), raw(path, b.name).copy()
    _put(path, a.name, second)
    _put(path, b.name, first)
    return Told((module_of(a.name), module_of(b.name)))


def swap_modules(rng: Random, path: Path) -> Told:
    """Swap everything of two modules: two whole experts' projections."""
    tensors = _tensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        module = module_of(tensor.name)
        modules.setdefault(module, {})[tensor.name.removeprefix(module)] = tensor
    shapes = {m: {s: (t.dtype, t.shape) for s, t in parts.items()} for m, parts in modules.items() if len(parts) > 2}
    pairs = [(a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b]]
    if not pairs:
        return Told()
    a, b = rng.choice(pairs)
    for suffix in shapes[a]:
        first, second = raw(path, a + suffix).copy(), raw(path, b + suffix).copy()
        _put(path, a + suffix, second)
        _put(path, b + suffix, first)
    return Told((a, b))


def _change(rng: Random, path: Path, fits: Callable[[Tensor], bool], change: Callable[..., np.ndarray]) -> Told:
    """Change the bytes of a random tensor that fits."""
    tensors = [tensor for tensor in _tensors(path) if fits(tensor)]
    if not tensors:
        return Told()
    tensor = rng.choice(tensors)
    before = raw(path, tensor.name).copy()
    after = change(before, tensor)
    if np.array_equal(before, after.reshape(-1)):
        return Told()
    _put(path, tensor.name, after)
    if "input_" in tensor.name:
        return Told((tensor.name, "input scales"), free="input scales")
    return Told((module_of(tensor.name),), free=tensor.name if tensor.dtype == "F32" else "")


def permute(rng: Random, path: Path) -> Told:
    """Roll the rows of a matrix."""
    return _change(
        rng, path, lambda t: len(t.shape) > 1, lambda data, t: np.roll(data.reshape(t.shape[0], -1), 1, axis=0)
    )


def swap_nibbles(rng: Random, path: Path) -> Told:
    """Swap the two codes of every byte, as a tool with another order would."""
    return _change(rng, path, lambda t: t.dtype == "U8", lambda data, _: data >> 4 | data << 4)


def double(rng: Random, path: Path) -> Told:
    """Double a tensor scale or an input scale."""
    scalar = lambda t: t.dtype == "F32" and t.nbytes == 4  # noqa: E731
    return _change(rng, path, scalar, lambda data, _: (data.view("<f4") * np.float32(2)).view(np.uint8))


def next_scale(rng: Random, path: Path) -> Told:
    """Move one block scale to the next E4M3 number."""

    def change(data: np.ndarray, _: Tensor) -> np.ndarray:
        data = data.copy()
        data[rng.randrange(data.size)] += 1
        return data

    # Only the scales of casts, whose E4M3 codes are positive; FP8 weights may be anything.
    return _change(rng, path, lambda t: t.name.endswith("_scale") and t.dtype == "F8_E4M3", change)


def _rewrite(checkpoint: Checkpoint, file: str, change: Callable[[dict[str, tuple[Tensor, np.ndarray]]], None]) -> None:
    """Rewrite a shard with other tensors, and the index with it."""
    path, shard = checkpoint.path, checkpoint.shards[file]
    tensors = {name: (tensor, raw(path, name).copy()) for name, tensor in shard.tensors.items()}
    change(tensors)
    placed = lay_out(((name, t.dtype, t.shape) for name, (t, _) in tensors.items()), shard.metadata)
    order = sorted(tensors, key=lambda name: placed.offsets[name])
    shard.path.write_bytes(placed.header + b"".join(tensors[name][1].tobytes() for name in order))
    if file == SINGLE:
        return
    index = json.loads((path / INDEX).read_text())
    kept = {name: where for name, where in index["weight_map"].items() if where != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    index["metadata"]["total_size"] += sum(d.size for _, d in tensors.values()) - sum(
        t.nbytes for t in shard.tensors.values()
    )
    (path / INDEX).write_text(json.dumps(index))


def _restructure(rng: Random, path: Path, change: Callable[..., str]) -> Told:
    checkpoint = open_checkpoint(path)
    file = rng.choice(list(checkpoint.shards))
    name = rng.choice(list(checkpoint.shards[file].tensors))
    names: list[str] = [name]
    _rewrite(checkpoint, file, lambda tensors: names.append(change(tensors, name)))
    return Told(tuple(names))


def drop(rng: Random, path: Path) -> Told:
    """Leave a tensor out, and the index with it."""

    def change(tensors: dict[str, tuple[Tensor, np.ndarray]], name: str) -> str:
        del tensors[name]
        return name

    return _restructure(rng, path, change)


def add(rng: Random, path: Path) -> Told:
    """Put in a tensor under another name."""

    def change(tensors: dict[str, tuple[Tensor, np.ndarray]], name: str) -> str:
        tensors[f"{name}_too"] = tensors[name]
        return f"{name}_too"

    return _restructure(rng, path, change)


def rename(rng: Random, path: Path) -> Told:
    """Give a tensor another name."""

    def change(tensors: dict[str, tuple[Tensor, np.ndarray]], name: str) -> str:
        tensors[f"{name}_too"] = tensors.pop(name)
        return f"{name}_too"

    return _restructure(rng, path, change)


def config(rng: Random, path: Path) -> Told:
    """Change one place of a config: another value, another key, or nothing there."""
    file = rng.choice([name for name in (CONFIG, QUANT_CONFIG) if (path / name).exists()])
    document = json.loads((path / file).read_text())
    holder, key = rng.choice(list(_places(document)))
    value = holder[key]
    if isinstance(holder, dict) and rng.random() < 0.2:
        holder[f"{key}_"] = holder.pop(key)
    elif rng.random() < 0.2:
        del holder[key]
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + rng.choice((-1, 1, 16))
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[1:], value.swapcase() + "_"))
    else:
        holder[key] = "other"
    (path / file).write_text(json.dumps(document))
    return Told((CONFIG, QUANT_CONFIG))


def _places(document: dict | list) -> list[tuple[dict | list, str | int]]:
    """(holder, key) of everything in a document."""
    found = []
    for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


LIES: dict[str, Callable[[Random, Path], Told]] = {
    "swap": swap,
    "swap modules": swap_modules,
    "permute rows": permute,
    "swap nibbles": swap_nibbles,
    "double a scale": double,
    "next block scale": next_scale,
    "drop": drop,
    "add": add,
    "rename": rename,
    "config": config,
}
