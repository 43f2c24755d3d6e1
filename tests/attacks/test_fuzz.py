"""Twenty thousand mutated inputs end in a success or in an error that names the file; and a fault would be noticed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks import campaign
from attacks.campaign import judge_apart, run
from attacks.judge import Judge
from attacks.mutate import Input, make_input
from attacks.starts import Start, starts
from fp4cast.checkpoints import directory, header
from fp4cast.checkpoints.directory import CONFIG, INDEX
from fp4cast.checkpoints.header import DTYPE_BITS
from fp4cast.errors import CheckpointError
from fp4cast.verification import receipt

SHARE = 5000
SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("part", range(4))
def test_mutated_inputs_end_well(part):
    figures = run(0, range(part * SHARE, (part + 1) * SHARE), jobs=1)
    assert figures.inputs == SHARE
    assert not figures.findings, "\n".join(map(str, figures.findings.values()))
    for command in ("inspect", "verify", "convert"):
        for kind in ("success", "refusal"):  # neither may crowd out the other
            assert sum(n for key, n in figures.outcomes.items() if key[:2] == (command, kind)) > SHARE // 50


def test_an_input_is_made_from_its_seed_and_number_alone():
    for number in range(50):
        assert make_input(3, number) == make_input(3, number)
    assert make_input(3, 1) != make_input(4, 1)


# --- documents by hypothesis ------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**64]) | scalars
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F7"]) | scalars,
        "shape": st.lists(sizes, max_size=4) | scalars,
        "data_offsets": st.lists(sizes, max_size=3) | scalars,
    },
    optional={"x": scalars},
)
tables = st.dictionaries(
    st.sampled_from(["a.weight_packed", "a.weight_scale", "__metadata__", "", "\n"]), entries | documents
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("judge") / "scratch")


@pytest.fixture(scope="module")
def start() -> Start:
    return next(each for each in starts() if each.name == "dense-modelopt-w4a16")


def input_of(start, command, side, **files):
    sides = {"src": dict(start.source), "dst": dict(start.destination), "beside": {}}
    sides[side] |= files
    return Input(start, command, sides, start.options | {"sync": False})


many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(
    documents, st.sampled_from([CONFIG, INDEX, "hf_quant_config.json", "fp4cast.json"]), st.sampled_from(["src", "dst"])
)
def test_any_document_ends_well(judge, start, document, name, side):
    made = input_of(start, "verify", side, **{name: json.dumps(document).encode()})
    assert judge.judge(made).kind != "finding"


@many
@given(st.dictionaries(st.text(max_size=6), documents, max_size=4))
def test_any_entries_of_a_config_are_carried_along_or_refused(judge, start, more):
    config = json.loads(start.source[CONFIG]) | more
    outcome = judge.judge(input_of(start, "convert", "src", **{CONFIG: json.dumps(config).encode()}))
    assert outcome.kind != "finding"


@many
@given(tables, st.binary(max_size=16))
def test_any_table_of_a_header_ends_well(judge, start, table, data):
    raw = json.dumps(table).encode()
    made = input_of(start, "inspect", "src", **{SHARD: len(raw).to_bytes(8, "little") + raw + data})
    assert judge.judge(made).kind == "refusal"  # the index names other tensors


@many
@given(st.dictionaries(st.text(max_size=6), st.sampled_from([SHARD, "x.safetensors", "../x", "", CONFIG]) | scalars))
def test_any_map_of_an_index_ends_well(judge, start, weights):
    document = {"weight_map": json.loads(start.source[INDEX])["weight_map"] | weights}
    outcome = judge.judge(input_of(start, "inspect", "src", **{INDEX: json.dumps(document).encode()}))
    assert outcome.kind == ("refusal" if weights else "success")


# --- the judge --------------------------------------------------------------------------------------------------------


def _raise(error):
    def planted(*_):
        raise error

    return planted


def _write(path):
    (path.parent / "cache").write_text("x")
    return {}


PLANTED = {
    "another exception": (_raise(KeyError("x")), "KeyError at "),
    "a hang": (lambda _: time.sleep(60), "Hang at "),
    "a message without a name": (_raise(CheckpointError("it is broken")), "names no file: CheckpointError at "),
    "too much memory": (lambda _: {"x": bytearray(8 << 30)}, "MemoryError at "),
    "a file written": (_write, "inspect changes files"),
    "a file written anywhere": (lambda _: Path(os.devnull).write_text("x"), "writes: inspect"),
    "the end of the process": (lambda _: os._exit(3), "the process ends with 3"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_judge_notices(start, monkeypatch, what):
    planted, label = PLANTED[what]
    monkeypatch.setattr("attacks.judge.SECONDS", 0.3)
    monkeypatch.setattr(directory, "read_json", planted)
    outcome = judge_apart(input_of(start, "inspect", "src"))
    assert outcome.kind == "finding"
    assert outcome.label.startswith(label)


def test_a_hang_that_no_alarm_reaches_is_killed_and_the_rest_goes_on(monkeypatch):
    """As in C code: the signal is blocked."""

    def hangs(path):
        if planted:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)
        return header.Shard(path, {}, {}, 0)

    planted = True
    monkeypatch.setattr(campaign, "_KILL_SECONDS", 0.5)
    monkeypatch.setattr(directory, "read_header", hangs)
    number = next(n for n in range(100) if make_input(0, n).command == "inspect")
    figures = run(0, range(number, number + 1), jobs=1)
    (finding,) = figures.findings.values()
    assert (finding.label, finding.number, figures.inputs) == ("hangs outside of Python", number, 1)


def test_findings_of_one_cause_are_one_with_the_smallest_number(monkeypatch):
    monkeypatch.setattr(receipt, "read_json", _raise(KeyError("x")))
    monkeypatch.setattr("fp4cast.verification.receipt.Receipt.read", _raise(KeyError("x")))
    figures = run(0, range(400), jobs=2)
    assert {finding.command for finding in figures.findings.values()} <= {"verify", "convert"}
    first = min(finding.number for finding in figures.findings.values())
    assert judge_apart(make_input(0, first)).label in {finding.label for finding in figures.findings.values()}
    assert len(figures.findings) <= 4
    assert sum(finding.count for finding in figures.findings.values()) > len(figures.findings)


def test_the_scratch_directory_is_as_before_after_every_input(tmp_path):
    judge = Judge(tmp_path / "scratch")
    for number in range(200):
        judge.judge(make_input(5, number))
    for each in starts():
        for side, tree in (("src", each.source), ("dst", each.destination)):
            home = tmp_path / "scratch" / each.name / side
            assert (
                not home.exists()
                or {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}
                == tree
            )
    assert not list(Path(tmp_path, "scratch", "cwd").iterdir())
