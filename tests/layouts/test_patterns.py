"""The entries of `ignore`: the same modules as with `re` and `fnmatch`, and never without a bound of time."""

import re
import time
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4cast.layouts import patterns
from fp4cast.layouts.patterns import PatternError, names_and_expressions, substrings_and_wildcards

MODULES = [
    "lm_head",
    "model.layers.0.mlp.gate",
    "model.layers.1.self_attn.q_proj",
    "x" * 40,
    "a!",
    "new\nline",
    "\ud800",
]
ENTRIES = [
    "lm_head",
    "re:.*self_attn.*",
    r"re:model\.layers\.\d+\.mlp\.(gate|up)$",
    "re:^(?!.*mlp).*",
    "re:",
    "no such module",
    "re:new.line",
]


@settings(max_examples=15, deadline=None)
@given(st.sets(st.sampled_from(ENTRIES)), st.sets(st.sampled_from(MODULES)))
def test_names_and_expressions_are_those_of_re(entries, modules):
    names = [name for name in modules if len(name) < 40]
    expected = {
        name
        for name in names
        for entry in entries
        if entry == name or (entry.startswith("re:") and re.match(entry[3:], name))
    }
    assert names_and_expressions(entries, names) == expected


@given(st.sets(st.sampled_from(["lm_head", "model.layers.1*", "*gate", "layers", "*!"])))
def test_substrings_and_wildcards_are_those_of_fnmatch(entries):
    expected = {name for name in MODULES for entry in entries if entry in name or fnmatchcase(name, entry)}
    assert substrings_and_wildcards(entries, MODULES) == expected


@pytest.mark.parametrize("pattern", ["(.|.)*!", "(x|xx)*y", r"(\w|\w)*!", "(.*x){30}y", "([a-z0-9_.]+)+!"])
def test_a_pattern_that_never_ends_is_refused_in_bounded_time(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(PatternError, match=re.escape(f"ignores 're:{pattern}', a pattern that is not matched within")):
        names_and_expressions(["re:.*q_proj", f"re:{pattern}"], MODULES)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999}", "(?a)(?u)", "(" * 5000, "*"])
def test_what_is_no_pattern_is_said(pattern):
    with pytest.raises(PatternError, match="not a valid pattern") as error:
        names_and_expressions(["re:.*", f"re:{pattern}"], MODULES)
    assert len(str(error.value)) < 300


def test_more_entries_than_can_be_matched_in_time_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", -1.0)
    with pytest.raises(PatternError, match="ignores 2 patterns, too many for 7 modules"):
        substrings_and_wildcards(["a", "b"], MODULES)
