"""Run the examples: every `console` command of the pages with its output, every `python` block, all of examples/.

In a console block, lines after `$ ` are commands; the lines below are the output, where a line `...` stands for any
number of lines. Commands run one after another in one directory, which holds nothing but the ways to `tests/fixtures`
and to `examples`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/exactness.md", "docs/ptq.md", "docs/usage.md")
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def matches(expected: list[str], actual: list[str]) -> bool:
    """Whether lines are equal but for trailing blanks, with `...` for any number of them."""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in expected)
    return re.fullmatch(pattern, "".join(line.rstrip() + "\n" for line in actual)) is not None


def examples(text: str) -> list[tuple[list[str], list[str] | None]]:
    """(command, expected output lines) of a page; None for a block that prints what it likes."""
    found: list[tuple[list[str], list[str] | None]] = []
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            found.append(([sys.executable, "-c", body], None))
            continue
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, *output = part.splitlines()
            found.append((command.split(), output))
    return found


def main() -> int:
    """Number of examples that failed, as the exit status."""
    failed = 0
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",
    }
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "tests").mkdir()
        for shown in ("tests/fixtures", "examples"):
            Path(scratch, shown).symlink_to(ROOT / shown)
        of_pages = [each for page in PAGES for each in examples((ROOT / page).read_text())]
        there = {part for command, _ in of_pages for part in command}
        paths = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]
        for command, expected in [*of_pages, *(([sys.executable, path], None) for path in paths if path not in there)]:
            done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
            good = done.returncode == 0 and (expected is None or matches(expected, done.stdout.splitlines()))
            print("ok" if good else "FAILED", " ".join(command)[:100].split("\n")[0])
            if not good:
                failed += 1
                print(done.stdout, done.stderr, sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
