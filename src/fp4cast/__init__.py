"""Turn an MXFP4 checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.

>>> import fp4cast
>>> report = fp4cast.convert("openai/gpt-oss-20b", "gpt-oss-20b-NVFP4")  # doctest: +SKIP
>>> report.exact  # doctest: +SKIP
True
"""

from fp4cast._version import __version__ as __version__
from fp4cast.casting.one_tensor import Cast, cast
from fp4cast.conversion.convert import convert
from fp4cast.conversion.inspection import Inspection, inspect
from fp4cast.errors import Fp4CastError
from fp4cast.verification.report import Report
from fp4cast.verification.verify import verify

__all__ = ["Cast", "Fp4CastError", "Inspection", "Report", "cast", "convert", "inspect", "verify"]
