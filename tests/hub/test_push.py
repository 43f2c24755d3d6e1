"""`push DST ORG/NAME` and `convert --push`: the conversion's own files, private, resumable, asked for."""

import json
import shutil

import pytest
from local_hub import TOKEN, Repo

from fp4cast.checkpoints.header import read_header
from fp4cast.hub.upload import find_place
from helpers import call, flip, plain, unnamed

# huggingface_hub hands an open file to its client as `data`, which that calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def token(hub, monkeypatch):  # noqa: ARG001, it takes any token away
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def dst(converted, tmp_path):
    """A copy of a conversion, with files beside it that are not the conversion's."""
    path = shutil.copytree(converted["moe"], tmp_path / "dst")
    (path / "notes.txt").write_text("mine")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_text("a tool's")
    return path


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("token")
def test_the_conversions_own_files_go_to_a_new_private_repository(hub, converted, dst):
    result = call("push", dst, "someone/model", "--yes", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert hub.pushed("someone/model") == contents(converted["moe"])
    assert hub.repos["someone/model"].private
    assert len(hub.repos["someone/model"].commits) == 1
    assert done["commit"] == hub.repos["someone/model"].sha
    assert done["page"] == f"{hub.url}/someone/model"
    assert not done["public"]
    assert (done["files"], done["bytes"]) == (
        len(contents(converted["moe"])),
        sum(map(len, contents(converted["moe"]).values())),
    )
    assert f"{done['files']} files, 2" in plain(result.stderr)
    assert contents(dst) == contents(converted["moe"]) | {"notes.txt": b"mine", ".cache/lock": b"a tool's"}


@pytest.mark.usefixtures("token")
def test_pushing_again_sends_nothing_and_commits_nothing(hub, dst):
    assert call("push", dst, "someone/model", "--yes").exit_code == 0
    hub.requests.clear()
    result = call("push", dst, "someone/model", "--yes")
    assert result.exit_code == 0, result.output
    assert not hub.asked("/upload/")
    assert not hub.asked("/commit/")
    assert "the private repository someone/model, whose files of the same names would be replaced" in plain(
        result.stderr
    )


@pytest.mark.usefixtures("token")
def test_an_interrupted_upload_goes_on(hub, converted, dst):
    hub.fault("PUT /upload/", "status", status=403, skip=1, times=9)
    result = call("push", dst, "someone/model", "--yes")
    assert result.exit_code == 1
    assert "someone/model: the Hub refuses: 403" in plain(result.stderr)
    assert not hub.pushed("someone/model")  # one commit: no half of a model is ever seen
    there = set(hub.stored)
    hub.faults.clear()
    hub.requests.clear()
    assert call("push", dst, "someone/model", "--yes").exit_code == 0
    assert hub.pushed("someone/model") == contents(converted["moe"])
    assert there
    assert not there & {request.path.rpartition("/")[2] for request in hub.asked("/upload/")}


@pytest.mark.usefixtures("token")
def test_public_must_be_said(hub, dst):
    hub.repos["someone/open"] = Repo()
    refused = call("push", dst, "someone/open", "--yes")
    assert refused.exit_code == 2
    assert "someone/open: exists and is public; pass --public to agree" in plain(refused.stderr)
    assert call("push", dst, "someone/open", "--yes", "--public").exit_code == 0
    assert call("push", dst, "someone/new", "--yes", "--public").exit_code == 0
    assert not hub.repos["someone/new"].private


@pytest.mark.usefixtures("token")
def test_nothing_is_uploaded_unasked(hub, dst):
    result = call("push", dst, "someone/model")
    assert result.exit_code == 2
    assert "would be uploaded to the new private repository someone/model. Pass --yes to agree" in plain(result.stderr)
    assert "someone/model" not in hub.repos


def test_without_a_token_it_says_how_to_log_in(hub, dst, monkeypatch):
    result = call("push", dst, "someone/model", "--yes", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)["error"]
    assert said["type"] == "DestinationError"
    assert said["message"].startswith("someone/model: there is no token for the Hub. Log in with `hf auth login`")
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    wrong = plain(call("push", dst, "someone/model", "--yes").stderr)
    assert "someone/model: the Hub refuses: " in wrong
    assert "hf auth login" in wrong


@pytest.mark.usefixtures("token")
def test_what_the_conversion_did_not_write_is_not_pushed(hub, miniatures, dst):
    flip(next(t for t in read_header(next(dst.glob("*.safetensors"))).tensors.values() if t.nbytes > 100), 50)
    damaged = call("push", dst, "someone/model", "--yes")
    assert damaged.exit_code == 1
    assert "files that are not as they were written: 1, the first is model-0000" in plain(damaged.stderr)
    assert "nothing was uploaded" in plain(damaged.stderr)
    foreign = call("push", miniatures["moe"], "someone/model", "--yes")
    assert "fp4cast.json: is missing, or lists no files; expected a checkpoint by fp4cast" in plain(foreign.stderr)
    (dst / "LICENSE").unlink()
    assert "LICENSE: is missing; its receipt lists it" in plain(call("push", dst, "someone/model", "--yes").stderr)
    assert "someone/model" not in hub.repos


@pytest.mark.usefixtures("token")
def test_an_edited_companion_is_pushed_as_it_is(hub, converted, tmp_path):
    dst = shutil.copytree(converted["moe"], tmp_path / "dst")
    (dst / "LICENSE").write_text("changed")  # a companion
    assert call("push", dst, "someone/model", "--yes").exit_code == 0
    assert hub.pushed("someone/model")["LICENSE"] == b"changed"


@pytest.mark.usefixtures("token")
def test_convert_pushes_what_it_has_compared(hub, miniatures, converted, tmp_path):
    hub.add("org/model", miniatures["moe"])
    result = call("convert", "org/model", tmp_path / "dst", "--stream", "--push", "someone/model", "--yes", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["exact"]
    assert done["pushed"]["repository"] == "someone/model"
    assert hub.pushed("someone/model") == contents(tmp_path / "dst")
    assert unnamed(tmp_path / "dst") == unnamed(converted["moe"])
    shown = plain(call("convert", miniatures["moe"], tmp_path / "dst", "--push", "someone/model", "--yes").stdout)
    assert f"pushed {hub.url}/someone/model" in shown
    assert "you and your organisation: the repository is private" in shown


@pytest.mark.usefixtures("token")
def test_a_push_that_fails_leaves_the_destination_and_says_how_to_go_on(hub, miniatures, tmp_path):
    hub.fault("POST /api/repos/create", "status", status=403)
    result = call("convert", miniatures["dense"], tmp_path / "dst", "--push", "someone/model", "--yes")
    assert result.exit_code == 1
    assert f"{tmp_path / 'dst'} is complete: `fp4cast push" in plain(result.stderr)
    assert (tmp_path / "dst" / "config.json").exists()


@pytest.mark.usefixtures("token")
def test_wrong_usage(hub, miniatures, dst, tmp_path):
    for more, words in (
        (["--push", "model"], "--push: expected a repository, ORG/NAME, got 'model'"),
        (["--public"], "--public belongs to --push ORG/NAME"),
        (["--push", "a/b", "--shards", "1/2"], "--shards publishes nothing; pass --push with --finish"),
    ):
        result = call("convert", miniatures["dense"], tmp_path / "other", *more)
        assert result.exit_code == 2
        assert words in plain(result.stderr)
    hub.close()
    offline = call("push", dst, "someone/model", "--yes")
    assert offline.exit_code == 1
    assert "someone/model: the Hub cannot be reached" in plain(offline.stderr)


def test_a_place_is_looked_at_and_not_made(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place = find_place("someone/model", public=False)
    assert (place.public, place.files) == (False, None)
    assert "someone/model" not in hub.repos
