"""The whole study: every scenario under every algorithm, the sweeps, and the claims they judge.

>>> from fp4cast.study.survey import study
>>> document = study(quick=True)  # doctest: +SKIP
>>> document["scenarios"][0]["algorithms"]["4"]["exact"]  # doctest: +SKIP
True
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fp4cast.extras import install_line
from fp4cast.parallel.progress import AdvanceOf
from fp4cast.study.added import ADDED
from fp4cast.study.brute_force import disagreements, exactness_map
from fp4cast.study.claims import Facts, claims
from fp4cast.study.mixed import MIXED, compare
from fp4cast.study.record import examine
from fp4cast.study.scenarios import LARGE, ORIGINAL, SEED, Scenario
from fp4cast.study.sweeps import SPREADS, exact_by_seed, gains, outliers, spread_curve, window_costs

_SEEDS, _QUICK_SEEDS = 20, 3


def _left_out(scenario: Scenario, quick: bool) -> str | None:
    """Why a scenario is not run, or None."""
    missing = [module for module in scenario.extra if importlib.util.find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: {install_line('study')}"
    return f"{scenario.elements:,} weights; run without --quick" if quick and scenario.elements > LARGE else None


def _unjudged(quick: bool) -> dict[str, str]:
    return {"claims about all of the 27": "run without --quick"} if quick else {}


def study(quick: bool = False, progress: AdvanceOf = lambda _done, _total: None) -> dict[str, Any]:
    """Run the study.

    Args:
        quick: leave out scenarios of more than a million weights, and look at fewer seeds and spreads.
        progress: called with (steps just done, steps in all).

    Returns:
        The document that `fp4cast study --json` prints: scenarios, claims, what was left out and why, and the data of
        the plots. Every run gives the same.
    """
    reasons = {scenario.name: _left_out(scenario, quick) for scenario in (*ORIGINAL, *ADDED)}
    chosen = [scenario for scenario in (*ORIGINAL, *ADDED) if reasons[scenario.name] is None]
    spreads, seeds = (range(0, 61, 10), _QUICK_SEEDS) if quick else (SPREADS, _SEEDS)
    total = len(chosen) + len(spreads) + 1
    records, curve = [], {}
    for scenario in chosen:
        records.append(examine(scenario))
        progress(1, total)
    for spread, errors in spread_curve(spreads):
        curve[str(spread)] = errors
        progress(1, total)
    wide = next(scenario for scenario in ORIGINAL if scenario.name == "spread 18")
    mixed = [compare(scenario) for scenario in chosen if scenario.name in MIXED]
    facts = Facts(
        records,
        mixed,
        seeds,
        exact_by_seed(seeds),
        outliers(4 if quick else 16),
        gains(("mixed block scales", "spread 17", "spread 18", "spread 50")),
        window_costs(wide.make()),
        sum(1 for _ in disagreements()),
    )
    progress(1, total)
    return {
        "seed": SEED,
        "quick": quick,
        "scenarios": [record.to_json() for record in records],
        "mixed": [each.to_json() for each in mixed],
        "claims": [claim.to_json() for claim in claims(facts)],
        "left_out": {name: reason for name, reason in reasons.items() if reason} | _unjudged(quick),
        "spread_curve": curve,
        "exactness_map": exactness_map(),
    }
