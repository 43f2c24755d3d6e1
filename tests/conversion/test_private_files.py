"""What is private in the source stays private, and nothing outside of it gets into the destination."""

import os
import shutil

import pytest

import fp4cast
from fp4cast.conversion import convert as converting
from fp4cast.errors import CheckpointError, DestinationError
from fp4cast.verification.files import verify_files


@pytest.fixture
def source(miniatures, tmp_path):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    (source / "sub").mkdir()
    (source / "sub" / "vocab.txt").write_text("words")
    return source


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(directory):
    paths = [directory, *directory.rglob("*")]
    return {str(path.relative_to(directory)): path.stat().st_mode & 0o777 for path in paths}


def test_permissions_are_kept(source, tmp_path):
    """H2: a shard of mode 600 became 644."""
    shard = next(source.glob("*.safetensors"))
    for path, mode in ((source, 0o700), (source / "sub", 0o750), (source / "sub" / "vocab.txt", 0o640), (shard, 0o600)):
        path.chmod(mode)
    (source / "config.json").chmod(0o600)
    fp4cast.convert(source, tmp_path / "dst")
    found = modes(tmp_path / "dst")
    assert (found["."], found["sub"], found["sub/vocab.txt"], found[shard.name]) == (0o700, 0o750, 0o640, 0o600)
    assert {found[name] for name in ("config.json", "hf_quant_config.json", "fp4cast.json")} == {0o600}


def test_public_files_stay_public(source, tmp_path):
    source.chmod(0o755)
    fp4cast.convert(source, tmp_path / "dst")
    assert set(modes(tmp_path / "dst").values()) == {0o755, 0o644}
    shutil.rmtree(tmp_path / "dst")
    os.umask(0o077)
    fp4cast.convert(source, tmp_path / "dst")
    assert set(modes(tmp_path / "dst").values()) == {0o700, 0o600}


def test_a_shard_that_is_a_link_out_of_the_checkpoint_is_refused(source, tmp_path):
    """H3: its bytes would be published."""
    shard = next(source.glob("*.safetensors"))
    shard.rename(tmp_path / "private.safetensors")
    shard.symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*private\.safetensors, outside of the checkpoint"):
        fp4cast.inspect(source)


def test_links_inside_of_the_checkpoint_are_followed(source, tmp_path):
    shard = next(source.glob("*.safetensors"))
    shard.rename(source / "blob")
    shard.symlink_to("blob")
    assert fp4cast.convert(source, tmp_path / "dst").exact
    assert not (tmp_path / "dst" / shard.name).is_symlink()


@pytest.mark.parametrize("swap", ["link", "size", "folder"])
def test_a_companion_that_is_swapped_meanwhile_is_not_published(source, tmp_path, monkeypatch, swap):
    """H3: also with --no-verify."""
    (tmp_path / "private").write_text("words")
    execute = converting.execute

    def meddle(*args, **kwargs):
        result = execute(*args, **kwargs)
        vocab = source / "sub" / "vocab.txt"
        vocab.unlink()
        if swap == "link":
            vocab.symlink_to(tmp_path / "private")
        elif swap == "folder":
            vocab.mkdir()
        else:
            vocab.write_text("other words")
        return result

    monkeypatch.setattr(converting, "execute", meddle)
    with pytest.raises(
        (CheckpointError, DestinationError), match=r"sub/vocab\.txt: (is a link|changed|is a dir|cannot)"
    ):
        fp4cast.convert(source, tmp_path / "dst", verify=False)
    assert not (tmp_path / "dst").exists()


def test_companions_count_in_the_space_check(source, tmp_path):
    """H4: a sparse companion of a terabyte was copied as one."""
    with (source / "sub" / "big.txt").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(DestinationError, match=r"8796\.\d+ GB are needed there"):
        fp4cast.convert(source, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_companion_that_cannot_be_written_names_the_destination(source, tmp_path, monkeypatch):
    """H4: the message blamed the source file."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp4cast.conversion.companions.copy_range", full)
    with pytest.raises(DestinationError, match=r"\.dst\.fp4cast/out/\S+: cannot be written: No space left on device"):
        fp4cast.convert(source, tmp_path / "dst")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_companion_is_copied_whole_where_the_kernel_copies_nothing(source, tmp_path, monkeypatch, size):
    """A copy of zero bytes inside the kernel was taken for the end of the file."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
    (source / "sub" / "vocab.txt").write_bytes(os.urandom(size))
    fp4cast.convert(source, tmp_path / "dst", verify=False)
    assert (tmp_path / "dst/sub/vocab.txt").read_bytes() == (source / "sub/vocab.txt").read_bytes()


def test_companions_have_checksums_too(source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst")
    (tmp_path / "dst" / "sub" / "vocab.txt").write_text("other")
    assert [each.name for each in verify_files(tmp_path / "dst").differences] == ["sub/vocab.txt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_source_that_is_mounted_twice_does_not_hold_the_destination(source, tmp_path):
    """H3: DST inside SRC through a bind mount."""
    (tmp_path / "again").mkdir()
    if os.system(f"mount --bind '{source}' '{tmp_path}/again' 2>/dev/null"):  # noqa: S605
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(DestinationError, match="must lie apart from the source"):
            fp4cast.convert(source, tmp_path / "again" / "dst")
    finally:
        os.system(f"umount '{tmp_path}/again'")  # noqa: S605
