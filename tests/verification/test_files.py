"""`verify DST`: a copy is what was written, or the file that is not is named; no source is needed."""

import json
import os
import shutil

import pytest

import fp4cast
from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.errors import CheckpointError
from fp4cast.verification.files import verify_files
from helpers import call


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted["moe"], tmp_path / "dst")


def test_every_conversion_is_as_written(converted):
    for path in converted.values():
        report = verify_files(path)
        assert (report.ok, report.differences) == (True, ())
        listed = sum(
            p.stat().st_size
            for p in path.rglob("*")
            if p.is_file() and not is_card_file(p.name) and p.name != "fp4cast.json"
        )
        assert report.bytes == listed


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_flip_anywhere_is_found_and_named(copy, jobs):
    for path in sorted(p for p in copy.rglob("*") if p.is_file() and not is_card_file(p.name)):
        before = path.read_bytes()
        for at in {0, len(before) // 2, len(before) - 1}:
            path.write_bytes(before[:at] + bytes([before[at] ^ 0x10]) + before[at + 1 :])
            try:
                names = [each.name for each in verify_files(copy, jobs=jobs, strict=True).differences]
            except CheckpointError as error:  # the receipt is no JSON, or lists nothing
                names = [path.name] if path.name == "fp4cast.json" and str(path) in str(error) else []
            assert str(path.relative_to(copy)) in names, (path.name, at)
        path.write_bytes(before)
    assert verify_files(copy).ok


def test_missing_shortened_and_added_files_are_named(copy):
    shards = sorted(copy.glob("*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], 100)
    (copy / "extra.safetensors").write_bytes(b"x")
    (copy / "config.json").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x").write_bytes(b"x")
    report = verify_files(copy)
    found = {each.name: each.detail for each in report.differences}
    assert found == {
        shards[0].name: "is missing",
        shards[1].name: f"expected {len_of(copy, shards[1].name)} bytes, got 100",
        "config.json": "is missing",
        "extra.safetensors": "is not among the files that the conversion wrote",
        "pytorch_model.bin": "is not among the files that the conversion wrote, and holds weights in another format",
    }
    assert not report.ok
    assert {each.area for each in report.differences} == {"weights", "documents", "companions"}


def len_of(copy, name):
    return json.loads((copy / "fp4cast.json").read_text())["files"][name]["bytes"]


def test_people_edit_the_card_and_companions_count_under_strict_alone(copy):
    (copy / "README.md").write_text("mine")
    assert verify_files(copy, strict=True).ok
    (copy / "LICENSE").write_text("mine")
    report = verify_files(copy)
    assert (report.ok, [each.name for each in report.differences]) == (True, ["LICENSE"])
    assert not verify_files(copy, strict=True).ok


def test_without_a_receipt_there_is_nothing_to_check(copy):
    (copy / "fp4cast.json").unlink()
    with pytest.raises(CheckpointError, match=r"fp4cast\.json: is missing.*verify SRC DST"):
        verify_files(copy)
    (copy / "fp4cast.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lists no files"):
        verify_files(copy)


def test_a_listed_fifo_or_device_is_not_read(copy):
    (copy / "LICENSE").unlink()
    os.mkfifo(copy / "LICENSE")
    assert [each.detail for each in verify_files(copy).differences if each.name == "LICENSE"] == ["is missing"]


@pytest.mark.parametrize("change", ["facts", "key"])
def test_a_receipt_whose_facts_or_keys_were_changed_is_found(miniatures, copy, change):
    """F3: `exact`, counts and names were believed; a flip in a key switched a check off."""
    text = (copy / "fp4cast.json").read_text()
    old, new = {"facts": ('"exact": true', '"exact": false'), "key": ('"files"', '"eiles"')}[change]
    assert old in text
    (copy / "fp4cast.json").write_text(text.replace(old, new, 1))
    report = fp4cast.verify(miniatures["moe"], copy)
    assert not report.ok
    assert "fp4cast.json" in {each.name for each in report.differences}


def test_the_command_line(copy):
    result = call("verify", copy)
    assert result.exit_code == 0
    assert "as written" in result.stdout
    document = json.loads(call("verify", copy, "--json").stdout)
    assert (document["ok"], document["receipt"]["exact"], document["differences"]) == (True, True, [])
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")
    result = call("verify", copy)
    assert result.exit_code == 1
    assert f"damaged {copy}" in result.stdout
    assert shard.name in result.stdout


EXTRA = ["original/model.bin", "sub/pytorch_model.bin", "sub/model.safetensors", "sub/model.safetensors.index.json"]


def test_both_ways_of_verifying_name_the_same_extra_files(miniatures, copy):
    for name in EXTRA:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x")
    found = fp4cast.verify(miniatures["moe"], copy, strict=True)
    assert {each.name for each in found.differences} == set(EXTRA)
    assert {each.name for each in verify_files(copy, strict=True).differences} == set(EXTRA)
    assert verify_files(copy).to_json()["verdicts"] == {"weights": False, "documents": True, "companions": False}


def test_a_receipt_that_cannot_be_read_leaves_the_verdict_on_the_weights(miniatures, copy):
    (copy / "fp4cast.json").write_text("{")
    report = fp4cast.verify(miniatures["moe"], copy)
    assert [each.name for each in report.differences] == ["fp4cast.json"]
    assert report.exact and not report.wrong("weights")


@pytest.mark.parametrize("nbytes", [10**400, -1, 1.5, True, None])
def test_sizes_that_no_file_has_are_not_believed(copy, nbytes):
    document = json.loads((copy / "fp4cast.json").read_text())
    document["files"]["LICENSE"]["bytes"] = nbytes
    (copy / "fp4cast.json").write_text(json.dumps(document))
    assert "fp4cast.json" in {each.name for each in verify_files(copy).differences}


def test_a_receipt_at_the_limit_of_nesting_is_an_error(copy):
    for depth in (900, 960, 972, 980, 990, 2000):
        (copy / "fp4cast.json").write_text(
            '{"files": {"LICENSE": {"bytes": 1, "xxh3": "'
            + "0" * 32
            + '"}}, "x": '
            + "[" * depth
            + "]" * depth
            + ', "digest": ""}'
        )
        try:
            assert not verify_files(copy).ok
        except CheckpointError as error:
            assert "fp4cast.json" in str(error)
