"""What the site shows otherwise than GitHub: links to the repository, and whole docstrings in the reference."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

LOG = logging.getLogger("mkdocs.plugins.fp4cast")  # a warning ends a strict build
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
NAMES = re.compile(r"<!-- docs/generate\.py: names [\w.]+ -->\n(.*?)<!-- end -->", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page as mkdocs shall see it."""
    return with_docstrings(with_links(markdown, page.file.src_uri, config["repo_url"] or ""))


def with_links(markdown: str, page: str, repository: str) -> str:
    """Links out of docs/ lead to the repository, or are plain text where it has no address."""

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith(("docs/", "/")) and not path.endswith(".py"):
            return link[0]  # mkdocs checks these
        if not Path(path).exists():
            LOG.warning("%s: %s is not there", page, target)
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})" if repository else text

    return LINK.sub(replaced, markdown)


def with_docstrings(markdown: str) -> str:
    """Tables of names become what mkdocstrings makes of the names: signatures and docstrings."""

    def replaced(table: re.Match[str]) -> str:
        return "\n\n".join(f"::: {name}" for name in re.findall(r"^\| `([\w.]+)`", table[1], re.MULTILINE))

    return NAMES.sub(replaced, markdown)
