"""The output of commands: one JSON document or text for people, errors as messages and exit codes."""

from __future__ import annotations

import errno
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from fp4cast import errors
from fp4cast.cli import interruption
from fp4cast.cli.progress import Meter, Steps
from fp4cast.cli.streams import Output, printable
from fp4cast.cli.verbosity import ASKED, saying
from fp4cast.errors import Fp4CastError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from fp4cast.verification.report import Difference

T = TypeVar("T")
LOG = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.0  # after a Ctrl-C, until the next one ends the process at once


@dataclass
class Done:
    """What this process has done, for the case that its output is lost.

    Attributes:
        command: its name.
        as_json: whether a document was asked for.
        result: what the library returned; None where it did not.
    """

    command: str = ""
    as_json: bool = False
    result: Any = None

    @property
    def written(self) -> str:
        """What is there now and was not before; empty for a command that only looks."""
        if self.result is None:
            return ""
        if hasattr(self.result, "parts"):  # of a job array
            return f"part {self.result.part} of {self.result.parts} of {self.result.destination}"
        if self.command == "convert":
            return str(self.result.destination)
        if self.command == "ptq":
            return str(self.result.exported.destination)
        return str(self.result.out) if self.command == "calibrate" else ""


DONE = Done()
_GO_ON = {  # after a Ctrl-C, where the library does not say more
    "card": "the card may be half written; the same command, with --overwrite, writes it whole",
    "push": "the same command goes on where this one has stopped",
    "demo": "what was made is deleted, but for a directory that --out names: delete it, or name another one",
}


def people_console(as_json: bool) -> Console:
    """The console for people: stdout, or stderr when stdout carries a JSON document; silent under `--quiet`."""
    from rich.console import Console

    from fp4cast.cli.tables import width_of

    console = Console(stderr=as_json, highlight=False, emoji=False, quiet=ASKED.quiet)
    if width := width_of(console):
        console.width = width
    return console


def exit_with(error: BaseException, as_json: bool, code: int) -> NoReturn:
    """Print an error and exit with a code."""
    message = printable("\n".join([str(error), *getattr(error, "__notes__", ())]))
    LOG.debug("exit status %d: %s", code, message, exc_info=error)
    if as_json:
        print_json({"error": {"type": _public_name(type(error)), "message": message}})
    _print_error(message)
    raise typer.Exit(code)


def exit_unless(ok: bool, what: str, differences: Sequence[Difference]) -> None:
    """Exit with 1 for a check that failed; its report says why, or one line where `--quiet` wants no report."""
    if ok:
        return
    message = f"{what} in {len(differences)} places; the first is {differences[0]}"
    LOG.debug("exit status 1: %s", message)
    if ASKED.quiet:
        _print_error(printable(message))
    raise typer.Exit(1)


def _public_name(kind: type[BaseException]) -> str:
    """The name of an error's class as `fp4cast.errors` has it, also for a private subclass."""
    return next((each.__name__ for each in kind.__mro__ if each.__name__ in errors.__all__), kind.__name__)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False, emoji=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt meanwhile; where `fp4cast.cli.main` began, it ends the process otherwise."""
    is_main = threading.current_thread() is threading.main_thread()  # only that thread may set handlers
    if not is_main or signal.getsignal(signal.SIGINT) is not interruption.end:
        yield
        return
    begin: list[float] = []

    def stop(*_: object) -> None:
        """Raise once; what is said and cleared up then is not cut short by the same finger."""
        begin.append(time.monotonic())
        if len(begin) == 1:
            raise KeyboardInterrupt
        if begin[-1] - begin[0] > _PATIENCE_SECONDS:
            interruption.say("again, while it was cleared up; the next run clears up what is left")
            interruption.end()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if not begin:
            signal.signal(signal.SIGINT, interruption.end)


def run_or_exit(
    as_json: bool, work: Callable[[Any], T], meter_of: type[Meter | Steps] = Meter, *, only_looks: bool = False
) -> T:
    """Do the work under a progress meter; turn the library's errors into messages and exit codes.

    Args:
        as_json: a document is asked for.
        work: is given the meter.
        meter_of: the kind of meter.
        only_looks: the work is none of which the command's end would say that it was done.
    """
    try:
        with _interruptible(), meter_of(people_console(True)) as meter, saying(meter.console):
            DONE.as_json = as_json
            if only_looks:
                return work(meter)
            DONE.result = None
            DONE.result = result = work(meter)
            interruption.say(_was_done())
            LOG.info("done: %s", DONE.written or DONE.command)
            return result
    except UsageError as error:
        exit_with(error, as_json, 2)
    except Fp4CastError as error:
        exit_with(error, as_json, 1)
    except (OSError, MemoryError) as error:
        exit_with(error if str(error) else MemoryError("there is not enough memory"), as_json, 1)
    except KeyboardInterrupt as error:
        how = " ".join(getattr(error, "__notes__", ()))
        if not how:
            how = _GO_ON.get(DONE.command, interruption.AGAIN) if DONE.result is None else _was_done()
        exit_with(KeyboardInterrupt(f"interrupted: {how}"), as_json, interruption.STATUS)


def _was_done() -> str:
    return f"{DONE.written} was written; only its report is lost" if DONE.written else interruption.AGAIN


def print_json(document: dict[str, Any]) -> None:
    """Print the document that `--json` asks for."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def finish_output(output: Output | None, code: int) -> int:
    """Flush stdout, and say if what was written to it is lost.

    Args:
        output: what lies below stdout.
        code: the exit status that the command ends with.

    Returns:
        The exit status: of a command that has written what it was asked for it stays 0, but not where the document of
        `--json` is lost.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    if output is None or output.lost is None:
        return code
    written = DONE.written
    if output.lost.errno != errno.EPIPE:  # a reader that has seen enough, such as `head`, wants no message
        _print_error(printable(f"stdout: {output.lost.strerror}" + (f"; {written} was written" if written else "")))
    return code or (0 if written and not DONE.as_json else 1)
