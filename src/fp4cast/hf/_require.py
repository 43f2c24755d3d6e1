"""Import transformers, or raise an error with the install line where it is missing or too old."""

from __future__ import annotations

from fp4cast import _require_torch  # noqa: F401
from fp4cast.errors import MissingExtraError
from fp4cast.extras import require

_transformers = require("transformers", "ptq")
# The loader's interface for quantizers changes, so this checks for a feature of 5.23, not for the version.
if not hasattr(require("transformers.core_model_loading", "ptq").ConversionOps, "supports_many_to_many"):
    raise MissingExtraError(
        f"fp4cast.hf needs transformers 5.23 or newer, {_transformers.__version__} is installed: "
        "pip install --upgrade 'transformers>=5.23'"
    )
