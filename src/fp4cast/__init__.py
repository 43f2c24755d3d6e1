"""Turn an MXFP4 checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.

>>> import fp4cast
>>> report = fp4cast.convert("openai/gpt-oss-20b", "gpt-oss-20b-NVFP4")  # doctest: +SKIP
>>> report.exact  # doctest: +SKIP
True
"""

__version__ = "0.1.0"

from fp4cast.api import Cast, cast, convert, inspect, verify
from fp4cast.errors import Fp4CastError
from fp4cast.inspection import Inspection
from fp4cast.report import Report

__all__ = ["Cast", "Fp4CastError", "Inspection", "Report", "cast", "convert", "inspect", "verify"]
