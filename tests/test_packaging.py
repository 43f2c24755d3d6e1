"""What a release holds: one version, a wheel for a platform and one for any, a page for PyPI without dead links."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fp4cast

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture
def hatch_build():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path):
    """As much of this project as a wheel needs, where a build leaves no trace in the checkout."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    keep = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=keep)
    return tmp_path


def build(project, target="wheel", **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", project / "dist"]
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "FP4CAST_PURE")}
    done = subprocess.run(command, cwd=project, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (project / "dist").iterdir()
    return path


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata_of(wheel):
    (text,) = (data.decode() for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(text)


def test_the_version_is_one(project):
    version, day = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert version == fp4cast.__version__ and "version" in PROJECT["dynamic"]
    assert day == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert metadata_of(build(project, FP4CAST_PURE="1"))["Version"] == fp4cast.__version__


def test_a_pure_wheel_is_for_any_system(project):
    library = project / "src" / "fp4cast" / "checkpoints" / "_transpose.so"
    library.write_bytes(b"of a build before")
    wheel = build(project, FP4CAST_PURE="1")
    assert wheel.name == f"fp4cast-{fp4cast.__version__}-py3-none-any.whl"
    files = contents(wheel)
    assert not [name for name in files if name.endswith(".so")] and "fp4cast/checkpoints/transpose.py" in files
    (about,) = (data.decode() for name, data in files.items() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in about


@needs_compiler
def test_a_compiled_wheel_belongs_to_a_platform_and_no_python(project):
    wheel = build(project)
    assert re.fullmatch(rf"fp4cast-{re.escape(fp4cast.__version__)}-py3-none-(linux|macosx|win)\w+\.whl", wheel.name)
    assert {"fp4cast/checkpoints/_transpose.so", "fp4cast/verification/_compare.so"} <= set(contents(wheel))


def test_without_a_compiler_the_wheel_is_pure(project):
    assert build(project, CC="/no/such/compiler").name.endswith("-py3-none-any.whl")


def test_an_sdist_is_enough_to_build_a_wheel(project, tmp_path):
    with tarfile.open(build(project, "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    shutil.rmtree(project / "dist")
    assert contents(build(source, FP4CAST_PURE="1")) == contents(build(project, FP4CAST_PURE="1"))


def code_of(text):
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def links_of(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_page_on_pypi_has_no_dead_link(project):
    """No address of the repository is known, so what leads there is text; all other words stay."""
    page = metadata_of(build(project, FP4CAST_PURE="1")).get_payload()
    relative = [target for target in links_of(README) if not target.startswith("http")]
    assert relative and links_of(page) == [target for target in links_of(README) if target.startswith("http")]
    assert code_of(page) == code_of(README)
    words = re.sub(r"\[([^\[\]]+)\]\((?!http)[^)]+\)", r"\1", README)
    assert page.strip() == words.strip() and "Source" not in PROJECT.get("urls", {})


def test_with_an_address_links_lead_to_the_release(project):
    settings = (project / "pyproject.toml").read_text()
    urls = '[project.urls]\nSource = "https://example.org/group/name/"\n\n[project.scripts]'
    (project / "pyproject.toml").write_text(settings.replace("[project.scripts]", urls))
    page = metadata_of(build(project, FP4CAST_PURE="1")).get_payload()
    base = f"https://example.org/group/name/blob/v{fp4cast.__version__}/"
    assert links_of(page) == [t if t.startswith("http") else base + t for t in links_of(README)]


@pytest.mark.parametrize(
    ("text", "alone", "absolute"),
    [
        ("[a](b.md)", "a", "[a](B/b.md)"),
        ("[a\nb](docs/c.md#d), [e](#f)", "a\nb, e", "[a\nb](B/docs/c.md#d), [e](B/README.md#f)"),
        ("[a](http://b), ([c](https://d))", *2 * ["[a](http://b), ([c](https://d))"]),
        ("x[..., 1](y z) [tick `t`](u)", "x[..., 1](y z) tick `t`", "x[..., 1](y z) [tick `t`](B/u)"),
    ],
)
def test_links_are_text_or_absolute(hatch_build, text, alone, absolute):
    assert hatch_build.long_description(text, "") == alone
    assert hatch_build.long_description(text, "B/") == absolute


def test_the_images_install_extras_that_exist():
    (named,) = re.findall(r"^ARG EXTRAS=(\S+)$", (ROOT / "docker" / "full" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(named.split(",")) == set(PROJECT["optional-dependencies"])
