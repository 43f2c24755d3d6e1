"""What the attacks change: every family's miniature, cut smaller, and what it is converted into, held in memory."""

import json
import re
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import attention
import fp4cast
from attacks.mutate_json import parse
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import INDEX, open_checkpoint
from fp4cast.checkpoints.header import METADATA, lay_out
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import targets_of
from fp4cast.miniatures.draft import VOCABULARY

_ROWS = 8  # that are left of embeddings
_FIRST_EXPERT = re.compile(r"\.experts\.0\.")
_TRAPS = re.compile(r"^mtp\.|\.engram\.")
_LAYER = re.compile(r"\b(?:layers|block)\.(\d+)\.")


@dataclass(frozen=True)
class Special:
    """Something in the place of a file that is no file with bytes.

    Attributes:
        kind: "fifo", "directory", "link" or "sparse".
        argument: where the link leads ("{outside}" is a file outside of the checkpoint), or the size.
    """

    kind: str
    argument: str = ""


Tree = dict[str, bytes | Special]  # by path, relative to the directory
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # (dtype, shape, data) by name


@dataclass(frozen=True)
class Start:
    """A checkpoint and its conversion.

    Attributes:
        name: kind, layout and activations.
        options: of `convert`.
        source: MXFP4.
        destination: NVFP4.
        modules: what is cast.
        slow: its configs hold expressions, for which a process is started.
    """

    name: str
    options: dict[str, object]
    source: Tree
    destination: Tree
    modules: tuple[str, ...] = field(repr=False)
    slow: bool


def decode(shard: bytes) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a well-formed shard; any exception for others."""
    length = int.from_bytes(shard[:8], "little")
    header = parse(shard[8 : 8 + length])
    metadata = header.pop(METADATA, {})
    table = {}
    for name, entry in header.items():
        if not all(type(size) is int for size in entry["shape"]):
            raise ValueError("a shape that is none")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        table[name] = (entry["dtype"], tuple(entry["shape"]), shard[begin:end])
    return table, metadata


def encode(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """A well-formed shard."""
    placed = lay_out(((name, dtype, shape) for name, (dtype, shape, _) in tensors.items()), metadata)
    order = sorted(tensors, key=placed.offsets.__getitem__)  # stable: empty tensors share an offset
    return placed.header + b"".join(tensors[name][2] for name in order)


def index_of(shards: dict[str, Tensors]) -> bytes:
    """The index of some shards."""
    total = sum(len(data) for tensors in shards.values() for _, _, data in tensors.values())
    weights = {name: file for file, tensors in shards.items() for name in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weights}).encode()


def read_tree(path: Path) -> Tree:
    """All files below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_tree(path: Path, tree: Tree) -> None:
    """A directory of plain files."""
    for name, data in tree.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def _cut(tree: Tree) -> Tree:
    """A miniature without its last layer and first experts, and with few rows of embeddings; its traps stay."""
    shards = {name: decode(data) for name, data in tree.items() if name.endswith(".safetensors") and "/" not in name}
    last = max(int(number) for tensors, _ in shards.values() for number in _LAYER.findall(" ".join(tensors)))
    small: dict[str, Tensors] = {}
    for file, (tensors, metadata) in shards.items():
        small[file] = {name: _few_rows(*tensor) for name, tensor in tensors.items() if _stays(name, last)}
        tree[file] = encode(small[file], metadata)
    return tree | {INDEX: index_of(small)}


def _stays(name: str, last: int) -> bool:
    if _TRAPS.search(name):
        return True
    layer = _LAYER.search(name)
    return not _FIRST_EXPERT.search(name) and not (layer and int(layer[1]) == last)


def _few_rows(dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    if shape[0] != VOCABULARY:
        return dtype, shape, data
    return dtype, (_ROWS, *shape[1:]), data[: len(data) * _ROWS // VOCABULARY]


@cache
def starts() -> tuple[Start, ...]:
    """Every kind of miniature with every target that it has, and one with attention in FP8."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = {kind: mini.make(kind, Path(scratch, "whole", kind)) for kind in mini.KINDS}
        whole["fp8"] = attention.kimi_k3(Path(scratch, "whole", "fp8"), widest=128)
        for kind, path in whole.items():
            tree, source = _cut(read_tree(path)), Path(scratch, kind)
            write_tree(source, tree)
            opened = read_source(open_checkpoint(source))
            for target in targets_of(opened.family)[: 1 if kind == "fp8" else None]:
                options: dict[str, object] = {"layout": target.layout.name, "activations": target.activations}
                if kind == "fp8":
                    options["fp8"] = "attention"
                if target.activations == "w4a4":
                    options["input_scales"] = 1.0
                name = f"{kind}-{target.layout.name}-{target.activations}"
                fp4cast.convert(source, Path(scratch, "out", name), jobs=1, **options)
                made = read_tree(Path(scratch, "out", name))
                slow = target.layout.name == "compressed-tensors" and b"re:" in tree["config.json"]
                found.append(Start(name, options, tree, made, tuple(opened.pairs), slow))
    return tuple(found)
