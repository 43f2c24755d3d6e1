"""What tests of the documents share: reading them, every change of a place in them, and a judge of both."""

import copy
import json
import re

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import Fp4CastError
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.engine_view import read_claims
from fp4cast.layouts.layout import select
from fp4cast.verification.configs import config_faults

CONFIG, BESIDE = "config.json", "hf_quant_config.json"


def leaves(document, at=()):
    """The path of everything in a document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*at, key))


def holder(document, path):
    for key in path[:-1]:
        document = document[key]
    return document


def changes(document, path):
    """Copies of a document with one place changed, by what was done."""
    key = path[-1]
    value = holder(document, path)[key]
    new = {"null": None, "an object": {}, "text": "x"}
    if isinstance(value, bool):
        new["flipped"] = not value
    elif isinstance(value, int | float):
        new |= {"one more": value + 1, "negative": -value, "as text": str(value)}
    elif isinstance(value, str):
        new |= {"longer": value + "x", "shorter": value[:-1], "capitals": value.swapcase()}
    edits = {name: lambda d, n=n: d.update({key: n}) if isinstance(d, dict) else d.__setitem__(key, n)
             for name, n in new.items() if n != value}  # fmt: skip
    edits["removed"] = lambda d: d.pop(key)
    if isinstance(key, str):
        edits["renamed"] = lambda d: d.update({f"{key}x": d.pop(key)})
    if isinstance(value, dict):
        edits["extended"] = lambda d: d[key].update(another=1)
    elif isinstance(value, list):
        edits["extended"] = lambda d: d[key].append("another")
    for name, edit in edits.items():
        changed = copy.deepcopy(document)
        edit(holder(changed, path))
        yield name, changed


def judge(source, layout, activations):
    """A function that tells whether a pair of documents is accepted."""
    found = read_source(open_checkpoint(source))
    target = choose_target(found.family, layout, activations)
    selection = select(found, target)

    def accepted(documents):
        try:
            claims = read_claims(documents[CONFIG])
            return not config_faults(documents[CONFIG], documents.get(BESIDE), claims, found, target, selection)
        except Fp4CastError:
            return False

    return accepted


def in_this_process(expressions, modules):
    """What `patterns` does in a process of its own, for the few patterns of miniatures."""
    return [[i for i, name in enumerate(modules) if re.match(each, name)] for each in expressions]


def documents_of(path):
    return {name: json.loads((path / name).read_text()) for name in (CONFIG, BESIDE) if (path / name).exists()}
