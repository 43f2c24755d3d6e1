"""Import torch, or raise an error with the install line; modules that need torch import this one first."""

from __future__ import annotations

from fp4cast.extras import require

require("torch", "ptq")
