"""Run every example: each block of each page, and all of examples/. `python docs/run_examples.py [PAGE ...]`.

`console`: lines after `$ ` are commands; the lines below are the output, where a line `...` stands for any number of
lines. `python` and `sh` blocks must succeed. The blocks of a page run one after another in a directory of their own,
which holds `tests`, `examples` and stand-ins for the checkpoints that pages name. What is not run as it stands is in
the tables below, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp4cast.miniatures import make

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Blocks of other kinds: why they are not run here.
OTHERS = {
    "mermaid": "a picture",
    "py": "parts of files; tests/families/test_new_family.py runs those of docs/families.md",
    "text": "no command",
}
# Commands of `sh` blocks that do something else here, and why.
INSTEAD = {
    "dev": (":", "sets up environments; .ci/run runs ./dev itself"),
    "pip": (":", "needs the network"),
    "vllm": (":", "needs a GPU"),
    "trtllm-serve": (":", "needs a GPU"),
    "sbatch": ('if [ "${*: -2:1}" = --wrap ]; then eval "${*: -1}"; fi', "needs Slurm: what it wraps runs here"),
}
# Words of `sh` blocks that are others here: smaller numbers, places that exist, no Hub (tests/hub has one).
SMALLER = {
    "./dev": "dev",
    "/shared/": "shared/",
    "head:6379": "local",
    "--jobs 4": "--jobs 1",
    "--inputs 1000000": "--inputs 200",
    "--points 5000 --random 200": "--points 5 --random 1",
    "--flips 10000": "--flips 50 --lies 20",
    "study --out": "study --quick --out",
    "--stream": "",
    "--push me/gpt-oss-20b-NVFP4": "",
    "fp4cast push": "fp4cast push --dry-run",
}
# Checkpoints that pages name: the miniature, directory of the repository, or what makes it, that stands for each.
CHECKPOINTS = {
    "SRC": "tests/fixtures/gpt-oss-tiny",
    "openai/gpt-oss-20b": "tests/fixtures/gpt-oss-tiny",
    "openai/gpt-oss-120b": "tests/fixtures/gpt-oss-tiny",
    "Qwen3-30B-A3B-MXFP4": "moe",
    "shared/Kimi-K3": "kimi-k3",
    "moonshotai/Kimi-K3": "tests/attention.py",
}
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "COLUMNS": "80",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_COUNT": "1",
    "SLURM_CPUS_PER_TASK": "2",
}


def matches(expected: list[str], actual: list[str]) -> bool:
    """Whether lines are equal but for trailing blanks, with `...` for any number of them."""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in expected)
    return re.fullmatch(pattern, "".join(line.rstrip() + "\n" for line in actual)) is not None


def shell(body: str) -> list[str]:
    """The command that runs an `sh` block, with what it needs instead."""
    for word, other in SMALLER.items():
        body = body.replace(word, other)
    functions = "".join(f"{name}() {{ {code}; }}\n" for name, (code, _) in INSTEAD.items())
    return ["bash", "-euo", "pipefail", "-c", functions + body]


def examples(text: str) -> list[tuple[str, list[str], list[str] | None]]:
    """(first line, command, expected output) of a page; the output is None for a block that prints what it likes."""
    found: list[tuple[str, list[str], list[str] | None]] = []
    for kind, body in BLOCK.findall(text):
        first = body.split("\n", 1)[0]
        if kind == "python":
            found.append((first, [sys.executable, "-c", body], None))
        elif kind == "sh":
            found.append((first, shell(body), None))
        elif kind == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, *output = part.splitlines()
                found.append((command, command.split(), output))
        elif kind not in OTHERS:
            raise SystemExit(f"a block of kind {kind or 'none'!r} is not run, and has no reason: {first}")
    return found


def furnish(scratch: Path) -> None:
    """Put what examples read into a directory."""
    for name in ("tests", "examples"):
        (scratch / name).symlink_to(ROOT / name)
    for name, kind in CHECKPOINTS.items():
        place = scratch / name
        place.parent.mkdir(exist_ok=True)
        if kind.endswith(".py"):
            runpy.run_path(str(ROOT / kind))["kimi_k3"](place)
        elif kind.startswith("tests/"):
            place.symlink_to(ROOT / kind)
        else:
            make(kind, place)
    lines = (ROOT / "tests" / "fixtures" / "gpt-oss-tiny" / "calibration.txt").read_text().split("\n\n")
    (scratch / "text.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines[:8]))


def run(page: str, found: list[tuple[str, list[str], list[str] | None]]) -> int:
    """Run the examples of a page, if it has some; the number of those that failed."""
    if not found:
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        furnish(Path(scratch))
        for first, command, expected in found:
            begin = time.monotonic()
            done = subprocess.run(command, cwd=scratch, env=ENVIRONMENT, capture_output=True, text=True, check=False)
            good = done.returncode == 0 and (expected is None or matches(expected, done.stdout.splitlines()))
            print(f"{'ok' if good else 'FAILED'} {page}: {first[:80]} ({time.monotonic() - begin:.1f} s)", flush=True)
            if not good:
                failed += 1
                print(done.stdout, done.stderr, sep="\n")
    return failed


def main() -> int:
    """Number of examples that failed, as the exit status."""
    pages = [Path(page).resolve() for page in sys.argv[1:]] or PAGES
    todo = {str(page.relative_to(ROOT)): examples(page.read_text()) for page in pages}
    if not sys.argv[1:]:
        scripts = sorted((ROOT / "examples").glob("*.py"))
        todo["examples"] = [(script.name, [sys.executable, str(script)], None) for script in scripts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a page waits for its commands
        return sum(pool.map(run, todo, todo.values()))


if __name__ == "__main__":
    sys.exit(main())
