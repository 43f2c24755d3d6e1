"""Ctrl-C where there is no work to stop: one sentence, exit status 130. In hand before anything large is loaded."""

from __future__ import annotations

import os
import signal
import sys

AGAIN = "nothing was written; the same command begins anew"
STATUS = 130
_said: list[str] = []


def end(*_: object) -> None:
    """End the process now: a handler of signals."""
    message = f"interrupted: {_said[-1] if _said else AGAIN}"
    if not _said and "--json" in sys.argv:  # else a document may have begun
        _write(1, f'{{"error": {{"type": "KeyboardInterrupt", "message": "{message}"}}}}\n')
    _write(2, f"error: {message}\n")
    os._exit(STATUS)


def _write(descriptor: int, text: str) -> None:
    try:
        os.write(descriptor, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return  # nobody reads


def say(sentence: str) -> None:
    """What `end` says from now on."""
    _said.append(sentence)


def take_over() -> None:
    """Let Ctrl-C end the process by `end`, unless a shell has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
