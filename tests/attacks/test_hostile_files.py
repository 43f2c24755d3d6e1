"""Hostile files, one for each trick that `test_header`, `test_directory` and `test_hostile` do not hold.

Each is judged in a process of its own: it ends within seconds, in little memory, in a success or in an error that names
the file, and nothing is written (see `attacks.judge`).
"""

import json

import pytest

from attacks.campaign import judge_apart
from attacks.mutate import Input
from attacks.mutate_json import nested
from attacks.starts import Special, decode, encode, index_of, starts
from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, RECEIPT

BRACKETS = nested(100_000, "[")
NAN, INFINITY = float("nan"), float("inf")
MEMORY = 64 << 20  # the checkpoints are far smaller
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD = "lm_head.weight"  # in TWO
NORM = "model.layers.0.input_layernorm.weight"  # in ONE
DOWN = "model.layers.0.mlp.down_proj.weight_packed"  # in ONE
START = next(each for each in starts() if each.name == "dense-modelopt-w4a16")


def judge(command, side, change):
    """The outcome of a command on a checkpoint of which one side was changed."""
    sides = {"src": dict(START.source), "dst": dict(START.destination), "beside": {}}
    change(sides[side])
    return judge_apart(Input(START, command, sides, START.options | {"sync": False}), MEMORY)


def document(name, change):
    """Change a JSON document."""

    def apply(tree):
        table = json.loads(tree[name])
        change(table)
        tree[name] = json.dumps(table).encode()

    return apply


def text(name, old, new):
    """Replace some text of a file, and keep a shard's length of the header true."""

    def apply(tree):
        data = tree[name]
        if name.endswith(".json"):
            assert old.encode() in data
            tree[name] = data.replace(old.encode(), new.encode(), 1)
            return
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].decode()
        assert old in header
        raw = header.replace(old, new, 1).encode()
        tree[name] = len(raw).to_bytes(8, "little") + raw + data[8 + length :]

    return apply


def entry(name, **keys):
    """Change keys of a tensor's entry in the header of ONE."""

    def apply(tree):
        data = tree[ONE]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[name] |= keys
        raw = json.dumps(header).encode()
        tree[ONE] = len(raw).to_bytes(8, "little") + raw + data[8 + length :]

    return apply


def tensors(change):
    """Change tensors, and write shards and index that are consistent."""

    def apply(tree):
        shards = {name: decode(tree[name])[0] for name in (ONE, TWO)}
        change(shards)
        tree.update({name: encode(table, {"format": "pt"}) for name, table in shards.items()})
        tree[INDEX] = index_of(shards)

    return apply


def put(name, data):
    return lambda tree: tree.__setitem__(name, data)


def links(name, target):
    return put(name, Special("link", target))


def prefix(length):
    return lambda tree: tree.__setitem__(ONE, length.to_bytes(8, "little") + tree[ONE][8:])


def utf_16(tree):
    tree[INDEX] = tree[INDEX].decode().encode("utf-16")


def in_file(file):
    """Say in the index that HEAD is in another file."""
    return document(INDEX, lambda index: index["weight_map"].update({HEAD: file}))


def moved(tree):
    """A gap of two bytes in front of all tensors is closed by one of that size, so that floats are misaligned."""
    data = tree[TWO]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, each in header.items():
        if name != "__metadata__":
            each["data_offsets"] = [offset + 1 for offset in each["data_offsets"]]
    header["odd"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    raw = json.dumps(header).encode()
    tree[TWO] = len(raw).to_bytes(8, "little") + raw + b"\0" + data[8 + length :]
    document(INDEX, lambda index: index["weight_map"].update(odd=TWO))(tree)


def alias(tree):
    """Two names for one shard."""
    links("model-00003-of-00002.safetensors", ONE)(tree)
    document(INDEX, lambda index: index["weight_map"].update({NORM: "model-00003-of-00002.safetensors"}))(tree)


# What is changed in the source, and the error's class and message of every command.
REFUSED = {
    # header lies
    "a length of 2^64 - 1": (prefix(2**64 - 1), "HeaderError", "claims 18446744073709551615 bytes"),
    "a length of 2^63": (prefix(2**63), "HeaderError", "claims 9223372036854775808 bytes"),
    "a length of 0": (prefix(0), "HeaderError", "not valid JSON"),
    "a length that leaves the tensors out": (prefix(2), "HeaderError", "not valid JSON"),
    "a sparse shard of 1 TiB": (put(ONE, Special("sparse", str(1 << 40))), "HeaderError", "not valid JSON"),
    # offsets
    "negative offsets": (entry(NORM, data_offsets=[-128, 0]), "HeaderError", "two sizes"),
    "offsets of 2^63": (entry(NORM, data_offsets=[2**63, 2**63 + 128]), "HeaderError", "two sizes"),
    "offsets of 2^64": (entry(NORM, data_offsets=[2**64, 2**64 + 128]), "HeaderError", "two sizes"),
    "offsets beyond the file": (entry(NORM, data_offsets=[2**62, 2**62 + 128]), "HeaderError", "leaves a hole"),
    "a number of 5,000 digits": (text(ONE, "[0,", f"[{'1' * 5000},"), "HeaderError", "not valid JSON"),
    # shapes
    "a shape of 2^62 twice": (entry(NORM, shape=[2**62, 2**62]), "HeaderError", "takes"),
    "codes of no elements": (
        tensors(
            lambda shards: shards[ONE].update(
                {DOWN: ("U8", (2**40, 0), b""), DOWN.replace("packed", "scale"): ("U8", (2**40, 0), b"")}
            )
        ),
        "ShapeError",
        "is empty",
    ),
    # NaN and Infinity
    "a shape of NaN": (entry(NORM, shape=[NAN]), "HeaderError", "list of sizes"),
    "offsets of Infinity": (entry(NORM, data_offsets=[0, INFINITY]), "HeaderError", "two sizes"),
    "a header that is NaN": (put(ONE, (3).to_bytes(8, "little") + b"NaN"), "HeaderError", "must be a JSON object"),
    "a config that is Infinity": (put(CONFIG, b"Infinity"), "CheckpointError", "expected a JSON object"),
    "a weight_map of NaN": (document(INDEX, lambda i: i.update(weight_map=NAN)), "IndexFileError", "non-empty"),
    # bombs
    "an index of brackets": (put(INDEX, b"[" * 1_000_000), "CheckpointError", "not valid JSON"),
    "an entry of brackets": (text(ONE, '{"dtype"', BRACKETS + ',{"dtype"'), "HeaderError", "not valid JSON"),
    "a sparse index of 1 TiB": (put(INDEX, Special("sparse", str(1 << 40))), "CheckpointError", "at most"),
    "an index of another encoding": (utf_16, "CheckpointError", "JSON"),
    # files in the place of others
    "an index that is a pipe": (put(INDEX, Special("fifo")), "CheckpointError", "not a regular file"),
    "an index that is a directory": (put(INDEX, Special("directory")), "CheckpointError", "not a regular file"),
    "an index that links to a device": (links(INDEX, "/dev/zero"), "CheckpointError", "outside of the checkpoint"),
    "an index that links to itself": (links(INDEX, INDEX), "CheckpointError", INDEX),
    "a config that is a directory": (put(CONFIG, Special("directory")), "CheckpointError", "not a regular file"),
    "a config that links to itself": (links(CONFIG, CONFIG), "CheckpointError", CONFIG),
    "a config that links to the shard": (links(CONFIG, ONE), "CheckpointError", "not valid JSON"),
    "a shard that is a pipe": (put(ONE, Special("fifo")), "IndexFileError", "missing"),
    "a shard that is a directory": (put(ONE, Special("directory")), "IndexFileError", "missing"),
    "a shard that links to a device": (links(ONE, "/dev/zero"), "IndexFileError", "missing"),
    "a shard that links to itself": (links(ONE, ONE), "IndexFileError", "missing"),
    "a shard that links to nothing": (links(ONE, "nothing"), "IndexFileError", "missing"),
    "a shard that is another file": (links(ONE, "{outside}"), "CheckpointError", "outside of the checkpoint"),
    # the index
    "a shard that is listed under two names": (alias, "IndexFileError", "in this file, but"),
    "a tensor in two shards": (
        lambda t: t.update({TWO: encode(decode(t[TWO])[0] | {NORM: decode(t[ONE])[0][NORM]}, {})}),
        "IndexFileError",
        "in this file, but",
    ),
    "a tensor that is listed twice": (
        text(INDEX, '"weight_map": {', f'"weight_map": {{"{HEAD}": "{TWO}", '), None, ""
    ),
    "a tensor that is listed twice, in two files": (
        text(INDEX, f'"{HEAD}": "{TWO}"', f'"{HEAD}": "{TWO}", "{HEAD}": "{ONE}"'), "IndexFileError", "is not in"
    ),
    "a separator in a file's name": (in_file(f"x/{TWO}"), "IndexFileError", "same directory"),
    "a line break in a file's name": (in_file("x\n.safetensors"), "IndexFileError", "missing"),
    "a file's name of 1 MB": (in_file("x" * 10**6 + ".safetensors"), "IndexFileError", "at most"),
}  # fmt: skip


@pytest.mark.parametrize("trick", REFUSED)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_source_is_refused(command, trick):
    change, error, message = REFUSED[trick]
    outcome = judge(command, "src", change)
    assert (outcome.kind, outcome.late) == ("refusal" if error else "success", ""), outcome
    assert outcome.label == error or not error
    assert message in outcome.detail
    assert outcome.seconds < 2


def renamed(new):
    """Call a tensor that is copied something else."""
    return tensors(lambda shards: shards[TWO].update({new: shards[TWO].pop(HEAD)}))


# What no command refuses: `convert` makes and verifies a checkpoint that is exact.
ACCEPTED = {
    "misaligned tensors": moved,
    "a shape of no elements": tensors(lambda shards: shards[ONE].update(empty=("F32", (2**62, 0, 2**62), b""))),
    "a name with separators": renamed("../../../tmp/x"),
    "an absolute name": renamed("/etc/passwd"),
    "a name with control characters": renamed("\x1b[31m\r\n\0\x7f"),
    "a name of right-to-left marks": renamed("\u202elm\u200b_head"),
    "a name of 4,096 characters": renamed("é" * 4096),
    "a config with NaN": document(CONFIG, lambda c: c.update(limit=[0.0, INFINITY], x=-INFINITY)),
    "a companion that is a pipe": put("tokenizer.json", Special("fifo")),
    "a companion that links to itself": links("tokenizer.json", "tokenizer.json"),
    "a companion that links to a device": links("tokenizer.json", "/dev/zero"),
    "a companion that links to a folder": links("tokenizer", "/proc"),
    "a folder that links to its parent": links("encoding2", "."),
    "a card of brackets": put("README.md", b"---\nx: " + b"[" * 60_000 + b"\n---\n"),
    "a card that multiplies itself": put(
        "README.md",
        b"---\na: &a [x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b"*%c, " % (n - 1) * 9) for n in range(98, 122))
        + b"---\n",
    ),
    "a card that makes objects": put("README.md", b"---\nlicense: !!python/object/apply:os.system [exit]\n---\n"),
    "a card of other keys": put(
        "README.md", b"---\nself: 1\n1: 2\nignore_metadata_errors: 3\nmodel-index: 4\ntags: 5\n---\n"
    ),
    "a card of 1 MB without an end": put("README.md", b"---\n" + b"a: b\n" * 200_000),
    "a card in another encoding": put("README.md", b"---\nlicense: \xff\xfe\n---\n\0"),
    "a card that is a device": links("README.md", "/dev/zero"),
    "a card that is a pipe": put("README.svg", Special("fifo")),
}


@pytest.mark.parametrize("trick", ACCEPTED)
def test_a_source_is_converted(trick):
    outcome = judge("convert", "src", ACCEPTED[trick])
    assert (outcome.kind, outcome.label) == ("success", "exact"), outcome


DIFFERENT = {
    "a receipt of NaN": document(RECEIPT, lambda r: r.update(inexact=[{"name": NORM, "rounded_half_blocks": NAN}])),
    "a receipt that announces 10^400 rounded values": document(
        RECEIPT, lambda r: r.update(inexact=[{"name": NORM, "rounded_half_blocks": 10**400}])
    ),
    "a total_size of NaN": document(INDEX, lambda i: i["metadata"].update(total_size=NAN)),
    "a companion that links to a device": links("LICENSE", "/dev/zero"),
    "a companion that is a pipe": put("LICENSE", Special("fifo")),
    "a companion that links to itself": links("LICENSE", "LICENSE"),
    "a companion that is a directory": put("LICENSE", Special("directory")),
    "a receipt that is a pipe": put(RECEIPT, Special("fifo")),
    "a receipt of brackets": put(RECEIPT, b"[" * 1_000_000),
    "a sparse receipt of 1 TiB": put(RECEIPT, Special("sparse", str(1 << 40))),
}


@pytest.mark.parametrize("trick", DIFFERENT)
def test_a_destination_that_is_verified(trick):
    outcome = judge("verify", "dst", DIFFERENT[trick])
    assert outcome.kind == "success", outcome
    assert outcome.seconds < 2


UNREADABLE = {
    "an hf_quant_config.json that is a pipe": (put(QUANT_CONFIG, Special("fifo")), "not a regular file"),
    "an hf_quant_config.json of NaN": (put(QUANT_CONFIG, b"NaN"), "expected a JSON object"),
    "a shard that links to a device": (links(ONE, "/dev/zero"), "missing"),
    "a config that links out": (links(CONFIG, "{outside}"), "outside of the checkpoint"),
}


@pytest.mark.parametrize("trick", UNREADABLE)
def test_a_destination_that_is_refused(trick):
    change, message = UNREADABLE[trick]
    outcome = judge("verify", "dst", change)
    assert outcome.kind == "refusal", outcome
    assert message in outcome.detail


@pytest.mark.parametrize("depth", [100, 300, 500, 900, 980, 2000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_config_of_any_depth_ends_well(command, opening, depth):
    """Both sides are as deep, so that they are compared."""
    deep = f'{{"x": {nested(depth, opening)}, '.encode()
    sides = {"src": dict(START.source), "dst": dict(START.destination), "beside": {}}
    for side in ("src", "dst"):
        sides[side][CONFIG] = deep + sides[side][CONFIG].lstrip(b"{ \n")
    outcome = judge_apart(Input(START, command, sides, START.options | {"sync": False}), MEMORY)
    assert (outcome.kind in ("success", "refusal"), outcome.late) == (True, ""), outcome


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", [RECEIPT, QUANT_CONFIG, "x.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(name, layout):
    sides = {"src": START.source | {f"{name}/x": b"x"}, "dst": {}, "beside": {}}
    outcome = judge_apart(Input(START, "convert", sides, {"layout": layout}), MEMORY)
    assert (outcome.label, outcome.late) == ("CheckpointError", ""), outcome
    assert f"src/{name}: is a folder; expected a file of that name" in outcome.detail
