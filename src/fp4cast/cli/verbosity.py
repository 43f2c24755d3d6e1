"""How much is said, and where: `-q`, `-v` and `--log`, all through the logger of the package."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp4cast import __version__
from fp4cast.cli.streams import printable
from fp4cast.errors import DestinationError

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = logging.getLogger("fp4cast")
LOG = logging.getLogger(__name__)


@dataclass
class Verbosity:
    """What was asked for.

    Attributes:
        quiet: no progress and no summary.
        verbose: each step, too.
    """

    quiet: bool = False
    verbose: bool = False


ASKED = Verbosity()


class _Sentences(logging.Handler):
    """Print what the library logs, as sentences among the progress."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO if ASKED.verbose else logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        from rich.markup import escape

        text = escape(printable(record.getMessage()))
        start = "[yellow]note:[/]" if record.levelno >= logging.WARNING else f"[dim]{time.strftime('%H:%M:%S')}[/]"
        self.console.print(f"{start} {text}", soft_wrap=True)


@contextmanager
def saying(console: Console) -> Iterator[None]:
    """Print notes, and the steps if they were asked for, while there is work."""
    from rich.console import Console

    handler = _Sentences(Console(stderr=True, highlight=False, emoji=False) if console.quiet else console)
    PACKAGE.addHandler(handler)
    propagate, PACKAGE.propagate = PACKAGE.propagate, False
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.propagate = propagate


@contextmanager
def asked(*, quiet: bool, verbose: bool, log: Path | None) -> Iterator[None]:
    """Follow the options of one command.

    Raises:
        DestinationError: the log cannot be written.
    """
    try:
        file = None if log is None else logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DestinationError(f"--log {log}: cannot be written: {error.strerror}") from error
    level = PACKAGE.level
    ASKED.quiet, ASKED.verbose = quiet, verbose
    if file:
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        PACKAGE.addHandler(file)
    if file or verbose:
        PACKAGE.setLevel(logging.DEBUG if file else logging.INFO)
    LOG.debug("fp4cast %s, Python %s: %s", __version__, sys.version.split()[0], " ".join(sys.argv[1:]))
    try:
        yield
    finally:
        if file:
            PACKAGE.removeHandler(file)
            file.close()
        PACKAGE.setLevel(level)
        ASKED.quiet = ASKED.verbose = False
