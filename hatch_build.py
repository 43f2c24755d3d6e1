"""Two hooks for hatchling: compile the C files, where there is a compiler, and make PyPI's page of the README."""

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

SOURCES = ("checkpoints/transpose.c", "verification/compare.c")  # below src/fp4cast


class CompileKernels(BuildHookInterface[Any]):
    """Makes a library of each C file, which ctypes loads: they belong to a platform, not to a version of Python.

    The package works without them, only slower. FP4CAST_PURE=1 leaves them out, for any system.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the wheel is packed; what fails is said and left out."""
        sources = [Path("src", "fp4cast", name) for name in SOURCES]
        libraries = [source.with_name(f"_{source.stem}.so") for source in sources]
        for library in libraries:
            Path(self.root, library).unlink(missing_ok=True)
        if os.environ.get("FP4CAST_PURE"):
            return
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        for source, library in zip(sources, libraries, strict=True):
            command = [*compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(source)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.root)  # noqa: S603
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                self.app.display_warning(f"fp4cast: {source.name} is not compiled, NumPy does its work: {reason}")
                continue
            build_data["artifacts"].append(library.as_posix())
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
