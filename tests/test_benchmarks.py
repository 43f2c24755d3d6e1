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

import checkpoints  # noqa: E402
import common  # noqa: E402
import fp4cast  # noqa: E402
import table  # noqa: E402

SCRIPTS = ("bytes", "convert", "memory", "peer", "scale", "verify")


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


def test_the_readme_shows_these_results():
    assert table.markdown(ROOT / "benchmarks" / "results") in (ROOT / "README.md").read_text()
