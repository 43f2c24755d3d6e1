"""Turn an MXFP4 checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.

>>> import fp4cast
>>> report = fp4cast.convert("openai/gpt-oss-20b", "gpt-oss-20b-NVFP4")  # doctest: +SKIP
>>> report.exact  # doctest: +SKIP
True
"""

from __future__ import annotations

from fp4cast._version import __version__ as __version__

TYPE_CHECKING = False  # `typing`, which has it too, takes milliseconds in which Ctrl-C is not in hand yet
if TYPE_CHECKING:
    from fp4cast.casting.one_tensor import Cast, cast
    from fp4cast.conversion.convert import convert
    from fp4cast.conversion.inspection import Inspection, inspect
    from fp4cast.errors import Fp4CastError
    from fp4cast.verification.report import Report
    from fp4cast.verification.verify import verify

__all__ = ["Cast", "Fp4CastError", "Inspection", "Report", "cast", "convert", "inspect", "verify"]

_HOMES = {
    "Cast": "casting.one_tensor",
    "Fp4CastError": "errors",
    "Inspection": "conversion.inspection",
    "Report": "verification.report",
    "cast": "casting.one_tensor",
    "convert": "conversion.convert",
    "inspect": "conversion.inspection",
    "verify": "verification.verify",
}

if not TYPE_CHECKING:  # else a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used: the command line can then start before NumPy is loaded.

        Raises:
            AttributeError: there is no such name.
        """
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
