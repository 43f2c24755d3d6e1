"""Imported first by what needs torch: where it is missing, the error gives the install line."""

from __future__ import annotations

from fp4cast.extras import require

require("torch", "ptq")
