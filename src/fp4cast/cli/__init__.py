"""The command line: arguments, progress, tables, exit codes. Knows how to ask and to show; the library decides."""

from __future__ import annotations

import gc

from fp4cast.cli import interruption

__all__ = ["main"]


def main() -> None:
    """Entry point.

    Ctrl-C ends the process at once while modules are loaded, a few tenths of a second; `run_or_exit` takes it over
    where there is work to stop.
    """
    interruption.take_over()
    gc.disable()  # while modules are loaded, which is all that is made here
    from fp4cast.cli.app import main as run

    run()
