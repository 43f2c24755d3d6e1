"""The order in which things reach the disk: what says that something is finished comes after it."""

import os
import shutil
from pathlib import Path

import pytest

import fp4cast
from fp4cast.checkpoints.byte_ranges import sync_path
from helpers import tree


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: ("sync", path) of a descriptor, ("rename", from, to), ("delete", path)."""
    seen = []
    fsync, replace, rename, rmtree = os.fsync, Path.replace, Path.rename, shutil.rmtree

    def synced(descriptor):
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        return fsync(descriptor)

    def replaced(self, to):
        seen.append(("rename", self, Path(to)))
        return replace(self, to)

    def renamed(self, to):
        seen.append(("rename", self, Path(to)))
        return rename(self, to)

    def deleted(path, *args, **options):
        seen.append(("delete", Path(path)))
        return rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", deleted)
    return seen


def first(events, *wanted):
    return next(i for i, event in enumerate(events) if event[0] == wanted[0] and all(w in str(event) for w in wanted))


def test_shards_before_their_notes_and_everything_before_dst(miniatures, tmp_path, events):
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", jobs=1)
    for shard in ("model-00001", "model-00002"):
        assert first(events, "sync", f"{shard}-of-00002.safetensors") < first(
            events, "rename", f"{shard}-of-00002.safetensors.done"
        )
    published = first(events, "rename", "'" + str(tmp_path / "dst") + "'")
    written = {path for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    before = {
        Path(str(event[1]).replace("/.dst.fp4cast/out", "/dst")) for event in events[:published] if event[0] == "sync"
    }
    assert written <= before, "every file"
    assert tmp_path / "dst" in before, "the directory that lists them"
    parent = next(i for i, event in enumerate(events) if event == ("sync", tmp_path))
    assert published < parent < first(events, "delete", ".dst.fp4cast")


def test_an_older_destination_is_deleted_when_the_new_one_is_on_the_disk(miniatures, converted, tmp_path, events):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    events.clear()
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", overwrite=True)
    assert events.index(("sync", tmp_path)) < first(events, "delete", ".dst.fp4cast")


def test_without_sync_nothing_waits(miniatures, converted, tmp_path, events):
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", sync=False)
    assert not [event for event in events if event[0] == "sync"]
    assert tree(tmp_path / "dst") == tree(converted["dense"])


def test_a_disk_that_fails_is_an_error_and_nothing_is_published(miniatures, tmp_path, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(fp4cast.errors.DestinationError, match="Input/output error"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_file_system_that_cannot_sync_directories_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    sync_path(tmp_path)
