"""The pages: short where they promise to be, generated where they show the code, without dead links."""

import re
import subprocess
import sys
from pathlib import Path

import mkdocs_hooks
import names
import pytest
import run_examples
import typer

from fp4cast.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])


def test_the_readme_has_at_most_a_thousand_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_generated_parts_are_what_the_code_says():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            if anchor and path.endswith(".md"):
                titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_threat_model_names_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_the_recording_is_what_the_commands_print():
    command = [sys.executable, ROOT / "docs" / "record.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("page", run_examples.PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist_with_their_options(page):
    text = page.read_text()
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", run_examples.BLOCK.sub("", text))
    lines = "\n".join([*spans, *(body for _, body in run_examples.BLOCK.findall(text))]).replace("\\\n", " ")
    for name, rest in re.findall(r"^(?:\$ |.*\")?fp4cast ([a-z]+)\b([^#|\n]*)", lines, re.MULTILINE):
        options = {option for each in COMMANDS[name].params for option in [*each.opts, *each.secondary_opts]}
        known = {"__help", *(option.replace("-", "_") for option in options)}  # --calib-seq is --calib_seq
        used = {option.replace("-", "_") for option in re.findall(r"(?<= )--[\w-]+", rest)}
        assert known >= used, f"fp4cast {name}{rest}: {used - known}"


@pytest.mark.parametrize("page", run_examples.PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_has_a_reason(page):
    text = page.read_text()
    blocks = run_examples.BLOCK.findall(text)
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a block that is indented or not closed"
    run_examples.examples(text)  # raises for a kind that it does not know


def test_a_block_of_an_unknown_kind_is_refused():
    for kind in ("", "bash", "yaml"):
        with pytest.raises(SystemExit, match="has no reason: x"):
            run_examples.examples(f"```{kind}\nx\n```\n")


def test_what_is_not_run_as_it_stands_occurs_on_some_page():
    text = "".join(page.read_text() for page in run_examples.PAGES)
    blocks = "".join(body for kind, body in run_examples.BLOCK.findall(text) if kind == "sh")
    for word in [*run_examples.SMALLER, *run_examples.CHECKPOINTS, *run_examples.INSTEAD]:
        assert word in blocks, word
    for command, (_, reason) in run_examples.INSTEAD.items():
        assert len(reason) > 10, command


def test_the_site_shows_links_and_docstrings_that_github_cannot():
    text = "[a](../src/x.py#L1) [b](ptq.md#c) ![d](e.svg) [`f` [g]](../README.md) [h](https://i) [j](record.py)"
    plain = mkdocs_hooks.with_links(text, "usage.md", "")
    assert plain == "a [b](ptq.md#c) ![d](e.svg) `f` [g] [h](https://i) j"
    linked = mkdocs_hooks.with_links(text, "study/index.md", "http://localhost/r/")
    assert "[a](http://localhost/r/blob/main/docs/src/x.py#L1)" in linked  # one folder further down
    row = "| name | |\n|---|---|\n| `fp4cast.torch.cast` | x |"
    table = f"<!-- docs/generate.py: names fp4cast.torch -->\n{row}\n<!-- end -->"
    assert mkdocs_hooks.with_docstrings(table) == "::: fp4cast.torch.cast"


def test_every_public_module_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text()
    assert all(f"`{module}.{name}`" in text for module in names.PUBLIC for name in names.listed(module))
    with pytest.raises(LookupError):
        names.found("fp4cast", "nothing")
