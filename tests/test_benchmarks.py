"""The benchmarks time whole process trees, judge their claims, and refuse what does not verify."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import checkpoints
import common
import fp4cast
import table

SCRIPTS = ("bytes", "convert", "cores", "disks", "memory", "peer", "scale", "serve", "startup", "verify")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_claims(name):
    text = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--json" in text


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_generated_checkpoints_are_what_they_seem(tmp_path, case):
    draft = checkpoints.CASES[case](1, 0.03)
    checkpoints.write(tmp_path / "src", draft, sparse=True)
    info = fp4cast.inspect(tmp_path / "src")
    assert info.family == {"gpt-oss-20b": "gpt-oss", "deepseek-v4-flash": "deepseek-v4"}.get(case, case)


def test_the_peak_is_that_of_the_whole_tree():
    """Half of the memory is a grandchild's, and both live at the same time."""
    grandchild = "import time; x = bytearray(120 << 20); time.sleep(0.5)"
    child = f"import subprocess, sys; y = bytearray(120 << 20); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    sample = common.timed((sys.executable, "-c", child))
    assert sample.seconds > 0.5
    assert 240 << 20 < sample.peak_bytes < 340 << 20


def test_what_fails_stops_the_benchmark():
    with pytest.raises(SystemExit, match="failed with exit status 3"):
        common.timed((sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"))


def test_an_output_that_does_not_verify_stops_the_benchmark(miniatures, converted, tmp_path):
    assert common.verified(miniatures["moe"], converted["moe"])["exact"]
    copy = Path(shutil.copytree(converted["moe"], tmp_path / "dst"))
    shard = sorted(copy.glob("*.safetensors"))[-1]
    data = np.memmap(shard, np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    with pytest.raises(SystemExit, match="does not verify"):
        common.verified(miniatures["moe"], copy)


@pytest.mark.parametrize(("value", "most", "lines"), [(1.1, True, 0), (1.2, True, 1), (1.1, False, 1), (1.2, False, 0)])
def test_a_missed_claim_is_said(value, most, lines):
    result = {
        "case": "c",
        "rows": {"convert": {"ratio": value}},
        "claims": [common.claim("convert", "seconds", "ratio", 1.15, most=most)],
    }
    assert len(list(common.missed([result]))) == lines


def test_results_are_whole_and_nothing_was_missed_silently():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        document = json.loads(path.read_text())
        assert document["missed"] == list(common.missed(document["results"])), path.name
        assert {"date", "cpu", "cores", "memory_bytes", "file_system"} <= document["machine"].keys()


def test_the_pages_show_these_results():
    results = ROOT / "benchmarks" / "results"
    assert table.markdown(results) in (ROOT / "docs" / "performance.md").read_text()
    assert table.summary(results) in (ROOT / "README.md").read_text()


def test_the_tables_say_met_and_missed(tmp_path):
    kept, missed = common.claim("kept", "seconds", "ratio", 1.5), common.claim("late", "seconds", "ratio", 1.5)
    rows = {
        "cp": {"seconds": 1.0, "samples": [1.0, 1.0]},
        "kept": {"seconds": 1.25, "ratio": 1.25, "samples": [1.0, 1.5]},
        "late": {"seconds": 2.0, "ratio": 2.0, "samples": [2.0, 2.0]},
    }
    result = {"case": "c", "bytes": 1, "cache": "warm", "ceiling": "cp", "rows": rows, "claims": [kept, missed]}
    machine = {"cpu": "x", "cores": 2, "memory_bytes": 1, "storage": "disk", "file_system": "ext4", "date": "today"}
    document = {"benchmark": "convert", "machine": machine, "results": [result]}
    (tmp_path / "convert-disk.json").write_text(json.dumps(document))
    text = table.markdown(tmp_path)
    assert "| **1.25 x** (at most 1.50 x) | met |" in text
    assert "| 2.00 x (at most 1.50 x) | missed |" in text


def test_the_summary_has_the_median_and_the_worst_round(tmp_path):
    rows = {"cat": {"samples": [1.0, 1.0, 1.0]}, "verify": {"percent": 80.0, "samples": [1.0, 2.0, 1.25]}}
    result = {
        "case": "c",
        "ceiling": "cat",
        "rows": rows,
        "claims": [common.claim("verify", "x", "percent", 90, most=False)],
    }
    document = {"benchmark": "verify", "machine": {"file_system": "ext4"}, "results": [result]}
    (tmp_path / "verify-disk.json").write_text(json.dumps(document))
    text = table.summary(tmp_path)
    assert "| 3 | 80.0 % | 50.0 % (c, ext4) | 0 of 1 |" in text
    assert "Missed, by their medians: `verify` of c, ext4: 80.0 % (at least 90.0 %)." in text


def test_update_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmarks/table.py: summary -->\nold\n<!-- end -->\nb\n")
    table.update(page, ROOT / "benchmarks" / "results")
    text = page.read_text()
    assert text.startswith("a\n<!-- benchmarks/table.py: summary -->\n|") and text.endswith("<!-- end -->\nb\n")
    assert "old" not in text
    table.update(page, ROOT / "benchmarks" / "results")
    assert page.read_text() == text
