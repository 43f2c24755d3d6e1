"""Record a terminal session: docs/demo.cast (asciinema, version 2) and docs/demo.svg, which shows it on a page.

python docs/record.py            # run the commands and write both
python docs/record.py --check    # exit with 1 where the commands now print something else, or the picture is an old one

The commands really run; only the pace is set, so that one can read along.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    "fp4cast demo --out demo",
    "fp4cast inspect demo/gpt-oss",
    "fp4cast convert demo/gpt-oss gpt-oss-NVFP4",
    "fp4cast verify demo/gpt-oss gpt-oss-NVFP4",
)
CAST, PICTURE = Path(__file__).with_name("demo.cast"), Path(__file__).with_name("demo.svg")
COLUMNS, ROWS = 88, 24
READ, WORK, LINE = 4.0, 0.5, 0.04  # seconds before a command, until it prints, and from line to line
CLOCK = re.compile(r"\d[\d.]* (?:s|[kMG]?B/s)\b")  # what differs from run to run
LINE_HEIGHT = 24.4  # of rich's pictures

# Filled by rich. Each line appears in its turn, once; the screen scrolls where it is full.
TEMPLATE = """<svg viewBox="0 0 {{width}} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>fp4cast converts a small gpt-oss checkpoint and verifies every value</title>
<style>
.{{unique_id}}-matrix {{{{ font: {{char_height}}px monospace }}}}
.{{unique_id}}-matrix text {{{{ opacity: 0; animation: show 0s forwards }}}}
.scroll {{{{ animation: scroll {seconds:.2f}s step-end forwards }}}}
@keyframes show {{{{ to {{{{ opacity: 1 }}}} }}}}
@keyframes scroll {{{{ {scroll} }}}}
{delays}
@media (prefers-reduced-motion: reduce) {{{{
  .{{unique_id}}-matrix text {{{{ opacity: 1; animation: none }}}}
  .scroll {{{{ animation: none; transform: translateY(-{last:.1f}px) }}}}
}}}}
{{styles}}
</style>
<defs>
<clipPath id="screen"><rect x="12" y="12" width="{{terminal_width}}" height="{screen:.1f}" /></clipPath>
{{lines}}
</defs>
<rect fill="#0c0c0c" width="{{width}}" height="{height}" rx="8" />
<g clip-path="url(#screen)"><g class="scroll"><g transform="translate(12, 12)">
{{backgrounds}}
<g class="{{unique_id}}-matrix">
{{matrix}}
</g></g></g></g>
</svg>
"""


def record() -> list[tuple[float, str]]:
    """Run the commands: (seconds since the start, what is printed then)."""
    events: list[tuple[float, str]] = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": str(COLUMNS),
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
    }
    now = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for command in COMMANDS:
            now += READ if now else 1.0
            events.append((now, f"\x1b[1;36m$\x1b[0m \x1b[1m{command}\x1b[0m\r\n"))
            now += WORK
            done = subprocess.run(
                command.split(), cwd=scratch, env=environment, capture_output=True, text=True, check=True
            )
            for line in [*done.stdout.splitlines(), ""]:
                events.append((now, f"{line.rstrip()}\r\n"))
                now += LINE
    return events


def cast(events: list[tuple[float, str]]) -> str:
    """The events as a file of asciinema."""
    head = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "fp4cast"}
    lines = [json.dumps(head), *(json.dumps([round(at, 2), "o", text]) for at, text in events)]
    return "\n".join(lines) + "\n"


def events_of(text: str) -> list[tuple[float, str]]:
    """What a file of asciinema holds."""
    return [(at, printed) for at, _, printed in map(json.loads, text.splitlines()[1:])]


def picture(events: list[tuple[float, str]]) -> str:
    """The events as an SVG that moves."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for _, text in events:
        console.print(Text.from_ansi(text.rstrip("\r\n")), soft_wrap=True)
    seconds = events[-1][0]
    delays = "\n".join(
        f'text[clip-path="url(#t-line-{row})"] {{{{ animation-delay: {at:.2f}s }}}}'
        for row, (at, _) in enumerate(events)
    )
    moves = [(at, max(0, row + 1 - ROWS) * LINE_HEIGHT) for row, (at, _) in enumerate(events)]
    scroll = " ".join(f"{at / seconds:.3%} {{{{ transform: translateY(-{y:.1f}px) }}}}" for at, y in moves if y)
    screen = ROWS * LINE_HEIGHT + 2
    template = TEMPLATE.format(
        height=round(screen + 24), screen=screen, seconds=seconds, delays=delays, scroll=scroll, last=moves[-1][1]
    )
    return console.export_svg(unique_id="t", code_format=template)


def main() -> int:
    """1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, events = parser.parse_args().check, record()
    if not check:
        CAST.write_text(cast(events))
        PICTURE.write_text(picture(events_of(CAST.read_text())))
        return 0
    told, now = CAST.read_text(), cast(events)
    if CLOCK.sub("?", told) != CLOCK.sub("?", now):
        print("the commands of docs/demo.cast print something else now: run docs/record.py and look at the pictures")
        return 1
    if PICTURE.read_text() != picture(events_of(told)):
        print("docs/demo.svg does not show docs/demo.cast: run docs/record.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
