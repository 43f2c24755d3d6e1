"""The command line: arguments, progress, tables, exit codes. Knows how to ask and to show; the library decides."""

from __future__ import annotations

from fp4cast.cli.app import main

__all__ = ["main"]
