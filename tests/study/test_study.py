"""The study: algorithms against independent references, exact errors, the kept page, and what the page says."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4cast.casting import tight_rule as exact
from fp4cast.cli.app import app
from fp4cast.extras import install_line
from fp4cast.formats import E2M1, E4M3, mxfp4_values, nvfp4_values
from fp4cast.study import algorithms, brute_force, mixed, page
from fp4cast.study.added import ADDED
from fp4cast.study.algorithms import ALGORITHMS, closed_form, hybrid, requantize, sweep_errors
from fp4cast.study.claims import Facts, claims
from fp4cast.study.measure import measure
from fp4cast.study.plots import told
from fp4cast.study.record import examine
from fp4cast.study.scenarios import LARGE, ORIGINAL, Scenario
from fp4cast.study.survey import study
from fp4cast.study.tensors import Mxfp4, nearest, quantize
from standard import equally_near, standard_nvfp4

KEPT = Path(__file__).parents[2] / "docs" / "study"
KNOWN = {"github.com", "www.w3.org", "purl.org", "creativecommons.org"}  # a link, and SVG's vocabularies
STATUSES = {"reproduced", "corrected", "refuted"}


@pytest.fixture(scope="module")
def kept():
    return json.loads((KEPT / "study.json").read_text())


@pytest.fixture(scope="module")
def quick():
    return study(quick=True)


def values(source: Mxfp4):
    return mxfp4_values(source.codes, source.exponents[:, None])


def written_values(out):
    return nvfp4_values(out.codes, out.block_scales, out.tensor_scale)


@st.composite
def tensors(draw):
    """A few blocks of any exponents and codes, zeros and one-sided sets among them, finite in BF16."""
    blocks = draw(st.integers(1, 6))
    exponents = draw(st.lists(st.integers(0, 252), min_size=blocks, max_size=blocks))
    near = draw(st.booleans())
    if near:
        base = draw(st.integers(0, 226))
        exponents = [base + draw(st.integers(0, 26)) for _ in exponents]
    allowed = draw(st.sampled_from([range(16), (0, 6, 14), (0, 1, 9), (4, 6, 7, 12), (0, 1, 2, 3), (0, 8)]))
    codes = draw(st.lists(st.sampled_from(list(allowed)), min_size=32 * blocks, max_size=32 * blocks))
    low, high = np.array(codes, np.uint8).reshape(blocks, 16, 2).transpose(2, 0, 1)
    return Mxfp4(low | high << np.uint8(4), np.array(exponents, np.uint8), (blocks, 32))


def test_rounding_is_that_of_ml_dtypes():
    rng = np.random.default_rng(0)
    table = E4M3.values[:0x7F]
    middle = (table[:-1] + table[1:]) / 2
    single = middle.astype(np.float32)  # ml_dtypes rounds to FP32 first: neighbours of a tie must be FP32's
    near = [np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(500))]
    points = np.concatenate([table, middle, *near, rng.uniform(0, 448, 9999).astype(np.float32)])
    expected = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(nearest(table, points), expected)
    fours = np.concatenate([np.arange(0, 6, 0.125), rng.uniform(0, 6, 999)])
    assert np.array_equal(
        E2M1.values[nearest(E2M1.values[:8], fours)], fours.astype(ml_dtypes.float4_e2m1fn).astype(float)
    )


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32))
def test_quantizing_takes_the_smallest_scale_that_does_not_saturate(block):
    source = quantize(np.array(block))
    amax, k = max(map(abs, block)), int(source.exponents[0]) - 127
    assert amax <= 6 * 2.0**k
    assert k == -127 or amax > 6 * 2.0 ** (k - 1)
    ours = values(source)[0]
    theirs = (np.array(block) / 2.0**k).astype(ml_dtypes.float4_e2m1fn).astype(float) * 2.0**k
    assert np.array_equal(ours, theirs)


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_errors_are_those_of_the_values_in_exact_arithmetic(source):
    for algorithm in ALGORITHMS.values():
        out = algorithm(source)
        found = measure(source, out)
        pairs = zip(values(source).reshape(-1), written_values(out).reshape(-1), strict=True)
        errors = [abs(Fraction(a) - Fraction(b)) for a, b in pairs]
        assert found.squared == sum(error**2 for error in errors)
        assert found.largest == max(errors)
        assert found.elements == len(errors)
        assert found.energy == sum(Fraction(a) ** 2 for a in values(source).reshape(-1))


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_ours_is_never_worse(source):
    errors = {name: measure(source, algorithm(source)).squared for name, algorithm in ALGORITHMS.items()}
    assert errors["4"] == min(errors.values())
    assert errors["3-sweep"] <= errors["3"] <= min(errors["2-midpoint"], errors["2-search"])
    assert errors["2-search"] <= errors["2-midpoint"]


@given(tensors())
@settings(max_examples=100, deadline=None)
def test_without_a_tensor_scale_no_block_scale_does_better(source):
    """Every half-block of every positive E4M3 scale, rounded by ml_dtypes: none errs less than what S = 1 gave."""
    out = algorithms.unscaled(source)
    assert (out.tensor_scale, out.m) == (1.0, 0)
    x = values(source).reshape(-1, 1, 16)
    steps = E4M3.values[1:0x7F, None]
    tried = np.clip(x / steps, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(float) * steps
    least = ((tried - x) ** 2).sum(axis=2).min(axis=1)
    ours = ((written_values(out).reshape(-1, 16) - x[:, 0]) ** 2).sum(axis=1)
    assert np.allclose(ours, least, rtol=1e-12, atol=0)
    assert measure(source, out).exact == (not least.any())


@given(tensors())
@settings(max_examples=50, deadline=None)
def test_the_sweep_weighs_what_would_be_written(source):
    for m, error in sweep_errors(source).items():
        assert measure(source, hybrid(source, m)).squared == error


@given(tensors())
@settings(max_examples=50, deadline=None)
def test_algorithm_2_searches_every_m(source):
    best = measure(source, ALGORITHMS["2-search"](source)).squared
    for m in range(source.k_min - 12, source.k_max + 13):
        if -149 <= m <= 125:
            assert best <= measure(source, algorithms.verbatim(source, m)).squared


def test_algorithm_1_is_standard_nvfp4():
    for name in ("gaussian", "heavy tail", "mostly zero", "spread 50", "single extreme outlier", "power law"):
        source = next(s for s in ORIGINAL if s.name == name).make()
        ours, theirs = written_values(requantize(source)), standard_nvfp4(values(source))
        assert equally_near(values(source).reshape(-1), ours.reshape(-1), theirs)


def test_algorithm_1_refuses_what_bf16_makes_infinite():
    with pytest.raises(OverflowError, match="infinite in BF16"):
        requantize(Mxfp4(np.full((1, 16), 0x77, np.uint8), np.array([254], np.uint8)))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_algorithm_1_is_what_modelopt_writes():
    torch = pytest.importorskip("torch")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source = next(s for s in ORIGINAL if s.name == "gaussian").make()
    bf16 = torch.from_numpy(values(source)).to(torch.bfloat16)
    packed, scales, tensor_scale = NVFP4QTensor.quantize(bf16, 16)
    out = requantize(source)
    assert float(tensor_scale) == out.tensor_scale
    assert np.array_equal(scales.view(torch.uint8).numpy().reshape(-1, 2), out.block_scales)
    theirs = nvfp4_values(packed._quantized_data.numpy().reshape(-1, 16), out.block_scales, out.tensor_scale)
    assert equally_near(values(source), written_values(out), theirs)


def test_there_are_27_and_names_are_unique():
    names = [scenario.name for scenario in (*ORIGINAL, *ADDED)]
    assert len(ORIGINAL) == 27
    assert len(set(names)) == len(names)
    assert all(scenario.original for scenario in ORIGINAL) and not any(scenario.original for scenario in ADDED)


@pytest.mark.parametrize("scenario", [s for s in (*ORIGINAL, *ADDED) if s.elements <= LARGE], ids=lambda s: s.name)
def test_scenarios_are_what_they_say(scenario: Scenario):
    source = scenario.make()
    assert source.codes.shape == (len(source.exponents), 16)
    assert source.exponents.max() < 255
    assert 32 * len(source.exponents) == scenario.elements == np.prod(source.shape)
    again = scenario.make()
    assert np.array_equal(source.codes, again.codes) and np.array_equal(source.exponents, again.exponents)
    if match := re.search(r"code-.*spread (\d+)", scenario.name):
        assert source.spread == int(match[1])


def test_the_tight_rule_is_brute_force():
    assert list(brute_force.disagreements()) == []


def test_the_code_that_casts_uses_the_same_shifts():
    for members in brute_force.SETS:
        assert (exact.A_MIN[members], exact.A_MAX[members]) == brute_force._shifts(members)


def test_what_the_captions_say_is_true(kept):
    for errors in kept["spread_curve"].values():
        assert errors["3-sweep"] == errors["3"] == errors["4"]


def test_brute_force_would_notice(monkeypatch):
    right = brute_force.rule
    monkeypatch.setattr(brute_force, "rule", lambda members, e: right(members, e) != (members == 5 and e == 9))
    assert list(brute_force.disagreements()) == [(5, 9)]
    assert brute_force.main() == 1


def test_the_document_has_the_promised_keys(quick):
    for scenario in quick["scenarios"]:
        assert {"name", "shape", "spread", "blocks", "outside", "algorithms"} <= set(scenario)
        assert list(scenario["algorithms"]) == ["1", "2-midpoint", "2-search", "3-sweep", "3", "4"]
        for result in scenario["algorithms"].values():
            assert set(result) == {"m", "tensor_scale", "mse", "max_abs_error", "snr_db", "exact"}
            assert (result["snr_db"] is None) == result["exact"] == (result["mse"] == 0)
            assert result["m"] is None or result["tensor_scale"] == 2.0 ** result["m"]
        free, unscaled = scenario["algorithms"]["4"], scenario["unscaled"]
        assert set(unscaled) == set(free) and (unscaled["m"], unscaled["tensor_scale"]) == (0, 1.0)
        assert (unscaled["snr_db"] is None) == unscaled["exact"] and unscaled["mse"] >= free["mse"]
    for each in quick["mixed"]:
        assert set(each) == {"name", "snr_db"} and list(each["snr_db"]) == ["FP8", "MXFP4", "NVFP4"]
    for claim in quick["claims"]:
        assert set(claim) == {"claim", "status", "figure"} and claim["status"] in STATUSES
    assert json.loads(json.dumps(quick, allow_nan=False)) == quick


def same(found, expected):
    """Documents agree: numbers to nine digits, for other processors' powers and logarithms, all else exactly."""
    if isinstance(expected, float) and isinstance(found, float):
        return found == pytest.approx(expected, rel=1e-9)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_quick_figures_are_the_kept_ones(quick, kept):
    by_name = {scenario["name"]: scenario for scenario in kept["scenarios"]}
    assert len(quick["scenarios"]) > 30
    for scenario in quick["scenarios"]:
        assert same(scenario, by_name[scenario["name"]]), scenario["name"]
    assert same(quick["mixed"], [each for each in kept["mixed"] if each["name"] != "real weights"])
    assert same(quick["spread_curve"], {key: kept["spread_curve"][key] for key in quick["spread_curve"]})
    assert quick["exactness_map"] == kept["exactness_map"]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_kept_document_is_what_the_code_gives(kept):
    assert same(study(), kept)


def test_the_kept_claims(kept):
    status = {claim["claim"].split(".")[0]: claim["status"] for claim in kept["claims"]}
    assert len(kept["scenarios"]) == 27 + len(ADDED) and not kept["left_out"]
    assert list(status.values()).count("refuted") == 0
    assert all(state == "reproduced" for claim, state in status.items() if claim.startswith("Ours"))


def test_the_kept_page_is_made_of_the_kept_document(kept):
    assert page.markdown(kept) == (KEPT / "index.md").read_text()
    text = (KEPT / "index.html").read_text()
    assert text == page.html(page.markdown(kept), {name: (KEPT / f"{name}.svg").read_text() for name in page.PLOTS})
    assert set(re.findall(r"https?://([^/\"]+)", text)) <= KNOWN
    assert text.count("<svg") == 4 and "<img" not in text and "<script" not in text


def test_the_page_works_wherever_it_lies():
    """In `--out DIR` there is nothing beside it but what the study writes."""
    text = (KEPT / "index.html").read_text()
    links, ids = (
        re.findall(r'href="([^"]+)"', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)),
        set(re.findall(r'id="([^"]+)"', text)),
    )
    assert "#the-proof" in links and len(ids) == len(re.findall(r'\bid="', text))
    for link in links:
        assert link.startswith("https://") or link[1:] in ids, link
    written = {f"{name}.svg" for name in page.PLOTS}
    for link in re.findall(r"\]\(([^)]+)\)", (KEPT / "index.md").read_text()):
        assert link.startswith("https://") or link[1:] in ids or link in written, link
    # The proof itself is there, from its formats to its end, and not a reference to it.
    proof = text.split('id="the-proof"')[1]
    assert "if and only if" in proof and proof.count("∎") == 3 and text.count("<details>") == 4


def test_the_page_begins_with_a_conclusion_that_is_true(kept):
    beginning = " ".join(page.markdown(kept).split("## ")[0].split())
    exact = {name: [s["algorithms"][name]["exact"] for s in kept["scenarios"]] for name in ALGORITHMS}
    narrow = [s["spread"] <= 17 for s in kept["scenarios"]]
    kept_codes = [all(each) for each in zip(*(exact[name] for name in ALGORITHMS if name != "1"), strict=True)]
    assert kept_codes == narrow  # so that the text may speak of the other tensors as those that span more
    assert f"is lossless for {sum(narrow)} of {len(narrow)} tensors" in beginning
    assert f"is lossy for {exact['1'].count(False)}**" in beginning
    three, four = (sum(exact[name]) - sum(narrow) for name in ("3", "4"))
    assert (
        f"Algorithm 4 casts {four} exactly, the original's Algorithm 3 casts {three}, and Algorithm 2 none" in beginning
    )
    assert "4 is never worse than any other" in beginning and "claims below: 11 reproduced, 4 corrected." in beginning


def test_a_conclusion_is_no_better_than_the_figures(kept):
    worse = json.loads(json.dumps(kept))
    worse["scenarios"][4]["winners"] = ["3"]
    worse["claims"][0]["status"] = "refuted"
    text = page.markdown(worse)
    assert "4 is worse than another in 1." in text and "10 reproduced, 4 corrected, 1 refuted." in text


def test_pictures_have_few_rows_and_are_told_in_words(kept):
    own, alike = told(kept)
    assert len(own) + len(alike) == len(kept["scenarios"]) and len(own) < 20
    text = (KEPT / "index.html").read_text()
    alts = dict(zip(page.PLOTS, re.findall(r'<svg role="img" aria-label="([^"]+)"', text), strict=True))
    counts = {name: sum(s["algorithms"][name]["exact"] for s in kept["scenarios"]) for name in ALGORITHMS}
    assert ", ".join(f"{name} in {count}" for name, count in counts.items()) in alts["snr"]
    assert (
        f"exact up to {max(int(s) for s, e in kept['spread_curve'].items() if not any(list(e.values())[2:]))}"
        in alts["spread"]
    )
    assert sum("s" in line for line in kept["exactness_map"]) == 55 and "55 reach further" in alts["exactness"]
    for name in page.PLOTS:
        assert f"![{alts[name]}]({name}.svg)" in (KEPT / "index.md").read_text()
        assert "prefers-color-scheme: dark" in (KEPT / f"{name}.svg").read_text()


@pytest.mark.oracle
def test_the_command_writes_the_page(tmp_path, kept, monkeypatch):
    monkeypatch.setattr("fp4cast.study.survey.study", lambda *_: kept)
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "page"), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == kept
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names == {"index.md", "index.html", "study.json", "snr.svg", "spread.svg", "exactness.svg", "landing.svg"}
    assert (tmp_path / "page" / "study.json").read_text() == (KEPT / "study.json").read_text()


def test_the_command_prints_tables_and_claims(quick, monkeypatch):
    monkeypatch.setattr("fp4cast.study.survey.study", lambda *_: quick)
    result = CliRunner().invoke(app, ["study", "--quick"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "single extreme outlier" in result.stdout and "reproduced" in result.stdout
    assert "left out: QKV weight (16,777,216 weights; run without --quick)" in result.stdout


def test_what_fails_fails_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("fp4cast.study.survey.study", lambda *_: pytest.fail("worked first"))
    (tmp_path / "file").write_text("")
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1 and "is a file; --out takes a directory" in result.stderr
    monkeypatch.setattr("fp4cast.extras.importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "page")])
    assert result.exit_code == 1 and install_line("study") in result.stderr
    assert not (tmp_path / "page").exists()


def test_scenarios_that_need_more_say_so(monkeypatch):
    monkeypatch.setattr("fp4cast.study.survey.importlib.util.find_spec", lambda _: None)
    from fp4cast.study.survey import _left_out

    real = next(scenario for scenario in ADDED if scenario.extra)
    assert _left_out(real, quick=False) == f"wordllama and gfloat not installed: {install_line('study')}"


def test_a_claim_that_fails_is_refuted():
    """Ours, on results in which 4 has been swapped with 3."""
    names = ("code-rich, spread 18", "code-poor above, spread 20", "experts, one domain", "quiet bank", "loud bank")
    chosen = [s for s in (*ORIGINAL, *ADDED) if s.name in (*names, "LayerNorm gain") or s.name.startswith("expert ")]
    records = [examine(scenario) for scenario in chosen]
    facts = Facts(records, [mixed.compare(chosen_by("gaussian"))], 1, {}, [], {}, (1e9, 1.0), 0)
    assert ours(facts) == ["reproduced"] * 6
    swapped = [replace(r, errors=r.errors | {"4": r.errors["3"], "3": r.errors["4"]}) for r in records]
    assert ours(replace(facts, records=swapped, disagreements=1)) == ["refuted"] * 3 + ["reproduced"] * 3
    lossy = next(r.unscaled for r in records if r.scenario.name == "loud bank")
    unscaled = [replace(r, unscaled=lossy) if r.scenario.name == "LayerNorm gain" else r for r in records]
    assert ours(replace(facts, records=unscaled)) == ["reproduced"] * 3 + ["refuted", "reproduced", "reproduced"]
    exact = [replace(r, unscaled=r.errors["4"]) for r in records]
    assert ours(replace(facts, records=exact)) == ["reproduced"] * 3 + ["refuted", "refuted", "reproduced"]
    worse = [mixed.Mixed("gaussian", {"FP8": 28.0, "MXFP4": 18.5, "NVFP4": 29.0})]
    assert ours(replace(facts, mixed=worse)) == ["reproduced"] * 5 + ["refuted"]
    assert "in all but: gaussian" in claims(replace(facts, mixed=worse))[-1].figure


def chosen_by(name: str) -> Scenario:
    return next(s for s in ORIGINAL if s.name == name)


def ours(facts: Facts) -> list[str]:
    return [claim.status for claim in claims(facts) if claim.claim.startswith("Ours")]


def test_a_tie_is_a_tie_and_a_win_is_a_win():
    record = examine(next(s for s in ORIGINAL if s.name == "gaussian"))
    assert record.winners() == ["2-midpoint", "2-search", "3-sweep", "3", "4"]
    assert record.ratio("1", "3") is None and record.ratio("3", "1") == 0
    outlier = examine(next(s for s in ORIGINAL if s.name == "single extreme outlier"))
    assert outlier.ratio("3", "1") > 1 >= outlier.ratio("4", "1")
    assert measure(outlier.scenario.make(), closed_form(outlier.scenario.make())).squared == outlier.errors["3"].squared
