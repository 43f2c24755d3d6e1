"""A fast, seeded mutator of small checkpoints that are held in memory.

An input is made from its seed and its number alone, on every machine the same. Some changes keep shards and index
consistent, so that they reach what comes after the checks of headers; the others are for these checks.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attacks import mutate_json
from attacks.mutate_bytes import change_bytes
from attacks.mutate_tensors import change_tensors
from attacks.starts import Special, Start, Tree, starts
from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, RECEIPT

# How many inputs of a hundred go to each command.
SHARES = {"inspect": 50, "verify": 35, "convert": 15}
SCALES = "scales.json"
_DOCUMENTS = (CONFIG, CONFIG, INDEX, QUANT_CONFIG, RECEIPT, "generation_config.json")
_SLOW_SHARE = 0.1  # of the inputs for which a process is started
_NAMES = (
    "model.safetensors", "model-00003-of-00002.safetensors", "a\nb.safetensors", "\x1b[31m.safetensors",
    "é.safetensors",
    "\udcff.safetensors", "x" * 240 + ".safetensors", "x.safetensors", ".safetensors", "pytorch_model.bin",
    "model.gguf", "model.bin", "tokenizer.json", "modeling_x.py", "encoding/x.py", ".hidden", "config.json.lock",
    "x.done", "x.partial", "lock", "plan", "out", " ", "-", "*", "README.md", "\udcff", "x" * 255,
    CONFIG, INDEX, QUANT_CONFIG, RECEIPT,
)  # fmt: skip
_LINKS = (
    "{self}", "{outside}", "/dev/zero", "/dev/null", "/dev/tty", ".", "..", "/", "/proc/self/mem", "no such file",
    CONFIG, INDEX, "model.safetensors", "LICENSE", "encoding",
)  # fmt: skip


@dataclass
class Input:
    """One input of the program.

    Attributes:
        start: what it was made from.
        command: inspect, verify or convert.
        sides: the trees: "src", "dst" and, for input scales, "beside".
        options: of `convert`.
        steps: what was done to it, for people.
    """

    start: Start
    command: str
    sides: dict[str, Tree]
    options: dict[str, object] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)


def make_input(seed: int, number: int) -> Input:
    """The input of that number."""
    rng = random.Random(f"{seed}:{number}")  # noqa: S311
    command = rng.choices(list(SHARES), list(SHARES.values()))[0]
    start = rng.choice(starts())
    while start.slow and command != "inspect" and rng.random() > _SLOW_SHARE:
        start = rng.choice(starts())
    made = Input(start, command, {"src": dict(start.source), "dst": dict(start.destination), "beside": {}})
    if command == "convert":
        made.options = dict(start.options) | {"inexact": rng.choice(("fail", "nearest")), "sync": False}
        if made.options["activations"] == "w4a4" and rng.random() < 0.3:
            made.sides["beside"][SCALES] = json.dumps(dict.fromkeys(start.modules, 3.5)).encode()
    while not made.steps or rng.random() < 0.4:
        side = _side(rng, made)
        way = rng.choices(list(_WAYS), list(_WAYS.values()))[0]
        made.steps.append(f"{side}: {way(rng, made.sides[side])}")
    return made


def _side(rng: random.Random, made: Input) -> str:
    if made.sides["beside"] and rng.random() < 0.7:
        return "beside"
    return "dst" if made.command == "verify" and rng.random() < 0.65 else "src"


def _pick(rng: random.Random, tree: Tree, *, shards: bool = False) -> str:
    """The name of a file with bytes; "" if there is none."""
    names = [name for name, data in tree.items() if isinstance(data, bytes)]
    names = [name for name in names if name.endswith(".safetensors") and "/" not in name] if shards else names
    return rng.choice(names) if names else ""


def _document(rng: random.Random, tree: Tree) -> str:
    """Change a JSON document."""
    name = rng.choice((*_DOCUMENTS, SCALES) if SCALES not in tree else (SCALES,))
    data = tree.get(name)
    try:
        document: Any = mutate_json.parse(data) if isinstance(data, bytes) else {}
    except ValueError:
        document = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = mutate_json.change(rng, document)
    text = mutate_json.write(document)
    encoding = "utf-8" if rng.random() < 0.98 else rng.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1"))
    tree[name] = text.encode(encoding, "ignore")
    return f"change {name}"


def _header(rng: random.Random, tree: Tree) -> str:
    """Change a shard's header, and often its length accordingly."""
    name = _pick(rng, tree, shards=True)
    data = tree.get(name, b"")
    length = int.from_bytes(data[:8], "little")
    try:
        header = mutate_json.parse(data[8 : 8 + length])
    except ValueError:
        return _bytes(rng, tree)
    for _ in range(rng.choice((1, 1, 2))):
        header = mutate_json.change(rng, header)
    raw = mutate_json.write(header).encode(errors="ignore")
    claimed = (
        len(raw) if rng.random() < 0.9 else rng.choice((0, 1, length, len(raw) + 8, 2**31, 10**8, 2**63, 2**64 - 1))
    )
    tree[name] = claimed.to_bytes(8, "little") + raw + data[8 + length :]
    return f"change the header of {name}"


def _tensors(rng: random.Random, tree: Tree) -> str:
    try:
        return change_tensors(rng, tree)
    except (ValueError, LookupError, TypeError, AttributeError):
        return _bytes(rng, tree)  # an earlier step has left no shards to decode


def _bytes(rng: random.Random, tree: Tree) -> str:
    name = _pick(rng, tree)
    if not name:
        return "nothing is left to change"
    other = tree[_pick(rng, tree)]
    tree[name] = change_bytes(rng, tree[name], other)
    return f"change bytes of {name}"


def _names(rng: random.Random, tree: Tree) -> str:
    """Rename, delete, copy or exchange files."""
    name, new = _pick(rng, tree), rng.choice(_NAMES)
    way = rng.choice(("rename", "delete", "copy", "exchange", "add"))
    if not name or (new in ("out", "plan") and new in tree):
        return "nothing is left to rename"
    if way == "delete":
        del tree[name]
    elif way == "rename":
        tree[new] = tree.pop(name)
    elif way == "copy":
        tree[new] = tree[name]
    elif way == "exchange":
        other = _pick(rng, tree)
        tree[name], tree[other] = tree[other], tree[name]
    else:
        tree[new] = rng.randbytes(rng.randrange(40))
    return f"{way} {name!r} ({new!r})"


def _special(rng: random.Random, tree: Tree) -> str:
    """Put what is no file in the place of one."""
    name = rng.choice(list(tree)) if tree and rng.random() < 0.8 else rng.choice(_NAMES)
    kind = rng.choice(("fifo", "directory", "link", "link", "sparse"))
    argument = rng.choice(_LINKS).replace("{self}", name.rpartition("/")[2]) if kind == "link" else ""
    if kind == "sparse":  # nobody may read so much, nor copy it
        mine = name.endswith(".safetensors") or name in (CONFIG, INDEX, QUANT_CONFIG, RECEIPT, SCALES)
        argument = str(rng.choice((1 << 30, 1 << 40)) if mine else 1 << 16)
    tree[name] = Special(kind, argument)
    return f"{kind} {argument} in the place of {name!r}"


_WAYS: dict[Callable[[random.Random, Tree], str], int] = {
    _document: 30, _header: 20, _tensors: 28, _bytes: 10, _names: 7, _special: 5,
}  # fmt: skip
