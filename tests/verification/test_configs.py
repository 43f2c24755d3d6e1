"""Every leaf of the documents says what engines need, and a change of it is found, without a receipt, too."""

import copy
import json
import re
import shutil

import pytest

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import Fp4CastError
from fp4cast.families.recognise import read_source
from fp4cast.layouts import patterns
from fp4cast.layouts.choose import choose_target
from fp4cast.layouts.engine_view import read_claims
from fp4cast.layouts.layout import select
from fp4cast.verification.configs import config_faults
from helpers import VARIANTS, call, plain

CONFIG, BESIDE = "config.json", "hf_quant_config.json"


@pytest.fixture(scope="module")
def variants(miniatures, tmp_path_factory):
    """Every family in every layout, without a receipt."""
    root = tmp_path_factory.mktemp("variants")
    for kind, layout, activations in VARIANTS:
        path, scales = root / f"{kind}-{layout}-{activations}", 1.0 if activations == "w4a4" else None
        fp4cast.convert(miniatures[kind], path, layout=layout, activations=activations, input_scales=scales)
        (path / "fp4cast.json").unlink()
    return root


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


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS)
def test_every_change_of_a_leaf_is_found_without_a_receipt(
    miniatures, variants, kind, layout, activations, monkeypatch
):
    monkeypatch.setattr(patterns, "_match", in_this_process)
    documents = documents_of(variants / f"{kind}-{layout}-{activations}")
    accepted = judge(miniatures[kind], layout, activations)
    assert accepted(documents)
    missed, tried = [], 0
    for file, document in documents.items():
        for path in leaves(document):
            for what, changed in changes(document, path):
                tried += 1
                if accepted({**documents, file: changed}):
                    missed.append((file, path, what))
    assert not missed
    assert tried > 150


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "kimi-k3", "dense"])
def test_verify_finds_such_changes(miniatures, variants, tmp_path, kind):
    """The judgement above is what `verify` asks."""
    of_kind = [variant for variant in VARIANTS if variant[0] == kind]
    for _, layout, activations in of_kind:
        path = shutil.copytree(variants / f"{kind}-{layout}-{activations}", tmp_path / f"{layout}-{activations}")
        assert fp4cast.verify(miniatures[kind], path).ok
        for file, document in documents_of(path).items():
            for place in list(leaves(document))[::9]:
                _, changed = next(iter(changes(document, place)))
                (path / file).write_text(json.dumps(changed))
                try:
                    assert not fp4cast.verify(miniatures[kind], path, jobs=1).ok, (file, place)
                except Fp4CastError as error:
                    assert "config.json" in str(error)
            (path / file).write_text(json.dumps(document))


# What no engine could notice, by name, and why.
ALLOWED = {
    "the producer's version in both documents": "free text, which nothing reads",
    "an entry of `ignore` twice": "it means the same modules",
    "`ignore` in another order": "it means the same modules",
}


def new_version(documents):
    documents[CONFIG]["quantization_config"]["producer"]["version"] = "9"
    documents[BESIDE]["producer"]["version"] = "9"


def ignore_again(documents):
    documents[CONFIG]["quantization_config"]["ignore"] *= 2
    documents[BESIDE]["quantization"]["exclude_modules"] *= 2


def ignore_backwards(documents):
    documents[CONFIG]["quantization_config"]["ignore"].reverse()
    documents[BESIDE]["quantization"]["exclude_modules"].reverse()


@pytest.mark.parametrize(
    ("name", "change"), list(zip(ALLOWED, [new_version, ignore_again, ignore_backwards], strict=True))
)
def test_what_no_engine_could_notice_is_allowed(miniatures, variants, name, change):
    documents = documents_of(variants / "gpt-oss-modelopt-w4a16")
    change(documents)
    assert judge(miniatures["gpt-oss"], "modelopt", "w4a16")(documents), name


def test_the_config_of_another_layout_is_left_beside_compressed_tensors(miniatures, variants):
    documents = documents_of(variants / "dense-compressed-tensors-w4a16")
    documents[BESIDE] = documents_of(variants / "dense-modelopt-w4a16")[BESIDE]
    assert not judge(miniatures["dense"], "compressed-tensors", "w4a16")(documents)


def test_a_missing_receipt_is_said(miniatures, converted, variants):
    assert fp4cast.verify(miniatures["gpt-oss"], converted["gpt-oss"]).notes == ()
    path = variants / "gpt-oss-modelopt-w4a4"
    report = fp4cast.verify(miniatures["gpt-oss"], path)
    assert report.ok and report.exact
    (note,) = report.notes
    assert note.startswith("fp4cast.json is missing") and "input scales" in note
    assert report.to_json()["notes"] == [note]
    assert "note fp4cast.json is missing" in plain(call("verify", miniatures["gpt-oss"], path).output)
