"""The command line: arguments, progress, tables, exit codes. Knows how to ask and to show; the library decides."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Entry point.

    Ctrl-C ends the process at once and silently while modules are loaded, a few tenths of a second; `run_or_exit`
    takes it over where there is work to stop.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fp4cast.cli.app import main as run

    run()
