"""Every leaf of the documents says what engines need, and a change of it is found, without a receipt, too."""

import json
import shutil

import pytest

import fp4cast
from documents import BESIDE, CONFIG, changes, documents_of, in_this_process, judge, leaves
from fp4cast.errors import Fp4CastError
from fp4cast.layouts import patterns
from helpers import VARIANTS, call, plain


@pytest.fixture(scope="module")
def variants(miniatures, tmp_path_factory):
    """Every family in every layout, without a receipt."""
    root = tmp_path_factory.mktemp("variants")
    for kind, layout, activations in VARIANTS:
        path, scales = root / f"{kind}-{layout}-{activations}", 1.0 if activations == "w4a4" else None
        fp4cast.convert(miniatures[kind], path, layout=layout, activations=activations, input_scales=scales)
        (path / "fp4cast.json").unlink()
    return root


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
