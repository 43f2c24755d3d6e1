"""stdout and stderr of a process: any text can be written, and a reader that is gone or a full disk stops no work."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What rich and typer draw, where the encoding has no such characters.
_DRAWN = dict(zip("█━╸╺─│╭╮╰╯┌┐└┘├┤┬┴┼•…", "#---" + "-|" + "+" * 13 + "*.", strict=True))


def printable(text: str) -> str:
    """Drop the control characters, which a terminal would obey, from a checkpoint's text."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: lines and bars by what looks like them, the rest by escapes, as stderr does."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_DRAWN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


class Output(io.FileIO):
    """A descriptor that remembers the first error of a write, and drops what could not be written.

    Raised where it happens, the error would end a conversion that is done, or the report of a check that failed, and
    come again when the interpreter flushes its streams.

    Attributes:
        lost: the first error.
    """

    lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def _reopen(stream: TextIO | None) -> tuple[TextIO | None, Output | None]:
    """A stream that loses what it cannot write, and the descriptor below it; one that is no file is left as it is."""
    if stream is None:  # closed by the caller: a file opened later must not take its number
        raw, encoding, by_line = Output(os.open(os.devnull, os.O_RDONLY), "w"), "utf-8", False
    elif isinstance(stream, io.TextIOWrapper):
        stream.flush()
        raw, encoding, by_line = Output(stream.fileno(), "w", closefd=False), stream.encoding, stream.line_buffering
    else:
        return stream, None
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=encoding, errors="fp4cast", line_buffering=by_line), raw


def open_streams() -> Output | None:
    """Let stdout and stderr take any character, and outlive their readers.

    Returns:
        What lies below stdout; None where it is no file.
    """
    codecs.register_error("fp4cast", _spell)
    sys.stdout, output = _reopen(sys.stdout)
    sys.stderr, _ = _reopen(sys.stderr)
    return output
