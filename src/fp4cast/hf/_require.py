"""Imported first by `fp4cast.hf`: where transformers is missing or too old, the error gives the install line."""

from __future__ import annotations

from fp4cast import _require_torch  # noqa: F401
from fp4cast.errors import MissingExtraError
from fp4cast.extras import require

_transformers = require("transformers", "ptq")
# Its loader's interface for quantizers changes; what is new in 5.23 is asked for, not the number.
if not hasattr(require("transformers.core_model_loading", "ptq").ConversionOps, "supports_many_to_many"):
    raise MissingExtraError(
        f"fp4cast.hf needs transformers 5.23 or newer, {_transformers.__version__} is installed: "
        "pip install --upgrade 'fp4cast[ptq]' 'transformers>=5.23'"
    )
