"""What is finished is kept, checked and said; what is complete is a success; what is odd is set aside and said."""

import json
import logging
import os
import shutil

import pytest

import fp4cast
from fp4cast.conversion import convert as converting
from fp4cast.conversion import execute as executing
from fp4cast.conversion import job_array, staging, working_directory
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.errors import DestinationError, UsageError, VerificationError
from fp4cast.verification.receipt import sealed
from helpers import call, edit, interrupted, lossy, older, tree

FIRST = "model-00000-of-00002.safetensors"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def destination(miniatures, tmp_path):
    """An interrupted conversion of gpt-oss: one of two shards is finished."""
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", 0.7)
    return tmp_path / "dst"


@pytest.fixture
def state(destination):
    return destination.parent / ".dst.fp4cast"


@pytest.fixture
def written(monkeypatch):
    """The shards that are written from now on."""
    files, write = [], executing.write_shard
    monkeypatch.setattr(executing, "write_shard", lambda s, *rest: (files.append(s.file), write(s, *rest))[1])
    return files


@pytest.mark.parametrize("verify", [True, False])
def test_the_same_command_goes_on_and_says_so(miniatures, converted, destination, written, caplog, verify):
    report = fp4cast.convert(miniatures["gpt-oss"], destination, verify=verify)
    assert written == ["model-00001-of-00002.safetensors"]
    assert tree(destination) == tree(converted["gpt-oss"])
    assert [record.getMessage() for record in caplog.records] == [
        f"{destination.parent}/.dst.fp4cast: shards kept from an earlier run: 1; --restart begins anew"
    ]
    assert report.notes == ("1 of 2 shards had been finished before, and were kept",)
    sizes = [(path / written[0]).stat().st_size for path in (miniatures["gpt-oss"], destination)]
    assert report.bytes == {"read": sizes[0], "written": sizes[1]}
    assert names(destination.parent) == ["dst"]


def test_restart_begins_anew(miniatures, converted, destination, written):
    fp4cast.convert(miniatures["gpt-oss"], destination, restart=True)
    assert len(written) == 2
    assert tree(destination) == tree(converted["gpt-oss"])
    with pytest.raises(UsageError, match="pass one"):
        fp4cast.convert(miniatures["gpt-oss"], destination, restart=True, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_finished_shards_of_other_options_are_not_lost(miniatures, destination, state, resume):
    before = tree(state)
    with pytest.raises(DestinationError, match=r"other options.*--restart") as caught:
        fp4cast.convert(miniatures["gpt-oss"], destination, resume=resume, activations="w4a4", input_scales=1.0)
    assert tree(state) == before
    assert not hasattr(caught.value, "__notes__")  # the same command would fail again


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("where", ["header", "tail", "size", "link", "folder", "missing"])
def test_a_damaged_shard_is_written_again(miniatures, converted, destination, state, caplog, where, verify):
    """G1, G5: also a header that no reader takes, and where nothing is verified."""
    shard = state / "out" / FIRST
    data = shard.read_bytes()
    if where == "header":
        shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif where == "tail":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif where == "size":
        shard.write_bytes(data[:-1])
    else:
        shard.unlink()
        if where == "link":
            (state.parent / "elsewhere").write_bytes(data)
            shard.symlink_to(state.parent / "elsewhere")
        elif where == "folder":
            shard.mkdir()
    if where == "folder":
        with pytest.raises(DestinationError, match=FIRST):
            fp4cast.convert(miniatures["gpt-oss"], destination, verify=verify)
        return
    fp4cast.convert(miniatures["gpt-oss"], destination, verify=verify)
    assert tree(destination) == tree(converted["gpt-oss"])
    assert any(f"{FIRST}" in text and text.endswith("it was written again") for text in caplog.messages)
    if where == "link":
        assert (state.parent / "elsewhere").read_bytes() == data


NOTES = [b"", b"{", b"[]", b"\xff", b"[" * 5000, b"null", b'{"plan": 1}']


@pytest.mark.parametrize("note", NOTES, ids=repr)
def test_a_damaged_note_is_no_note(miniatures, converted, destination, state, caplog, note):
    (state / f"{FIRST}.done").write_bytes(note)
    fp4cast.convert(miniatures["gpt-oss"], destination, verify=False)
    assert tree(destination) == tree(converted["gpt-oss"])
    assert any(text.endswith("is damaged; it was written again") for text in caplog.messages)


def test_an_edited_note_is_found_by_its_digest_or_by_what_is_measured(miniatures, tmp_path):
    """G3: a note that claims another count ended in a receipt that claims it, too."""
    source = lossy(miniatures, tmp_path)
    state = tmp_path / ".dst.fp4cast"
    with pytest.raises(KeyboardInterrupt):
        fp4cast.convert(source, tmp_path / "dst", inexact="nearest", jobs=1, progress=stop_at("verify"))
    notes = {path: json.loads(path.read_bytes()) for path in state.glob("*.done")}
    note, document = next(
        (path, document)
        for path, document in notes.items()
        if any(tally["rounded"] for tally in document["tallies"].values())
    )
    (tally,) = (each for each in document["tallies"].values() if each["rounded"])
    before, tally["rounded"] = tally["rounded"], 5
    note.write_text(json.dumps(document))
    fp4cast.convert(source, tmp_path / "dst", inexact="nearest")  # written again
    shutil.rmtree(tmp_path / "dst")
    with pytest.raises(KeyboardInterrupt):
        fp4cast.convert(source, tmp_path / "dst", inexact="nearest", jobs=1, progress=stop_at("verify"))
    (tally,) = (each for each in document["tallies"].values() if each["rounded"])
    tally["rounded"], tally["shifted"] = before, tally["shifted"] + 1
    del document["digest"]
    note.write_text(json.dumps(sealed(document)))  # a forger, not a disk
    with pytest.raises(VerificationError, match=r"fp4cast\.json: says"):
        fp4cast.convert(source, tmp_path / "dst", inexact="nearest")
    assert not (tmp_path / "dst").exists()


def stop_at(phase):
    """For one job. "verify": of the last shard."""
    written = 0

    def progress(now, nbytes, total):
        nonlocal written
        written += nbytes if now == "write" else 0
        if now == phase and (phase != "verify" or written * 2 > total):  # `total` is of both sides
            raise KeyboardInterrupt

    return progress


# --- complete destinations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"resume": True, "overwrite": True}, {"verify": False}])
def test_a_complete_destination_is_a_success(miniatures, converted, tmp_path, written, options):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    before = tree(tmp_path)
    report = fp4cast.convert(miniatures["dense"], tmp_path / "dst", **options)
    assert (report.exact, report.verified, report.bytes["written"], written) == (True, True, 0, [])
    assert report.notes[-1].startswith("it was complete already")
    assert tree(tmp_path) == before


def test_a_complete_destination_whose_card_was_edited_is_a_success(miniatures, converted, tmp_path):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    (tmp_path / "dst" / "README.md").write_text("mine")
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact
    assert (tmp_path / "dst" / "README.md").read_text() == "mine"


def test_a_damaged_destination_is_no_success_and_is_mended_only_when_told(miniatures, converted, tmp_path):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    shard = next((tmp_path / "dst").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(DestinationError, match=r"was written with these options, but .*--overwrite"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", resume=True)
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst", resume=True, overwrite=True).bytes["written"]
    assert tree(tmp_path / "dst") == tree(converted["dense"])


def test_another_model_of_the_same_shapes_is_not_complete(miniatures, converted, tmp_path):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    shutil.copytree(converted["dense"], tmp_path / "dst")
    edit(source, "model.layers.0.mlp.down_proj.weight_packed", lambda data: data.__setitem__(5, data[5] ^ 1))
    with pytest.raises(DestinationError, match="--overwrite"):
        fp4cast.convert(source, tmp_path / "dst")


def test_what_a_killed_run_left_after_it_published_is_removed(miniatures, converted, tmp_path, monkeypatch):
    """G6: killed between the rename that publishes and the removal of the working directory."""
    monkeypatch.setattr("fp4cast.conversion.staging.remove", lambda _: None)
    fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert (tmp_path / ".dst.fp4cast").exists()
    monkeypatch.undo()
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact
    assert names(tmp_path) == ["dst"]
    assert tree(tmp_path / "dst") == tree(converted["dense"])


def test_a_disk_that_does_not_confirm_the_rename(miniatures, converted, tmp_path, monkeypatch):
    sync = staging.sync_path

    def fail(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(staging, "sync_path", fail)
    with pytest.raises(
        DestinationError, match=r"dst: is complete, but its disk does not say so: Input/output"
    ) as caught:
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert not hasattr(caught.value, "__notes__")
    monkeypatch.undo()
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").bytes["written"] == 0
    assert names(tmp_path) == ["dst"]
    assert tree(tmp_path / "dst") == tree(converted["dense"])


@pytest.mark.parametrize("by", ["convert", "finish"])
def test_a_run_that_another_one_overtakes_is_a_success(miniatures, converted, tmp_path, monkeypatch, by):
    """It looked for DST before the other had published it, and took the lock after that."""
    module = converting if by == "convert" else job_array
    enter = module.staging

    def overtaken(*args, **kwargs):
        shutil.copytree(converted["dense"], tmp_path / "dst")
        return enter(*args, **kwargs)

    monkeypatch.setattr(module, "staging", overtaken)
    report = getattr(module, by)(miniatures["dense"], tmp_path / "dst")
    assert (report.exact, report.bytes["written"], report.destination) == (True, 0, str(tmp_path / "dst"))
    assert names(tmp_path) == ["dst"]


def test_finish_on_a_complete_destination_is_a_success(miniatures, tmp_path):
    job_array.convert_part(miniatures["dense"], tmp_path / "dst", 1, 1)
    job_array.finish(miniatures["dense"], tmp_path / "dst")
    assert job_array.finish(miniatures["dense"], tmp_path / "dst", ConvertOptions()).bytes["written"] == 0


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_a_working_directory_that_cannot_be_removed_is_said(miniatures, tmp_path, monkeypatch, caplog):
    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("fp4cast.conversion.working_directory.shutil.rmtree", refuse)
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact
    assert "could not be removed (Read-only file system); `rm -r " in caplog.messages[-1]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "dst")
    fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert names(tmp_path) == ["dst"]  # the next run removes it


def test_nothing_finished_leaves_nothing(miniatures, tmp_path, monkeypatch):
    """H7, G8: a refusal, a failure before the first shard is finished, a lost race."""
    monkeypatch.setattr("fp4cast.conversion.staging.FREE_MARGIN", 1 << 60)
    with pytest.raises(DestinationError, match="are needed there"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert names(tmp_path) == []
    monkeypatch.undo()
    interrupted(miniatures["dense"], tmp_path / "dst", 0.01)
    assert names(tmp_path) == []

    def lose(*args):
        shutil.copytree(older({"dense": args[0]}, tmp_path / "winner"), tmp_path / "dst")
        raise DestinationError("lost")

    monkeypatch.setattr("fp4cast.conversion.staging.check_destination", lambda *_, **__: lose(miniatures["dense"]))
    with pytest.raises(Exception, match=r"lost|No such file"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert not (tmp_path / ".dst.fp4cast").exists()


def test_a_part_that_fails_leaves_the_others_work(miniatures, tmp_path):
    lock = working_directory.enter(miniatures["dense"], tmp_path / "dst", shared=True)
    try:
        with pytest.raises(DestinationError, match="are needed there"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("fp4cast.conversion.staging.FREE_MARGIN", 1 << 60)
            job_array.convert_part(miniatures["dense"], tmp_path / "dst", 1, 1)
        assert (tmp_path / ".dst.fp4cast").exists()
    finally:
        lock.release()


def test_nobody_else_may_enter_the_working_directory(state):
    assert state.stat().st_mode & 0o777 == 0o700


def test_ctrl_c_names_what_is_left_and_how_to_delete_it(miniatures, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        fp4cast.convert(miniatures["dense"], tmp_path / "it's", jobs=1, progress=stop_at("verify"))
    (note,) = caught.value.__notes__
    assert "2 finished shards (0.00 GB) in" in note
    assert note.endswith(f"""rm -r '{tmp_path}/.it'"'"'s.fp4cast'""")


def test_ctrl_c_before_anything_is_finished_says_so(miniatures, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", progress=stop_at("write"))
    assert caught.value.__notes__ == ["No shard was finished; nothing is left; the same command begins anew."]
    assert names(tmp_path) == []


def test_the_type_of_an_error_is_one_that_is_documented(miniatures, destination):
    result = call(
        "convert", miniatures["gpt-oss"], destination, "--json", "--activations", "w4a4", "--input-scales", "1"
    )
    assert json.loads(result.stdout)["error"]["type"] == "DestinationError"


def test_the_command_line_says_what_was_kept(miniatures, destination):
    result = call("convert", miniatures["gpt-oss"], destination)
    assert result.exit_code == 0
    assert "shards kept from an earlier run: 1" in result.stderr
    assert "1 of 2 shards had been finished before" in result.stdout
    assert logging.getLogger("fp4cast").handlers == []
    assert "complete already" in call("convert", miniatures["gpt-oss"], destination).stdout


# --- what was lost, or written twice ----------------------------------------------------------------------------------


def test_an_older_destination_that_was_moved_aside_survives_an_empty_one(miniatures, converted, tmp_path, monkeypatch):
    """A job script may begin with `mkdir -p`; the only copy was deleted then."""
    (tmp_path / ".dst.fp4cast").mkdir()
    (tmp_path / ".dst.fp4cast" / "lock").touch()
    older(converted, tmp_path / ".dst.fp4cast" / "old")
    (tmp_path / "dst").mkdir()
    monkeypatch.setattr("fp4cast.conversion.convert.execute", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", overwrite=True)
    assert (tmp_path / "dst" / "LICENSE").read_text() == "older"


def test_two_older_destinations_are_the_users_to_choose_from(miniatures, converted, tmp_path):
    (tmp_path / ".dst.fp4cast").mkdir()
    (tmp_path / ".dst.fp4cast" / "lock").touch()
    older(converted, tmp_path / ".dst.fp4cast" / "old")
    older(converted, tmp_path / "dst")
    with pytest.raises(DestinationError, match="move one of them away"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", overwrite=True)
    assert (tmp_path / ".dst.fp4cast" / "old" / "LICENSE").read_text() == "older"


@pytest.mark.parametrize("name", ["config.json", "out", "lock"])
def test_foreign_files_under_our_names_are_not_ours(miniatures, tmp_path, name):
    state = tmp_path / ".dst.fp4cast"
    (state / "out").mkdir(parents=True)
    (state / name).touch() if name != "out" else (state / "out" / "notes").touch()
    (state / ("out" if name == "out" else ".") / "thesis.txt").write_text("years")
    with pytest.raises(DestinationError, match="did not write"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert [path.read_text() for path in tmp_path.rglob("thesis.txt")] == ["years"]


def test_a_kill_between_exchange_and_removal_is_no_reason_to_write_again(miniatures, converted, tmp_path, monkeypatch):
    destination = older(converted, tmp_path / "dst")
    monkeypatch.setattr("fp4cast.conversion.staging.remove", lambda _: None)
    fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    monkeypatch.undo()
    report = fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert report.bytes["written"] == 0
    assert names(tmp_path) == ["dst"]


def test_finish_with_overwrite_may_be_repeated(miniatures, tmp_path):
    job_array.convert_part(miniatures["dense"], tmp_path / "dst", 1, 1, overwrite=True)
    assert job_array.convert_part(miniatures["dense"], tmp_path / "dst", 1, 1, overwrite=True).kept == 2
    job_array.finish(miniatures["dense"], tmp_path / "dst", overwrite=True)
    assert job_array.finish(miniatures["dense"], tmp_path / "dst", overwrite=True).bytes["written"] == 0


def test_a_companion_that_changes_meanwhile_costs_no_finished_shard(miniatures, tmp_path, monkeypatch):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    write = staging.Staging.write_receipt

    def meddle(stage, *args):
        write(stage, *args)
        (source / "LICENSE").write_text("x" * (source / "LICENSE").stat().st_size)

    monkeypatch.setattr(staging.Staging, "write_receipt", meddle)
    with pytest.raises(VerificationError, match="LICENSE"):
        fp4cast.convert(source, tmp_path / "dst")
    monkeypatch.undo()
    assert fp4cast.convert(source, tmp_path / "dst").notes[0].startswith("2 of 2 shards")


def test_an_interruption_leaves_no_unfinished_shard(state):
    assert not list(state.glob("*.partial"))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_destination_is_read_only_where_it_holds_regular_files(miniatures, converted, tmp_path, kind):
    shutil.copytree(converted["dense"], tmp_path / "dst")
    (tmp_path / "dst" / "config.json").unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / "dst" / "config.json")
    else:
        (tmp_path / "dst" / "config.json").symlink_to("/dev/zero")
    with pytest.raises(DestinationError, match=r"did not write: config\.json"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
