"""A conversion by parts, as a job array runs it: the same bytes, in any order, at the same time, and nothing early."""

import json
import shutil
import subprocess
import sys

import pytest

from fp4cast.conversion import execute as executing
from fp4cast.conversion.job_array import convert_part, finish, parse_part
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.errors import DestinationError, UsageError
from helpers import call, lossy, tree


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "moe"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_in_any_order_give_the_same_bytes(miniatures, converted, tmp_path, kind, parts):
    options = {"activations": "w4a4", "input_scales": 1.0} if kind == "deepseek-v4" else {}
    written = []
    for part in reversed(range(1, parts + 1)):
        assert not (tmp_path / "dst").exists()
        assert not list(tmp_path.rglob("config.json"))
        done = convert_part(miniatures[kind], tmp_path / "dst", part, parts, ConvertOptions(**options))
        written += done.shards
        assert done.bytes == sum((tmp_path / ".dst.fp4cast" / "out" / f).stat().st_size for f in done.shards)
    report = finish(miniatures[kind], tmp_path / "dst", ConvertOptions(**options))
    assert report.exact
    assert report.verified
    assert sorted(written) == sorted(path.name for path in (tmp_path / "dst").glob("*.safetensors"))
    assert tree(tmp_path / "dst") == tree(converted[kind])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_parts_in_processes_at_the_same_time(miniatures, converted, tmp_path):
    command = [sys.executable, "-m", "fp4cast", "convert", miniatures["gpt-oss"], tmp_path / "dst", "--json"]
    both = [subprocess.Popen([*command, "--shards", f"{i}/2"], stdout=subprocess.PIPE, text=True) for i in (1, 2)]
    documents = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [(d["part"], d["parts"], len(d["shards"])) for d in documents] == [(1, 2, 1), (2, 2, 1)]
    last = subprocess.run([*command, "--finish"], capture_output=True, text=True, check=True)
    assert json.loads(last.stdout)["verified"]
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])


def test_figures_of_rounded_tensors_survive_the_parts(miniatures, tmp_path):
    from fp4cast import convert

    source = lossy(miniatures, tmp_path)
    whole = convert(source, tmp_path / "whole", inexact="nearest")
    for part in (1, 2):
        convert_part(source, tmp_path / "dst", part, 2, ConvertOptions(inexact="nearest"))
    assert finish(source, tmp_path / "dst", ConvertOptions(inexact="nearest")).facts() == whole.facts()
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_finish_names_the_missing_shards(miniatures, tmp_path):
    convert_part(miniatures["gpt-oss"], tmp_path / "dst", 2, 2)
    with pytest.raises(DestinationError, match=r"1 of 2 shards are not finished: model-00000-of-00002.safetensors"):
        finish(miniatures["gpt-oss"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_finish_before_any_part_leaves_the_plan_open(miniatures, tmp_path):
    with pytest.raises(DestinationError, match="no part has been written"):
        finish(miniatures["moe"], tmp_path / "dst", ConvertOptions(layout="compressed-tensors"))
    convert_part(miniatures["moe"], tmp_path / "dst", 1, 1)
    assert finish(miniatures["moe"], tmp_path / "dst").exact


def test_a_shard_of_another_plan_does_not_count(miniatures, tmp_path):
    convert_part(miniatures["moe"], tmp_path / "dst", 1, 1)
    for note in (tmp_path / ".dst.fp4cast").glob("*.done"):
        note.write_text(note.read_text().replace('"plan": "', '"plan": "0'))
    with pytest.raises(DestinationError, match="2 of 2 shards are not finished"):
        finish(miniatures["moe"], tmp_path / "dst")


def test_an_attempt_that_another_one_has_overtaken_is_no_error(miniatures, converted, tmp_path, monkeypatch):
    """A worker that was taken for dead: its successor finishes the shard, and clears its half-written file away."""
    write = executing.write_shard

    def overtaken(shard, path, *rest):
        tallies = write(shard, path, *rest)
        monkeypatch.setattr(executing, "write_shard", write)
        convert_part(miniatures["moe"], tmp_path / "dst", 1, 1)
        assert not path.exists()
        return tallies

    monkeypatch.setattr(executing, "write_shard", overtaken)
    convert_part(miniatures["moe"], tmp_path / "dst", 1, 1, jobs=1)
    finish(miniatures["moe"], tmp_path / "dst")
    assert tree(tmp_path / "dst") == tree(converted["moe"])


def test_parts_with_other_options_are_refused(miniatures, tmp_path):
    convert_part(miniatures["moe"], tmp_path / "dst", 1, 2)
    for other in ({"layout": "compressed-tensors"}, {"activations": "w4a4", "input_scales": 2.0}):
        with pytest.raises(DestinationError, match="other options"):
            convert_part(miniatures["moe"], tmp_path / "dst", 2, 2, ConvertOptions(**other))
        with pytest.raises(DestinationError, match="other options"):
            finish(miniatures["moe"], tmp_path / "dst", ConvertOptions(**other))


def test_a_part_that_is_run_again_keeps_what_it_has(miniatures, tmp_path):
    convert_part(miniatures["gpt-oss"], tmp_path / "dst", 1, 2)
    shard = tmp_path / ".dst.fp4cast" / "out" / "model-00000-of-00002.safetensors"
    before = shard.stat()
    convert_part(miniatures["gpt-oss"], tmp_path / "dst", 1, 2)
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_finish_carries_nothing_that_was_left_lying(miniatures, converted, tmp_path):
    for part in (1, 2):
        convert_part(miniatures["moe"], tmp_path / "dst", part, 2)
    (tmp_path / ".dst.fp4cast" / "out" / "stray.json").write_text("{}")
    finish(miniatures["moe"], tmp_path / "dst")
    assert tree(tmp_path / "dst") == tree(converted["moe"])


def test_a_whole_conversion_and_parts_exclude_each_other(miniatures, tmp_path):
    from fp4cast.conversion.staging import staging

    refused = pytest.raises(DestinationError, match="another fp4cast is writing it")
    with staging(miniatures["moe"], tmp_path / "dst", overwrite=False), refused:
        convert_part(miniatures["moe"], tmp_path / "dst", 1, 2)
    shutil.rmtree(tmp_path / ".dst.fp4cast")
    with staging(miniatures["moe"], tmp_path / "dst", overwrite=False, shared=True):
        convert_part(miniatures["moe"], tmp_path / "dst", 1, 2)
        with pytest.raises(DestinationError, match="another fp4cast is writing it"):
            finish(miniatures["moe"], tmp_path / "dst")


def test_an_existing_destination_is_replaced_only_when_that_is_asked_for(miniatures, converted, tmp_path):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    with pytest.raises(DestinationError, match="--overwrite"):
        convert_part(miniatures["moe"], tmp_path / "dst", 1, 1)
    convert_part(miniatures["moe"], tmp_path / "dst", 1, 1, overwrite=True)
    assert tree(tmp_path / "dst") == tree(converted["dense"])
    finish(miniatures["moe"], tmp_path / "dst", overwrite=True)
    assert tree(tmp_path / "dst") == tree(converted["moe"])


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2", "1/9999999"])
def test_what_is_no_part(text):
    with pytest.raises(UsageError, match="a part is written i/n"):
        parse_part(text)


def test_what_parts_cannot_be_combined_with(miniatures, tmp_path):
    for options in (
        ["--shards", "1/2", "--finish"],
        ["--shards", "1/2", "--resume"],
        ["--finish", "--resume"],
        ["--shards", "1/2", "--engine", "ray"],
        ["--shards", "1/2", "--no-verify"],
        ["--shards", "3/2"],
    ):
        assert call("convert", miniatures["moe"], tmp_path / "dst", *options).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_person_is_told_what_comes_next(miniatures, tmp_path):
    said = call("convert", miniatures["moe"], tmp_path / "dst", "--shards", "1/2")
    assert said.exit_code == 0
    assert "wrote part 1 of 2" in said.stdout
    assert "--finish" in said.stdout
    assert call("convert", miniatures["moe"], tmp_path / "dst", "--shards", "2/2").exit_code == 0
    assert "exact" in call("convert", miniatures["moe"], tmp_path / "dst", "--finish").stdout
