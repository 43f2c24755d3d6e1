"""JSON from outside is bounded before it is parsed, and the largest real files are far inside the bounds."""

import json
import subprocess
import sys

import pytest

from fp4cast.checkpoints.directory import gc_paused
from fp4cast.checkpoints.header import read_header
from fp4cast.checkpoints.json_files import DOCUMENT, read_json
from fp4cast.checkpoints.raw_header import HEADER
from fp4cast.errors import CheckpointError, HeaderError

NAME = "language_model.model.layers.{}.block_sparse_moe.experts.{}.w1.weight_packed"
SIGN = "\U0001f600"  # with one such sign in it, a text takes four bytes a character


def shard(path, text, nbytes=0):
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))
    return path


EXCESSES = {
    "objects": ('{"a": [' + "{}," * 1_100_000 + "{}]}", "1100003 objects and arrays; at most 1000000 are read"),
    "keys": ('{"a": {' + '"":0,' * 2_100_000 + '"":0}}', "2100002 keys; at most 2000000 are read"),
    "values": ('{"a": [' + "0," * 4_100_000 + "0]}", "4100001 values; at most 4000000 are read"),
    "bytes": ('{"a": "' + "x" * (129 << 20) + '"}', f"{(129 << 20) + 9} bytes; at most {128 << 20} are read"),
}


@pytest.mark.parametrize("what", EXCESSES)
def test_documents_have_bounds_that_the_message_names(tmp_path, what):
    text, message = EXCESSES[what]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: has {message}"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [' + "[]," * 3_100_000 + "[]]}", "3100003 objects and arrays; at most 3001000 are read"),
        ('{"a": {' + '"":0,' * 4_100_000 + '"":0}}', "4100002 keys; at most 4001000 are read"),
        ('{"a": [' + "0," * 8_100_000 + "0]}", "8100001 values; at most 8000000 are read"),
    ],
    ids=["arrays", "keys", "values"],
)
def test_headers_have_bounds_that_the_message_names(tmp_path, text, message):
    with pytest.raises(HeaderError, match=rf"x\.safetensors: the header has {message}"):
        read_header(shard(tmp_path / "x.safetensors", text))


def test_an_index_of_half_a_million_tensors_is_read(tmp_path):
    """As Kimi-K3's; an indented one."""
    weights = {NAME.format(i // 5000, i % 5000): f"model-{i // 5000:05}-of-00096.safetensors" for i in range(500_000)}
    (tmp_path / "index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}, indent=2))
    assert len(read_json(tmp_path / "index.json")["weight_map"]) == 500_000


def test_the_receipt_of_a_quarter_of_a_million_rounded_tensors_is_read(tmp_path):
    facts = {"rounded_half_blocks": 12345, "max_abs_error": 0.0123456789, "mse": 1.23456789e-8, "snr_db": 43.21098765}
    inexact = [{"name": NAME.format(i // 5000, i % 5000)} | facts for i in range(250_000)]
    (tmp_path / "fp4cast.json").write_text(json.dumps({"inexact": inexact}, indent=2))
    assert len(read_json(tmp_path / "fp4cast.json")["inexact"]) == 250_000


def test_a_header_of_half_a_million_tensors_is_read(tmp_path):
    entry = '"{}":{{"dtype":"U8","shape":[1,1,1,1],"data_offsets":[{},{}]}}'
    text = ",".join(entry.format(NAME.format(i // 5000, i % 5000), i, i + 1) for i in range(500_000))
    with gc_paused():
        assert len(read_header(shard(tmp_path / "x.safetensors", "{" + text + "}", 500_000)).tensors) == 500_000


def document(path):
    """The largest in memory that the bounds were seen to admit: 1.15 GB while it is parsed."""
    parts = [f'"{i:07}{SIGN}":[{i}.5,"{i}{SIGN}"]' for i in range(995_000)]
    parts += [f'"{i:07}{SIGN}":{i}.5' for i in range(1_000_000, 1_990_000)]
    text = ",".join(parts)
    path.write_text("{" + text + ',"x":"' + "x" * (DOCUMENT.nbytes - len(text.encode()) - 10) + '"}')


def header(path):
    """The same of a header: 1.5 GB, then it is refused."""
    text = ",".join(f'"{i:07x}":{i}.5' for i in range(3_990_000))
    shard(path, "{" + text + f',"x":"{SIGN}' + "x" * (HEADER.nbytes - len(text) - 100) + '"}')


WORST = {"document": (document, "read_json", 1400, "read"), "header": (header, "read_header", 1800, "HeaderError")}


@pytest.mark.parametrize("kind", WORST)
def test_the_worst_that_is_parsed_takes_bounded_memory(tmp_path, kind):
    make, function, megabytes, outcome = WORST[kind]
    make(tmp_path / "worst")
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)\n"
        "from fp4cast.checkpoints.header import read_header\n"
        "from fp4cast.checkpoints.json_files import read_json\n"
        f"try: {function}(Path(sys.argv[1])); print('read')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    command = [sys.executable, "-c", code, tmp_path / "worst"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == outcome, done.stderr
