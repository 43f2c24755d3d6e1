"""The command line: arguments, progress, tables, exit codes. Knows how to ask and to show; the library decides."""

from __future__ import annotations

import gc
import os

from fp4cast.cli import interruption

__all__ = ["main"]


def main() -> None:
    """Entry point.

    Ctrl-C ends the process at once while modules are loaded, a few tenths of a second; `run_or_exit` takes it over
    where there is work to stop.
    """
    interruption.take_over()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's own threads, for which there is no work
    gc.disable()  # while modules are loaded, which is all that is made here
    from fp4cast.cli.app import main as run

    run()
