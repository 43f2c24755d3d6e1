"""The command line: arguments, progress, tables, exit codes. Decides nothing that the library does not know."""

from __future__ import annotations

from fp4cast.cli.app import main

__all__ = ["main"]
