"""What the study's page says beside its tables: conclusion, algorithms, pictures. All figures are the document's."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from fp4cast.study.algorithms import TITLES
from fp4cast.study.plots import told

Document = dict[str, Any]

# Two lines each.
ALGORITHMS = """\
- **1, dequantize and requantize.** Weights become BF16, and are quantized as if they had never had 4 bits: S from the
  largest weight, s from the largest of each half-block, codes to the nearest.
- **2, codes verbatim.** All codes stay, s is the power of two in E4M3 nearest to 2^(k−m), and S = 2^m; blocks outside
  of the window lose binades. *2-midpoint* takes the middle of the exponents for m, *2-search* the m of least error.
- **3, hybrid.** In the window like 2; half-blocks outside are requantized as in 1, under S = 2^m. *3* takes
  m = k_max − 8, so that the largest blocks just fit in; *3-sweep* takes the m of least error.
- **4, fp4cast.** If any m is exact, that m: outside of the window codes move by a power of two where they leave room,
  as {2, 4, 6} under s is {1, 2, 3} under 2s. If none is, the scales and codes of least squared error, and any S.
"""

MIXED = """\
Weights that never had 4 bits, such as attention beside experts, can become FP8 (`fp4cast convert --fp8 attention`):
E4M3 codes under a scale for each block of 128 × 128, 8 bits for a weight. That is rounding, not casting. Here are the
weights of some scenarios as BF16, before they were MXFP4, in FP8, in MXFP4 (4.25 bits) and in standard NVFP4 (4.5
bits). Signal to noise, in dB:
"""


def exact_in(document: Document, name: str) -> int:
    """How many scenarios an algorithm casts exactly."""
    return sum(each["algorithms"][name]["exact"] for each in document["scenarios"])


def _median_snr(document: Document, name: str) -> float:
    lost = [each["algorithms"][name] for each in document["scenarios"] if not each["algorithms"][name]["exact"]]
    return float(statistics.median(each["snr_db"] for each in lost))


def conclusion(document: Document) -> str:
    """The study in a paragraph."""
    scenarios, (own, alike) = document["scenarios"], told(document)
    worse = sum("4" not in each["winners"] for each in scenarios)
    status = Counter(each["status"] for each in document["claims"])
    claims = ", ".join(f"{status[each]} {each}" for each in ("reproduced", "corrected", "refuted") if status[each])
    never = f"worse than another in {worse}" if worse else "never worse than any other"
    exact = {name: exact_in(document, name) - len(alike) or "none" for name in TITLES}
    lossy = len(scenarios) - exact_in(document, "1")
    return f"""**Keeping the codes and recomputing the scales is lossless for {len(alike)} of {len(scenarios)} tensors;
dequantizing them and quantizing them again is lossy for {lossy}** ({_median_snr(document, "1"):.0f} dB at the median).
The blocks of the other {len(own)} span more than the 17 binades that NVFP4's scales can follow. Of those, fp4cast's
Algorithm 4 casts {exact["4"]} exactly, the original's Algorithm 3 casts {exact["3"]}, and Algorithm 2
{exact["2-search"]}; 4 is {never}. The claims below: {claims}.
"""


def only_scaled(document: Document) -> list[Document]:
    """The scenarios that are exact under some tensor scale, and not under 1."""
    scenarios = document["scenarios"]
    return [each for each in scenarios if each["algorithms"]["4"]["exact"] and not each["unscaled"]["exact"]]


def without_scale(document: Document) -> str:
    """What S = 1 keeps, in a paragraph."""
    scenarios, lost = document["scenarios"], len(only_scaled(document))
    exact = sum(each["unscaled"]["exact"] for each in scenarios)
    return f"""Some files hold no tensor scale, as GGUF's of gpt-oss and MLX's nvfp4: S is 1, and the window is 2^−9 to
2^8 itself. Exactness then depends on how loud weights are, not on their spread alone. With S = 1, Algorithm 4 casts
{exact} of {len(scenarios)} tensors exactly; with another S it casts {lost} more. Those got the nearest values that
block scales alone allow: what is far too loud is cut off, what is far too quiet becomes zero. fp4cast writes no such
file: it stops, and names the tensors.
"""


def gain(document: Document) -> float:
    """Median SNR that Algorithm 3 gains over 2 beyond a spread of 17, in dB."""
    wide = [errors for spread, errors in document["spread_curve"].items() if int(spread) > 17]
    return 20 * statistics.median(math.log10(errors["2-search"] / errors["3"]) for errors in wide)


class Picture(NamedTuple):
    """What stands below a picture, and what stands for it where it is not seen."""

    caption: str
    alt: Callable[[Document], str]


def _alt_snr(document: Document) -> str:
    own, alike = told(document)
    only = [each["name"] for each in own if [n for n, r in each["algorithms"].items() if r["exact"]] == ["4"]]
    counts = ", ".join(f"{name} in {exact_in(document, name)}" for name in TITLES)
    return (
        f"Signal to noise, a row for each of {len(own)} tensors and one for the other {len(alike)}. Exact: {counts} of "
        f"{len(document['scenarios'])}. Algorithm 4 alone is exact in: {'; '.join(only) or 'none'}."
    )


def _alt_spread(document: Document) -> str:
    at = {int(spread): errors for spread, errors in document["spread_curve"].items()}
    wide = at[max(at)]
    errors = ", ".join(f"{name} {wide[name]:.1g}" for name in TITLES)
    exact = max(spread for spread, errors in at.items() if errors["4"] == 0)
    return (
        f"Relative error against the spread from {min(at)} to {max(at)} binades. All but Algorithm 1 are exact up to "
        f"{exact}; at {max(at)} the errors are: {errors}."
    )


def _alt_exactness(document: Document) -> str:
    lines = document["exactness_map"]
    more = sum("s" in line for line in lines)
    return (
        f"A bar for each kind of half-block, over k − m from −16 to 15: all {len(lines)} sets of magnitudes keep their "
        f"codes from −9 to 8; {more} reach further, by up to three binades, with codes shifted."
    )


def _alt_landing(document: Document) -> str:
    several = [each for each in document["scenarios"] if each["spread"] < 100]
    least = [each for each in several if each["sweep_best_m"][0] <= each["k_max"] - 8 <= each["sweep_best_m"][1]]
    return (
        f"log₂ S − k_max, a row for each tensor: m = k_max − 8 is among the best for Algorithm 3 "
        f"in {len(least)} of {len(several)} tensors."
    )


PICTURES = {
    "snr": Picture(
        "Signal to noise by scenario and algorithm; equal values lie one below the other. What is better than "
        "190 dB and not exact stands at 190. The last row holds the tensors that all but Algorithm 1 cast exactly.",
        _alt_snr,
    ),
    "spread": Picture(
        "Error against the spread of the exponents, uniform for Gaussian blocks: root mean square of the errors over "
        "that of the values. 3-sweep, 3 and 4 coincide.",
        _alt_spread,
    ),
    "exactness": Picture(
        "The tight rule: every set of magnitudes that a half-block can hold, at every offset of its exponent.",
        _alt_exactness,
    ),
    "landing": Picture(
        "Where the tensor scale lands, for spreads under 100. Dotted: k_max − 8; bars: where Algorithm 3 errs least; "
        "hollow marks: S is no power of two.",
        _alt_landing,
    ),
}
