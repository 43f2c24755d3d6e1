"""`fp4cast card`: the same card as `convert` writes, on conversions that are there already."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.write_card import write_card
from fp4cast.errors import DestinationError, UsageError, VerificationError
from fp4cast.verification.files import verify_files
from fp4cast.verification.receipt import Receipt
from helpers import call, flip, lossy, tree


@pytest.fixture
def source(miniatures, tmp_path):
    path = Path(shutil.copytree(miniatures["dense"], tmp_path / "src"))
    (path / "README.md").write_text("---\nlicense: mit\n---\nThe source.\n")
    return path


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "dense-0.13"])
def test_a_card_written_again_is_the_same(miniatures, converted, tmp_path, kind):
    destination = shutil.copytree(converted[kind], tmp_path / "dst")
    report = write_card(miniatures[kind], destination)
    assert report.ok and report.card == str(destination / "README.md")
    assert tree(destination) == tree(converted[kind])


def test_also_where_values_were_rounded(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    fp4cast.convert(source, tmp_path / "dst", inexact="nearest")
    before = tree(tmp_path / "dst")
    write_card(source, tmp_path / "dst")
    assert tree(tmp_path / "dst") == before


def test_an_older_conversion_gets_what_a_new_one_has(source, tmp_path):
    fp4cast.convert(source, tmp_path / "new", source_id="acme/tiny@main")
    fp4cast.convert(source, tmp_path / "dst", card=False)
    result = call("card", source, tmp_path / "dst", "--source-id", "acme/tiny@main", "--json")
    assert json.loads(result.stdout)["card"] == str(tmp_path / "dst" / "README.md")
    assert tree(tmp_path / "dst") == tree(tmp_path / "new")
    assert verify_files(tmp_path / "dst", strict=True).ok


def test_an_id_that_becomes_known_is_said_and_kept(source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst")
    assert ModelCard((tmp_path / "dst" / "README.md").read_text()).data.base_model is None
    for source_id in ("acme/tiny", None):
        write_card(source, tmp_path / "dst", source_id=source_id)
        assert ModelCard((tmp_path / "dst" / "README.md").read_text()).data.base_model == "acme/tiny"
        assert json.loads((tmp_path / "dst" / "fp4cast.json").read_text())["source"] == {"id": "acme/tiny"}
    assert "complete already" in fp4cast.convert(source, tmp_path / "dst").notes[-1]
    fp4cast.convert(source, tmp_path / "dst", overwrite=True, restart=True)  # all that is there is fp4cast's


def test_a_card_that_the_source_no_longer_has_goes(source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst")
    (source / "README.md").unlink()
    write_card(source, tmp_path / "dst")
    assert not (tmp_path / "dst" / "README.source.md").exists()
    fp4cast.convert(source, tmp_path / "new")
    assert tree(tmp_path / "dst") == tree(tmp_path / "new")


@pytest.mark.parametrize("said", ["acme", 7, {"id": ["x"]}, {"id": "a b/<c>"}, {"id": "a/b", "revision": "`|<b>"}])
def test_a_receipt_is_not_believed_about_ids(source, tmp_path, said):
    fp4cast.convert(source, tmp_path / "dst")
    receipt = Receipt.read(tmp_path / "dst")
    (tmp_path / "dst" / "fp4cast.json").write_bytes(
        replace(receipt, facts={**receipt.facts, "source": said}, version="`|<b>").to_bytes()
    )
    write_card(source, tmp_path / "dst")
    text = (tmp_path / "dst" / "README.md").read_text()
    assert ModelCard(text).data.base_model is None and "<" not in text and "| fp4cast | `???b?` |" in text


@pytest.mark.parametrize("change", ["edited", "foreign", "link"])
def test_what_somebody_wrote_is_replaced_only_when_told(source, tmp_path, change):
    fp4cast.convert(source, tmp_path / "dst")
    before = tree(tmp_path / "dst")
    if change == "edited":
        (tmp_path / "dst" / "README.md").write_text("mine")
    elif change == "foreign":
        (tmp_path / "dst" / "README.source.svg").write_text("mine")
    else:
        (tmp_path / "dst" / "README.md").unlink()
        (tmp_path / "dst" / "README.md").symlink_to(source / "README.md")
    result = call("card", source, tmp_path / "dst")
    assert (result.exit_code, "pass --overwrite" in result.stderr) == (1, True)
    said = call("card", source, tmp_path / "dst", "--overwrite")
    assert said.exit_code == 0 and "wrote the card of" in said.stdout
    (tmp_path / "dst" / "README.source.svg").unlink(missing_ok=True)
    assert tree(tmp_path / "dst") == before
    assert (source / "README.md").read_text().endswith("The source.\n")


def test_a_destination_that_differs_gets_no_card(source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst", card=False)
    tensors = open_checkpoint(tmp_path / "dst").tensors
    flip(tensors["model.layers.0.mlp.down_proj.weight"], 7)
    before = tree(tmp_path / "dst")
    with pytest.raises(VerificationError, match=r"down_proj.*no card was written"):
        write_card(source, tmp_path / "dst")
    assert tree(tmp_path / "dst") == before


def test_without_a_receipt_or_of_an_export_there_is_none(miniatures, source, tmp_path):
    fp4cast.convert(source, tmp_path / "dst")
    receipt = Receipt.read(tmp_path / "dst")
    (tmp_path / "dst" / "fp4cast.json").write_bytes(replace(receipt, quantized=frozenset({"x"})).to_bytes())
    with pytest.raises(UsageError, match="export of `fp4cast ptq`"):
        write_card(source, tmp_path / "dst")
    (tmp_path / "dst" / "fp4cast.json").unlink()
    with pytest.raises(DestinationError, match="expected the receipt"):
        write_card(source, tmp_path / "dst")
    with pytest.raises(DestinationError, match="expected the receipt"):
        write_card(miniatures["dense"], tmp_path / "nothing")
