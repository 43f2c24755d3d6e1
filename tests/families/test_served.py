"""The rows that say who serves what: each has a source, and sentences are made of nothing else."""

import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from fp4cast.families.recognise import FAMILIES
from fp4cast.families.served import best_of_each_engine, rows_of, served_by, serving_command
from fp4cast.families.services import ANY_BANKS, SERVICES
from fp4cast.layouts.choose import choose_target, targets_of

ROOT = Path(__file__).parents[2]
OFFERED = {(family.served_as, target.layout.name): set() for family in FAMILIES for target in targets_of(family)}
for each in FAMILIES:
    for one in targets_of(each):
        OFFERED[each.served_as, one.layout.name].add(one.activations)
OFFERED[ANY_BANKS, "modelopt"] = {"w4a16", "w4a4"}
WITH_FP8 = [family for family in FAMILIES if family.attention]
OFFERED |= {(f"{family.name}+fp8", "modelopt"): set(family.activations) for family in WITH_FP8}


@pytest.mark.parametrize("row", SERVICES, ids=lambda row: f"{row.family}-{row.layout}-{row.release}-{row.verdict}")
def test_a_row_is_about_something_that_is_written_and_says_where_it_is_from(row):
    assert set(row.activations) <= OFFERED[row.family, row.layout]
    assert date(2026, 11, 1) <= date.fromisoformat(row.date) <= date(2036, 1, 1)
    if row.verdict == "open":
        assert not row.source
        assert row.why
        return
    assert row.version
    assert row.why or row.verdict != "fails"
    if row.seen:
        tests = re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", row.source)
        assert tests or "H200" in row.source
        assert all((ROOT / test).exists() for test in tests)
    else:  # a file, and its lines or a function
        assert row.verdict in ("should", "fails")
        for source in row.source.split("; "):
            assert re.fullmatch(r"[\w/]+\.py(:\d+-\d+(,\d+-\d+)*|( at [0-9a-f]{7})?: .+)", source), source


def test_what_was_run_is_not_read_and_what_was_read_does_not_serve():
    assert all(row.seen for row in SERVICES if row.verdict in ("serves", "loads"))


def test_every_target_has_a_row():
    for family in FAMILIES:
        for target in targets_of(family):
            assert rows_of(family.served_as, target.layout.name, target.activations)
            assert target.served == served_by(family.served_as, target.layout.name, target.activations)


@pytest.mark.parametrize("family", WITH_FP8, ids=lambda family: family.name)
def test_every_family_with_attention_in_fp8_has_an_engine_that_reads_it(family):
    for activations in family.activations:
        target = replace(choose_target(family, "modelopt", activations), fp8="attention")
        assert "vLLM 0.32.0" in target.served
        assert target.served == served_by(f"{family.name}+fp8", "modelopt", activations)


def test_a_sentence_takes_the_best_of_each_engine_and_never_what_is_open():
    w4a16, w4a4 = (served_by("gpt-oss", "modelopt", kind) for kind in ("w4a16", "w4a4"))
    assert w4a16.startswith("vLLM 0.26.0 + fp4cast.vllm (run), ")
    assert "open" not in {row.verdict for row in SERVICES if row.release in w4a16}
    assert re.search(r"; not TensorRT-LLM .*, vLLM 0\.33\.0, SGLang", w4a16)
    assert re.search(r"TensorRT-LLM 1\.2 and newer \(read\); not vLLM", w4a4)
    both = served_by("compressed-tensors", "modelopt", "w4a16")
    assert both.startswith("vLLM 0.26.0 (run), ")
    assert both.count("vLLM") == 1
    dense = served_by("compressed-tensors", "compressed-tensors", "w4a16")
    assert "transformers 5.23.0 (dense, loaded)" in dense
    assert "not transformers 5.23.0 (experts)" in dense
    assert served_by("nothing", "modelopt", "w4a4") == "no engine that we ran or read"
    assert [row.engine for row in best_of_each_engine("deepseek-v4")] == ["vLLM", "SGLang"]


def test_the_next_command_is_a_server_s_or_says_that_there_is_none():
    """In the engine of which most is known; transformers is no server."""
    assert serving_command("gpt-oss", "modelopt", "w4a16", "my dst") == (
        "vllm serve 'my dst'   # vLLM 0.26.0, with fp4cast installed beside it (run)"
    )
    assert serving_command("deepseek-v4", "modelopt", "w4a4", "d") == "vllm serve d   # vLLM 0.33.0 (read)"
    none = "no server that we ran or read serves this"
    assert serving_command(ANY_BANKS, "modelopt", "w4a4", "d").startswith(
        f"{none}; transformers 5.23.0 + fp4cast.hf loads"
    )
    assert serving_command("nothing", "modelopt", "w4a4", "d").startswith(f"{none}. ")
