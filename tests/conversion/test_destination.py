"""What is the user's is never replaced: only what a receipt accounts for, and never what holds more than DST."""

import json
import os
import shutil
from pathlib import Path

import pytest

import fp4cast
from fp4cast.checkpoints.file_system import exchange
from fp4cast.conversion.destination import foreign_files, mount_points
from fp4cast.errors import DestinationError
from fp4cast.verification.receipt import Receipt
from helpers import call, interrupted, tree


@pytest.fixture
def destination(converted, tmp_path):
    return Path(shutil.copytree(converted["dense"], tmp_path / "dst"))


def refused(miniatures, destination, match, **options):
    before = tree(destination)
    with pytest.raises(DestinationError, match=match):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True, **options)
    assert tree(destination) == before
    assert not list(destination.parent.glob(".*.fp4cast"))


def test_what_fp4cast_wrote_is_accounted_for(converted):
    for path in converted.values():
        assert list(foreign_files(path, Receipt.read(path))) == []
        listed = json.loads((path / "fp4cast.json").read_text())["files"]
        assert sorted([*listed, "fp4cast.json"]) == sorted(tree(path))


def test_a_folder_of_other_models_is_refused(miniatures, tmp_path):
    (tmp_path / "models" / "mymodel").mkdir(parents=True)
    for i in range(7):
        (tmp_path / "models" / "mymodel" / f"weights-{i}.safetensors").write_bytes(b"precious")
    five = r"did not write: mymodel/weights-0\.safetensors, .*weights-4\S+, \.\.\.; move them away"
    refused(miniatures, tmp_path / "models", five)


def test_the_working_directory_is_refused(miniatures, tmp_path, monkeypatch):
    (tmp_path / "mymodel").mkdir()
    (tmp_path / "mymodel" / "weights.safetensors").write_bytes(b"precious")
    monkeypatch.chdir(tmp_path)
    result = call("convert", miniatures["dense"], ".", "--overwrite")
    assert result.exit_code == 1
    assert "holds the working directory" in result.stderr
    assert (tmp_path / "mymodel" / "weights.safetensors").read_bytes() == b"precious"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refused(miniatures, tmp_path / "empty", "holds the working directory")


@pytest.mark.parametrize("where", [".", ".."])
def test_the_home_directory_and_what_holds_it_are_refused(miniatures, destination, monkeypatch, where):
    home = destination / "me" if where == ".." else destination
    monkeypatch.setattr(Path, "home", lambda: home)
    refused(miniatures, destination, "holds the home directory")


def test_a_file_beside_ours_is_named(miniatures, destination):
    (destination / "notes.txt").write_text("my measurements")
    refused(miniatures, destination, "did not write: notes.txt")


@pytest.mark.parametrize("kind", ["link", "link to a folder", "empty folder", "pipe", "link in the place of a file"])
def test_links_folders_and_pipes_are_not_ours(miniatures, destination, tmp_path, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "LICENSE").write_text("x")
    if kind == "link":
        (destination / "mine").symlink_to(tmp_path / "precious" / "LICENSE")
    elif kind == "link to a folder":
        (destination / "mine").symlink_to(tmp_path / "precious")
    elif kind == "empty folder":
        (destination / "mine").mkdir()
    elif kind == "pipe":
        os.mkfifo(destination / "mine")
    else:
        (destination / "LICENSE").unlink()
        (destination / "LICENSE").symlink_to(tmp_path / "precious" / "LICENSE")
    with pytest.raises(DestinationError, match=r"did not write: (mine|LICENSE)"):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert (tmp_path / "precious" / "LICENSE").read_text() == "x"


@pytest.mark.parametrize("receipt", [None, "{", "[]", "{}", '{"files": 3}', '{"files": ["fp4cast.json"]}'])
def test_without_a_receipt_that_lists_them_files_are_not_ours(miniatures, destination, receipt):
    if receipt is None:
        (destination / "fp4cast.json").unlink()
    else:
        (destination / "fp4cast.json").write_text(receipt)
    refused(miniatures, destination, "did not write|receipt cannot be read")


def test_the_error_for_foreign_files_does_not_recommend_to_overwrite_them(miniatures, destination):
    with pytest.raises(DestinationError, match="pass --overwrite"):
        fp4cast.convert(miniatures["dense"], destination, layout="compressed-tensors")
    (destination / "notes.txt").write_text("x")
    with pytest.raises(DestinationError, match="holds files") as caught:
        fp4cast.convert(miniatures["dense"], destination, layout="compressed-tensors")
    assert "--overwrite" not in str(caught.value)


def test_a_file_that_appears_meanwhile_is_kept(miniatures, destination, monkeypatch):
    publish = fp4cast.conversion.staging.Staging.publish

    def meddle(self, *args, **options):
        (destination / "notes.txt").write_text("just now")
        return publish(self, *args, **options)

    monkeypatch.setattr("fp4cast.conversion.staging.Staging.publish", meddle)
    with pytest.raises(DestinationError, match=r"did not write: notes\.txt"):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert (destination / "notes.txt").read_text() == "just now"


def test_at_every_moment_there_is_one_destination(miniatures, destination, monkeypatch):
    """Of all system calls that rename, only the exchange touches DST."""
    if not exchange_works(destination.parent):
        pytest.skip("this file system cannot exchange two paths")
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: pytest.fail("renamed") if self == destination else rename(self, to)
    )
    fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert sorted(path.name for path in destination.parent.iterdir()) == ["dst"]


def exchange_works(directory):
    a, b = directory / "a", directory / "b"
    a.mkdir()
    (a / "inside").touch()
    b.mkdir()
    done = exchange(a, b)
    assert (b / "inside").exists() == done
    shutil.rmtree(a)
    shutil.rmtree(b)
    return done


def test_what_does_not_exist_cannot_be_exchanged(tmp_path):
    (tmp_path / "a").mkdir()
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").exists()


def test_an_interrupted_overwrite_keeps_the_older_destination(miniatures, destination):
    before = tree(destination)
    interrupted(miniatures["dense"], destination, 0.5, overwrite=True)
    assert tree(destination) == before
    assert fp4cast.convert(miniatures["dense"], destination, overwrite=True, resume=True).exact


def test_a_folder_that_cannot_be_listed_is_not_ours(miniatures, destination, monkeypatch):
    """Its files were lost with the older destination."""
    (destination / "mine").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("/mine"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DestinationError, match="cannot be examined: Permission denied"):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True)


def test_shards_of_another_size_and_a_changed_receipt_are_not_replaced(miniatures, destination):
    shard = next(destination.glob("*.safetensors"))
    before = shard.read_bytes()
    shard.write_text("mine")
    refused(miniatures, destination, rf"changed since fp4cast wrote them: {shard.name}")
    shard.write_bytes(before)
    receipt = destination / "fp4cast.json"
    receipt.write_text(receipt.read_text().replace('"exact": true', '"exact": null'))
    refused(miniatures, destination, r"changed since fp4cast wrote them: fp4cast\.json")


def test_a_mount_of_the_same_file_system_is_seen(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text("36 35 98:0 /a /mnt/with\\040space rw - ext4 /dev/root rw\n")
    assert mount_points(table) == {"/mnt/with space"}
    assert mount_points(tmp_path / "missing") == set()


def test_a_user_without_a_home_may_convert(miniatures, converted, tmp_path, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", unknown)
    (tmp_path / "dst").mkdir()
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact
    assert tree(tmp_path / "dst") == tree(converted["dense"])
