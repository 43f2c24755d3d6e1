"""Two hooks for hatchling: compile the one C file, where there is a compiler, and make PyPI's page of the README."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class CompileTranspose(BuildHookInterface[Any]):
    """Makes checkpoints/_transpose.so, which ctypes loads: it belongs to a platform, not to a version of Python.

    The package works without it, only gpt-oss's banks turn slower. FP4CAST_PURE=1 leaves it out, for any system.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the wheel is packed; what fails is said and left out."""
        package = Path(self.root, "src", "fp4cast", "checkpoints")
        library = package / "_transpose.so"
        library.unlink(missing_ok=True)
        if os.environ.get("FP4CAST_PURE"):
            return
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        command = [*compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(package / "transpose.c")]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"fp4cast: no compiled transpose, NumPy does it instead: {reason}")
            return
        build_data["artifacts"].append("src/fp4cast/checkpoints/_transpose.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


class LongDescription(MetadataHookInterface):
    """PyPI has none of the files that the README links to: links lead to the release in `Source`, or become text."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source", "").rstrip("/")
        base = f"{source}/blob/v{metadata['version']}/" if source else ""
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text, base)}


def long_description(text: str, base: str) -> str:
    """The README for a page elsewhere.

    Args:
        text: Markdown.
        base: what to put before the links to files of the repository; empty to leave their texts alone.
    """

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        if re.match(r"https?:", target):
            return found[0]
        target = f"README.md{target}" if target.startswith("#") else target
        return f"[{words}]({base}{target})" if base else words

    return re.sub(r"\[([^\[\]]+)\]\(([^()\s]+)\)", link, text)
