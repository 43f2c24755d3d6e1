"""The study's page, made from its document alone: Markdown, and the same page as one HTML file."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from fp4cast.errors import UsageError
from fp4cast.extras import require
from fp4cast.study.algorithms import TITLES
from fp4cast.study.plots import PLOTS, draw

_CAPTIONS = {
    "snr": "Signal to noise by scenario and algorithm. Exact results stand at the right, beside those over 190 dB.",
    "spread": "Error against the spread of the exponents, uniform for Gaussian blocks. 3-sweep, 3 and 4 coincide.",
    "exactness": "The tight rule: every set of magnitudes that a half-block can hold, at every offset of its exponent.",
    "landing": "Where the tensor scale lands, for spreads under 100.",
}
_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.4rem; }
table { border-collapse: collapse; font-size: 0.82rem; margin: 1rem 0; }
.table { overflow-x: auto; }
th, td { padding: 0.28rem 0.6rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; } td { font-variant-numeric: tabular-nums; }
figure { margin: 1.6rem 0; } figure svg { width: 100%; height: auto; } figcaption { color: #666; font-size: 0.9rem; }
code { background: #f4f4f4; padding: 0.1em 0.3em; border-radius: 3px; } pre code { display: block; padding: 0.8em; }
"""

Document = dict[str, Any]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _snr(result: Document) -> str:
    return "**exact**" if result["exact"] else f"{result['snr_db']:.1f}"


def _shape(scenario: Document) -> str:
    return "\u00a0×\u00a0".join(map(str, scenario["shape"]))


def _overview(document: Document) -> str:
    rows = [
        [
            each["name"],
            each["about"],
            _shape(each),
            str(each["spread"]),
            f"{each['outside']:,}\u00a0of\u00a0{each['blocks']:,}",
            *map(_snr, each["algorithms"].values()),
        ]
        for each in document["scenarios"]
    ]
    return _table(["scenario", "what", "shape", "spread", "outside", *TITLES], rows)


def _details(document: Document) -> str:
    rows = []
    for scenario in document["scenarios"]:
        for name, result in scenario["algorithms"].items():
            m = str(result["m"]).replace("-", "−") if result["m"] is not None else "none"
            best = "best" if name in scenario["winners"] else ""
            figures = ["0", "0"] if result["exact"] else [f"{result['mse']:.4g}", f"{result['max_abs_error']:.4g}"]
            rows.append([scenario["name"], name, m, f"{result['tensor_scale']:.6g}", *figures, _snr(result), best])
    return _table(["scenario", "algorithm", "m", "S", "MSE", "max error", "SNR, dB", ""], rows)


def _summary(document: Document) -> str:
    scenarios = document["scenarios"]
    exact = {name: sum(each["algorithms"][name]["exact"] for each in scenarios) for name in TITLES}
    lines = [f"- **{name}**, {title}: exact in {exact[name]} of {len(scenarios)}" for name, title in TITLES.items()]
    return "\n".join(lines) + "\n"


def _gain(document: Document) -> float:
    """Median SNR that Algorithm 3 gains over 2 beyond a spread of 17, in dB."""
    wide = [errors for spread, errors in document["spread_curve"].items() if int(spread) > 17]
    return 20 * statistics.median(math.log10(errors["2-search"] / errors["3"]) for errors in wide)


def _winners(document: Document) -> str:
    """How often each set of algorithms shares the least squared error, compared exactly."""
    counts = Counter(", ".join(each["winners"]) for each in document["scenarios"])
    rows = [[names, str(count)] for names, count in counts.most_common()]
    return _table(["algorithms with the least squared error", "scenarios"], rows)


def _claims(document: Document) -> str:
    rows = [[each["claim"], f"**{each['status']}**", each["figure"]] for each in document["claims"]]
    return _table(["claim", "", "figure"], rows)


def _left_out(document: Document) -> str:
    lines = [f"- {name}: {reason}\n" for name, reason in document["left_out"].items()]
    return "".join(["## Left out\n\n", *lines]) if lines else ""


def _introduction(document: Document) -> str:
    return f"""# MXFP4 to NVFP4: every algorithm, every scenario

When is a cast exact, and what is lost when it is not? Six algorithms, {len(document["scenarios"])} tensors, every error
measured on the codes and scales that would be written, in exact arithmetic: a tie is a tie. The first 27 tensors
follow an [experiment](https://github.com/NVIDIA/Model-Optimizer/pull/1364) by NVIDIA's Model-Optimizer team; the others
are what it lacks. [The proof](../exactness.md) of the rule behind Algorithm 4 is a page of its own, and so is
[what we do with each of the original's functions](../ptq.md#the-original-and-what-we-do).

{_summary(document)}
A tensor is one scale domain: all of it shares S. *Spread* is the number of binades between its smallest and its largest
block, blocks of zeros apart; *outside* counts the blocks more than 17 binades below the largest. Names are the
original's: "spread 17" has bands of rows over 17 binades, and blocks over 19.

"""


def markdown(document: Document) -> str:
    """The page, with pictures as files beside it."""
    picture = {name: f"![{caption}]({name}.svg)\n\n*{caption}*\n" for name, caption in _CAPTIONS.items()}
    command = "fp4cast study --out docs/study" + (" --quick" if document["quick"] else "")
    return f"""{_introduction(document)}
## The claims

{_claims(document)}
## Who errs least

{_winners(document)}
## Signal to noise, dB

{picture["snr"]}
{_overview(document)}
## Error against spread

{picture["spread"]}
Up to 17 binades every algorithm that keeps codes is exact, given a good m. Beyond, the middle of the exponents is the
wrong place for the window, since the largest blocks hold the energy. Requantizing the blocks below the window instead
of snapping them is worth {_gain(document):.0f} dB at the median.

## Where exactness ends

{picture["exactness"]}
Inside of the window of 18 offsets every half-block keeps its codes. A half-block without .5 and 1.5, or without 4 and
6, reaches one binade further, on one side or the other; poorer ones up to three.

## Where m lands

{picture["landing"]}
## All figures

{_details(document)}
{_left_out(document)}
## Again

```sh
{command}
```

That, at the root of the repository, makes this page; `study.json` beside it has the numbers. Random numbers come from
seed {document["seed"]}: every run is the same.
""".replace("\n\n\n", "\n\n")


def html(text: str, pictures: dict[str, str]) -> str:
    """The page as one file: styled, the pictures inline."""
    body: str = require("markdown_it", "study").MarkdownIt("commonmark").enable("table").render(text)
    for name, caption in _CAPTIONS.items():
        svg = re.sub(r"^.*?(?=<svg)", "", pictures[name], flags=re.DOTALL)
        # Ids are the page's now: those of two pictures must not meet.
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        old = f'<p><img src="{name}.svg" alt="{caption}" /></p>\n<p><em>{caption}</em></p>'
        body = body.replace(
            old, f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'
        )
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>MXFP4 to NVFP4</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def check(directory: Path) -> None:
    """Raise now for what would fail after minutes of work.

    Raises:
        MissingExtraError: matplotlib or markdown-it-py is not installed.
        UsageError: the directory is a file.
    """
    for module in ("matplotlib", "markdown_it"):
        require(module, "study")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; --out takes a directory")


def write(document: Document, directory: Path) -> list[Path]:
    """Write index.md, index.html, the pictures and study.json; other files there stay.

    Raises:
        MissingExtraError: matplotlib or markdown-it-py is not installed.
    """
    text, pictures = markdown(document), draw(document)
    files = {f"{name}.svg": pictures[name] for name in PLOTS}
    files |= {"index.md": text, "index.html": html(text, pictures), "study.json": json.dumps(document, indent=1) + "\n"}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")
    return [directory / name for name in files]
