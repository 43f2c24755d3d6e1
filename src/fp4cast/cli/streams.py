"""stdout and stderr of a process: any text can be written to them, whatever their encoding."""

from __future__ import annotations

import codecs
import io
import sys

# What rich and typer draw, where the encoding has no such characters.
_DRAWN = dict(zip("█━╸╺─│╭╮╰╯┌┐└┘├┤┬┴┼•…", "#---" + "-|" + "+" * 13 + "*.", strict=True))


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: lines and bars by what looks like them, the rest by escapes, as stderr does."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_DRAWN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def open_streams() -> None:
    """Let stdout and stderr take any character."""
    codecs.register_error("fp4cast", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fp4cast")
