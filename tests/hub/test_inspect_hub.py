"""`inspect ORG/NAME`: headers and scales by range requests, and nothing more; the same answer as of the directory."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import snapshot_download
from local_hub import TOKEN

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import CheckpointError, HeaderError, UnsupportedError
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import targets_of
from fp4cast.layouts.layout import castable
from fp4cast.miniatures import KINDS
from helpers import call, plain

BODIES = "/resolve/|/storage/"


def answers(info):
    """Everything that does not depend on where the checkpoint lies."""
    document = info.to_json()
    sizes = {name: size for name, size in document["bytes"].items() if name != "downloaded"}
    return document | {"source": "", "bytes": sizes}


def needed(path):
    """Bytes of config, index, headers and scales."""
    checkpoint = open_checkpoint(path)
    documents = [path / "config.json", path / "model.safetensors.index.json"]
    headers = sum(shard.size - sum(t.nbytes for t in shard.tensors.values()) for shard in checkpoint.shards.values())
    scales = sum(pair.scales.nbytes for pair in cast_in(path))
    return sum(document.stat().st_size for document in documents if document.exists()) + headers + scales


def cast_in(path):
    """The pairs that a conversion casts."""
    source = read_source(open_checkpoint(path))
    return castable(source, targets_of(source.family)[0]).cast


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_the_hub_is_inspected_as_its_directory_is(hub, miniatures, kind):
    commit = hub.add("org/model", miniatures[kind])
    info = fp4cast.inspect("org/model")
    assert answers(info) == answers(fp4cast.inspect(miniatures[kind]))
    assert info.source == f"org/model@{commit}"
    assert info.bytes["downloaded"] == hub.sent(BODIES) < info.bytes["source"] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_headers_and_scales_are_read_once_and_nothing_else(hub, plain_miniatures, tmp_path, kind):
    hub.add("org/model", plain_miniatures[kind])
    info = fp4cast.inspect("org/model")
    assert info.bytes["downloaded"] == hub.sent(BODIES) == needed(plain_miniatures[kind])
    assert all(request.ranged for request in hub.asked(BODIES))
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_neighbours_are_read_together_and_the_storage_is_asked_directly(hub, plain_miniatures):
    hub.add("org/model", plain_miniatures["deepseek-v4"])
    fp4cast.inspect("org/model", jobs=1)
    shards = open_checkpoint(plain_miniatures["deepseek-v4"]).shards
    assert len(hub.asked("/resolve/.*safetensors$")) == len(shards)  # later ranges need no redirect
    scales = len(cast_in(plain_miniatures["deepseek-v4"]))
    assert len(hub.asked("/storage/")) <= 2 * len(shards) + scales


def test_broken_connections_and_busy_servers_are_waited_for(hub, miniatures, monkeypatch):
    waits = []
    monkeypatch.setattr("fp4cast.hub.client.time", SimpleNamespace(sleep=waits.append))
    hub.add("org/model", miniatures["moe"])
    hub.fault("/storage/", "cut", times=2)
    hub.fault("/resolve/.*safetensors ", "status", status=429, headers={"Retry-After": "7"})
    hub.fault("/storage/", "status", status=503, headers={}, skip=4)
    hub.fault("/storage/", "status", status=403, headers={}, skip=8)  # a signed address has expired
    info = fp4cast.inspect("org/model")
    assert answers(info) == answers(fp4cast.inspect(miniatures["moe"]))
    assert len(waits) == 5
    assert {0.0, 1.0, 7.0} <= set(waits) <= {0.0, 1.0, 2.0, 4.0, 7.0}
    assert info.bytes["downloaded"] == hub.sent(BODIES)


def test_what_cannot_be_read_is_named_with_its_range(hub, miniatures):
    commit = hub.add("org/model", miniatures["moe"])
    hub.fault("/storage/.*00001-of", "status", status=503, times=99)
    expected = (
        rf"org/model@{commit}/model-00001-of-00002.safetensors, bytes 0 to 7: could not be read in 6 attempts.*503"
    )
    with pytest.raises(CheckpointError, match=expected):
        fp4cast.inspect("org/model")


def test_a_file_that_changes_is_not_mixed_with_what_it_was(hub, miniatures, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    hub.add("org/model", source)
    shard = source / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    hub.fault("/storage/.*00001-of", "swap", data=data + b"more", skip=3)
    with pytest.raises(CheckpointError, match=r"00001-of.*: expected bytes .*, got bytes .*: the file has changed"):
        fp4cast.inspect("org/model")


def test_contents_of_the_same_size_are_told_apart_by_their_tag(hub, miniatures):
    commit = hub.add("org/model", miniatures["moe"])
    repo = hub.repos["org/model"]
    real = repo.digest
    repo.digest = lambda path: real(path) if len(hub.requests) < 4 else "0" * 64
    with pytest.raises(
        CheckpointError, match=rf"org/model@{commit}/.*: expected contents of SHA-256 .*, the Hub has 0000"
    ):
        fp4cast.inspect("org/model", jobs=1)


def test_a_server_without_ranges_is_not_read_whole(hub, miniatures):
    hub.add("org/model", miniatures["moe"])
    hub.fault("/storage/", "ignore range", times=99)
    with pytest.raises(
        CheckpointError, match=r"status 200\): the file has changed on the Hub, or a proxy serves no ranges"
    ):
        fp4cast.inspect("org/model")


def test_a_pointer_on_the_hub_is_told(hub, miniatures, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (source / "model-00002-of-00002.safetensors").write_text(pointer)
    hub.add("org/model", source)
    with pytest.raises(HeaderError, match=r"00002-of-00002\.safetensors: is a Git LFS pointer"):
        fp4cast.inspect("org/model")


def test_what_a_repository_lacks_is_told(hub, miniatures, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    hub.add("org/model", source)
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing on the Hub, the first is model-00001"):
        fp4cast.inspect("org/model")
    (source / "model.safetensors.index.json").unlink()
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"org/model@.*: holds config.json but no weights"):
        fp4cast.inspect("org/model")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json and no model\.safetensors"):
        fp4cast.inspect("org/model")


def test_revisions_and_pages_of_the_hub(hub, miniatures):
    commit = hub.add("org/model", miniatures["dense"])
    names = ("org/model@v1", f"org/model@{commit}", "https://huggingface.co/org/model", "hf.co/org/model/tree/v1")
    for name in names:
        assert fp4cast.inspect(name).source == f"org/model@{commit}"
    with pytest.raises(CheckpointError, match=r"org/model@v9: the Hub refuses: (?s:.*)Revision Not Found"):
        fp4cast.inspect("org/model@v9")
    with pytest.raises(CheckpointError, match=r"org/other: the Hub refuses: (?s:.*)Repository Not Found"):
        fp4cast.inspect("org/other")


def test_the_storage_does_not_see_the_token(hub, miniatures, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("org/model", miniatures["dense"])
    fp4cast.inspect("org/model")
    assert hub.asked("/storage/")
    assert not hub.leaks


def test_a_model_in_the_cache_is_read_from_there(hub, miniatures):
    hub.add("org/model", miniatures["dense"])
    path = snapshot_download("org/model")
    before = hub.sent(BODIES)
    info = fp4cast.inspect("org/model")
    assert hub.sent(BODIES) == before
    assert info.source == path
    assert "downloaded" not in info.bytes
    hub.close()
    assert fp4cast.inspect("org/model").source == path


def test_names_that_lead_elsewhere_are_refused(hub, miniatures):
    hub.add("org/model", miniatures["dense"])
    repo = hub.repos["org/model"]
    real = repo.files
    repo.files = lambda: real() | {"../../evil": miniatures["dense"] / "LICENSE"}
    with pytest.raises(CheckpointError, match=r"lists a file '../../evil' of 47 bytes, which is not usable"):
        fp4cast.inspect("org/model")


def test_the_command_says_how_much_it_has_read(hub, miniatures):
    hub.add("org/model", miniatures["moe"])
    result = call("inspect", "org/model")
    assert result.exit_code == 0, result.output
    assert re.search(r"read +\d+(\.\d)? kB of 1\d\d kB, by ranges; nothing is on the disk", plain(result.stdout))
    assert json.loads(call("inspect", "org/model", "--json").stdout)["bytes"]["downloaded"] > 0
