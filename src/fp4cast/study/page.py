"""The study's page, made from its document alone: Markdown, and the same page as one HTML file."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

from fp4cast.errors import DestinationError
from fp4cast.extras import require
from fp4cast.study.algorithms import TITLES
from fp4cast.study.html import html
from fp4cast.study.mixed import FORMATS
from fp4cast.study.plots import PLOTS, draw
from fp4cast.study.words import ALGORITHMS, MIXED, PICTURES, conclusion, gain, only_scaled, without_scale

FILES = (*(f"{name}.svg" for name in PLOTS), "index.md", "index.html", "study.json")

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
            *map(_snr, (*each["algorithms"].values(), each["unscaled"])),
        ]
        for each in document["scenarios"]
    ]
    return _table(["scenario", "what", "shape", "spread", "outside", *TITLES, "S = 1"], rows)


def _details(document: Document) -> str:
    rows = []
    for scenario in document["scenarios"]:
        for name, result in scenario["algorithms"].items():
            m = str(result["m"]).replace("-", "−") if result["m"] is not None else "none"
            best = "best" if name in scenario["winners"] else ""
            figures = ["0", "0"] if result["exact"] else [f"{result['mse']:.4g}", f"{result['max_abs_error']:.4g}"]
            rows.append([scenario["name"], name, m, f"{result['tensor_scale']:.6g}", *figures, _snr(result), best])
    return _table(["scenario", "algorithm", "m", "S", "MSE", "max error", "SNR, dB", ""], rows)


def _winners(document: Document) -> str:
    """How often each set of algorithms shares the least squared error, compared exactly."""
    counts = Counter(", ".join(each["winners"]) for each in document["scenarios"])
    rows = [[names, str(count)] for names, count in counts.most_common()]
    return _table(["algorithms with the least squared error", "scenarios"], rows)


def _unscaled(document: Document) -> str:
    """What is exact under some S and not under 1: the exponents say why."""
    rows = [
        [each["name"], f"{each['k_min']} to {each['k_max']}".replace("-", "−"), _snr(each["unscaled"])]
        for each in only_scaled(document)
    ]
    return _table(["scenario", "exponents", "S = 1, dB"], rows)


def _mixed(document: Document) -> str:
    rows = [[each["name"], *(f"{snr:.1f}" for snr in each["snr_db"].values())] for each in document["mixed"]]
    return _table(["weights", *FORMATS], rows)


def _claims(document: Document) -> str:
    """A list: in a table, long figures leave no room on a telephone."""
    items = (f"- *{each['status']}*: **{each['claim']}** {each['figure']}\n" for each in document["claims"])
    return "".join(items)


def _left_out(document: Document) -> str:
    lines = [f"- {name}: {reason}\n" for name, reason in document["left_out"].items()]
    return "".join(["## Left out\n\n", *lines]) if lines else ""


def _folded(summary: str, content: str) -> str:
    """What is there for who asks: Markdown between two tags of HTML."""
    return f"<details><summary>{summary}</summary>\n\n{content.strip()}\n\n</details>\n"


def _introduction(document: Document) -> str:
    return f"""# MXFP4 to NVFP4: every algorithm, every scenario

{conclusion(document)}
The study casts {len(document["scenarios"])} tensors with six algorithms and measures every error on the codes and
scales that would be written, in exact arithmetic: a tie is a tie. The first 27 tensors follow an
[experiment](https://github.com/NVIDIA/Model-Optimizer/pull/1364) by NVIDIA's Model-Optimizer team; the others are what
it lacks. [The proof](#the-proof) of Algorithm 4's rule is at the end.

## The algorithms

An MXFP4 block has 32 codes, 0 or ±.5 to ±6, and a scale 2^k. In NVFP4, each of its halves has a scale s in E4M3, which
holds 18 powers of two (2^−9 to 2^8, the *window*), and the whole tensor has one scale S in FP32, here mostly 2^m.

{ALGORITHMS}
A tensor is one scale domain: all of it shares S. k_max is its largest exponent. *Spread* is the number of binades, or
doublings, between its smallest and its largest block, blocks of zeros apart; *outside* counts the blocks more than 17
binades below the largest. Names are the original's: "spread 17" has bands of rows over 17 binades, and blocks over 19.

"""


def _proof() -> str:
    """The proof, its titles two levels down."""
    text = resources.files("fp4cast.study").joinpath("proof.md").read_text(encoding="utf-8")
    return text.replace("## ", "#### ")


def _other_formats(document: Document) -> str:
    """What families bring beside one tensor scale for each domain: none at all, and FP8."""
    return f"""## Without a tensor scale

{without_scale(document)}
{_folded(f"{len(only_scaled(document))} tensors that are exact, but not with S = 1", _unscaled(document))}
## Attention in FP8

{MIXED}
{_mixed(document)}
Errors of FP8 go with each weight, those of 4 bits with the largest of its block; a cast adds none to MXFP4's. Where one
weight holds nearly all the energy, its own rounding is all that is seen, and NVFP4's scales fit it best.
"""


def markdown(document: Document) -> str:
    """The page, with pictures as files beside it."""
    picture = {name: f"![{each.alt(document)}]({name}.svg)\n\n*{each.caption}*\n" for name, each in PICTURES.items()}
    command = "fp4cast study --out docs/study" + (" --quick" if document["quick"] else "")
    count = len(document["scenarios"])
    return f"""{_introduction(document)}
## Signal to noise, dB

{picture["snr"]}
{_folded(f"All {count} tensors: what they are, and their signal to noise", _overview(document))}
## Error against spread

{picture["spread"]}
Up to 17 binades every algorithm that keeps codes is exact, given a good m. Beyond, the middle of the exponents is the
wrong place for the window, since the largest blocks hold the energy. Requantizing the blocks below the window instead
of snapping them is worth {gain(document):.0f} dB at the median.

## Where exactness ends

{picture["exactness"]}
Inside of the window of 18 offsets every half-block keeps its codes. A half-block without .5 and 1.5, or without 4 and
6, reaches one binade further, on one side or the other; poorer ones up to three.

## Where m lands

{picture["landing"]}
{_other_formats(document)}
## The claims

{_claims(document)}
## Who errs least

{_winners(document)}
## All figures

{_folded(f"{count} tensors, six algorithms: m, S, errors", _details(document))}
{_left_out(document)}
## The proof

{_folded("When a half-block and a tensor are exact, and why", _proof())}
## Again

```sh
{command}
```

That, at the root of the repository, makes this page; `study.json` beside it has the numbers. Random numbers come from
seed {document["seed"]}: every run is the same.
""".replace("\n\n\n", "\n\n")


def check(directory: Path) -> None:
    """Raise now for what would fail after minutes of work.

    Raises:
        MissingExtraError: matplotlib or markdown-it-py is not installed.
        DestinationError: the directory is a file.
    """
    for module in ("matplotlib", "markdown_it"):
        require(module, "study")
    if directory.exists() and not directory.is_dir():
        raise DestinationError(f"{directory}: is a file; --out takes a directory")


def write(document: Document, directory: Path) -> list[Path]:
    """Write index.md, index.html, the pictures and study.json; other files there stay.

    Raises:
        MissingExtraError: matplotlib or markdown-it-py is not installed.
    """
    text, pictures = markdown(document), draw(document)
    drawn = [pictures[name] for name in PLOTS]
    contents = [*drawn, text, html(text, pictures), json.dumps(document, indent=1) + "\n"]
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        (directory / name).write_text(content, encoding="utf-8")
    return [directory / name for name in FILES]
