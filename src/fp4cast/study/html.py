"""The study's page as one HTML file: styled for bright pages and dark ones, wide and narrow; the pictures inline."""

from __future__ import annotations

import re

from fp4cast.extras import require

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #5f5f5f; --line: #e4e4e4; --code: #f4f4f4;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #15181b; --faint: #a5a5a5; --line: #363b40;
  --code: #24282c; --link: #8ab8ea; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1, h2, h4 { line-height: 1.2; } h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; } a { color: var(--link); }
ul { padding-left: 1.2rem; } li { margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.82rem; margin: 1rem 0; } .table { overflow-x: auto; }
th, td { padding: 0.28rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--faint); } td { font-variant-numeric: tabular-nums; }
details .table { max-height: 80vh; overflow: auto; } details th { position: sticky; top: 0; background: var(--paper); }
details td:first-child { position: sticky; left: 0; background: var(--paper); }
summary { cursor: pointer; color: var(--link); padding: 0.5rem 0; }
figure { margin: 1rem auto; max-width: 36rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: 0.9rem; }
code { background: var(--code); padding: 0.1em 0.3em; border-radius: 3px; }
pre code { display: block; padding: 0.8em; overflow-x: auto; }
"""


def _slug(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _figure(name: str, svg: str, alt: str, caption: str) -> str:
    svg = re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
    # Ids are the page's now: those of two pictures must not meet.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def html(text: str, pictures: dict[str, str]) -> str:
    """The page as one file.

    Args:
        text: the page in Markdown; a picture's caption is the emphasized paragraph below it.
        pictures: SVG by name.
    """
    body: str = require("markdown_it", "study").MarkdownIt("commonmark").enable("table").render(text)
    for name, svg in pictures.items():
        pattern = rf'<p><img src="{name}\.svg" alt="([^"]*)" /></p>\n<p><em>(.*?)</em></p>'
        if found := re.search(pattern, body, re.DOTALL):
            body = body.replace(found[0], _figure(name, svg, *found.groups()))
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<(h[24])>(.*?)</", lambda match: f'<{match[1]} id="{_slug(match[2])}">{match[2]}</', body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>MXFP4 to NVFP4</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
