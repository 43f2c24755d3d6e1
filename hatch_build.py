"""Compiles the one C file where there is a compiler; the package works without it, only gpt-oss's banks turn slower."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileTranspose(BuildHookInterface[Any]):
    """Makes checkpoints/_transpose.so, which ctypes loads: it belongs to a platform, not to a version of Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the wheel is packed; what fails is said and left out."""
        package = Path(self.root, "src", "fp4cast", "checkpoints")
        library = package / "_transpose.so"
        library.unlink(missing_ok=True)
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
