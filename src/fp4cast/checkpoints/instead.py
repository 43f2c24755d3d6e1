"""What people name in place of a checkpoint's directory, and what they can do: a sentence for each."""

from __future__ import annotations

import re
from pathlib import Path

from fp4cast.errors import CheckpointError, UnsupportedError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_EXAMPLE = "openai/gpt-oss-20b"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_path(path: Path) -> CheckpointError:
    """The error for a path that is no directory: a file of some kind, or nothing."""
    if not path.exists():
        owner = f"A model id names its owner, too: {_EXAMPLE}" if "/" not in str(path) else "Check the path"
        return CheckpointError(f"{path}: is not a directory; nothing is there. {owner}")
    if not path.is_file():
        return CheckpointError(f"{path}: is neither a directory nor a file")
    with path.open("rb") as file:
        first = file.read(64)
    return UnsupportedError(f"{path}: is not a directory but {_kind(path, first)}")


def _kind(path: Path, first: bytes) -> str:
    if path.suffix == ".gguf" or first.startswith(b"GGUF"):
        return (
            "a GGUF file, which becomes another one: fp4cast convert SRC.gguf DST.gguf. Elsewhere name the Hugging "
            "Face checkpoint that it was made from"
        )
    if first.startswith(LFS_POINTER):
        return "a Git LFS pointer. Fetch the files with `git lfs pull`, then name their directory"
    if path.suffix == ".safetensors":
        return f"one file of a checkpoint. Name its directory, with config.json and all shards: {path.parent}"
    if first.startswith(b"PK\3\4"):
        return "a zip archive. Unpack it and name the directory"
    if path.suffix in (".json", ".md", ".txt"):
        return f"one file of a checkpoint. Name its directory: {path.parent}"
    return "a file. Name the directory of a checkpoint, or a model id"


def refuse_without_weights(path: Path, files: set[str]) -> UnsupportedError:
    """The error for a directory without safetensors weights, which says what it holds instead.

    Args:
        path: the directory.
        files: the names in it.
    """
    if any(name.endswith(".gguf") for name in files):
        what = "holds GGUF files: name one of them, or the checkpoint that they were made from."
    elif "model.bin" in files and "config.json" not in files:
        what = (
            "looks like gpt-oss's metal/ format (model.bin), a layout of its own; "
            "pass the directory above it, which holds the Hugging Face layout."
        )
    elif pickles := sorted(name for name in files if name.endswith(_PICKLES)):
        what = (
            f"holds {pickles[0]}, a pickle, which can run code when it is read; fp4cast reads safetensors alone. "
            "Download the model's safetensors files, or save it again with `save_pretrained`."
        )
    elif any(name.endswith(".safetensors") for name in files):
        what = "holds safetensors files but no model.safetensors.index.json; download the index, too."
    elif "config.json" in files:
        what = f"holds config.json but no weights. Finish the download: hf download ORG/NAME --local-dir {path}"
    else:
        what = "no model.safetensors.index.json and no model.safetensors; expected a Hugging Face checkpoint"
    return UnsupportedError(f"{path}: {what}")


_HUB = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/([^/?#]+))?/?(?:[?#].*)?"
)
_MODEL_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def model_id(text: str) -> tuple[str, str | None] | None:
    """(ORG/NAME, revision) of a model id, `ORG/NAME@REVISION`, or a page of the Hub; None for anything else.

    >>> model_id("https://huggingface.co/openai/gpt-oss-20b/tree/main")
    ('openai/gpt-oss-20b', 'main')

    Raises:
        CheckpointError: it is a URL of something else.
    """
    if found := _HUB.fullmatch(text) or _MODEL_ID.fullmatch(text):
        return found[1], found[2]
    if re.match(r"[a-z][a-z0-9+]*://", text):
        raise CheckpointError(
            f"{text[:200]}: is a URL that fp4cast does not read; expected a directory, a model id like {_EXAMPLE}, or "
            "its page on huggingface.co"
        )
    return None
