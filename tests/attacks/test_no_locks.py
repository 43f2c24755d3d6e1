"""A file system without locks: two runs must not hurt each other there, either."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

import fp4cast
from fp4cast.conversion import working_directory
from fp4cast.conversion.job_array import convert_part, finish
from fp4cast.conversion.lock import Lock
from fp4cast.errors import DestinationError
from fuse import left, on
from helpers import interrupted, root_only, started, tree

pytestmark = root_only
COMMAND = [sys.executable, "-m", "fp4cast"]


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_without_locks_all_works(miniatures, converted, unlocked, code):
    unlocked.change(errors={"SETLK": code})
    source = on(unlocked, miniatures["gpt-oss"])
    assert fp4cast.convert(source, unlocked.path / "dst").exact
    assert unlocked.change()["SETLK"] > 0, "the kernel has asked for locks"
    assert tree(unlocked.path / "dst") == tree(converted["gpt-oss"])
    interrupted(source, unlocked.path / "again", 0.7)
    assert left(unlocked) == [".again.fp4cast", "dst", "src"]
    assert fp4cast.convert(source, unlocked.path / "again").exact
    for part in (2, 1):
        convert_part(source, unlocked.path / "parts", part, 2)
    assert finish(source, unlocked.path / "parts").exact
    assert left(unlocked) == ["again", "dst", "parts", "src"]


def test_without_locks_a_second_writer_is_refused_until_the_first_is_killed(miniatures, converted, unlocked):
    source, state = miniatures["gpt-oss"], unlocked.path / ".dst.fp4cast"
    first = started(source, unlocked.path / "dst")
    try:
        before = tree(state)
        for second in (fp4cast.convert, finish, lambda *paths: convert_part(*paths, 1, 1)):
            with pytest.raises(DestinationError, match=r"another fp4cast is writing it \("):
                second(source, unlocked.path / "dst")
        assert tree(state) == before
    finally:
        first.kill()
        first.communicate(timeout=20)
    assert len(list((state / "claims").iterdir())) == 1, "of the process that was killed"
    assert "1 of 2 shards had been finished" in fp4cast.convert(source, unlocked.path / "dst").notes[0]
    assert tree(unlocked.path / "dst") == tree(converted["gpt-oss"])
    assert left(unlocked) == ["dst"]


def test_without_locks_parts_work_together_and_alone_means_alone(miniatures, unlocked):
    paths = miniatures["gpt-oss"], unlocked.path / "dst"
    one = working_directory.enter(*paths, shared=True)
    convert_part(*paths, 1, 2)
    with pytest.raises(DestinationError, match="another fp4cast is writing it"):
        fp4cast.convert(*paths, restart=True)
    with pytest.raises(DestinationError, match="another fp4cast is writing it"):
        finish(*paths)
    other = working_directory.enter(*paths, shared=True)
    assert not other.alone()
    other.release()
    assert one.alone()
    with pytest.raises(DestinationError, match="another fp4cast is writing it"):
        convert_part(*paths, 2, 2)
    one.release()
    convert_part(*paths, 2, 2)
    assert finish(*paths).exact


@pytest.mark.parametrize("said", ["whole", "damaged"])
def test_without_locks_a_claim_of_another_machine_is_for_people_to_judge(miniatures, unlocked, said):
    paths = miniatures["gpt-oss"], unlocked.path / "dst"
    convert_part(*paths, 1, 2)
    claim = unlocked.behind / ".dst.fp4cast" / "claims" / "0123456789abcdef"
    text = json.dumps({"host": "node7", "place": "boot", "pid": 12, "began": "3", "shared": said == "whole"})
    claim.write_text(text if said == "whole" else text[:9])
    match = {"whole": "process 12 on node7, or was killed there", "damaged": "on an unknown machine"}[said]
    if said == "whole":
        convert_part(*paths, 2, 2)  # the other may be a part, too
    with pytest.raises(DestinationError, match=match) as error:
        fp4cast.convert(*paths)
    assert str(error.value).endswith(f"if none runs there, delete {unlocked.path / '.dst.fp4cast/claims' / claim.name}")
    claim.unlink()
    assert fp4cast.convert(*paths).exact


def test_without_locks_of_many_at_a_time_at_most_one_works(unlocked):
    """Each counts who works there; a second one would be seen."""
    state, inside, most, taken, lock = unlocked.path / "state", [0], [0], [0], threading.Lock()
    state.mkdir()

    def try_often():
        for _ in range(20):
            try:
                mine = Lock.take(state, shared=False)
            except DestinationError:
                continue
            with lock:
                inside[0], taken[0] = inside[0] + 1, taken[0] + 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            with lock:
                inside[0] -= 1
            mine.release()

    threads = [threading.Thread(target=try_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1]
    assert taken[0] > 0
    assert Lock.take(state, shared=False).alone()


def test_without_locks_several_runs_never_hurt_each_other(miniatures, converted, unlocked):
    command = [*COMMAND, "convert", str(miniatures["gpt-oss"]), str(unlocked.path / "dst"), "--json"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process, out, err in [(each, *each.communicate(timeout=40)) for each in runs]:
        document = json.loads(out)
        assert "Traceback" not in err
        assert document.get("exact") or "is writing it" in document["error"]["message"], process.returncode
    assert fp4cast.convert(miniatures["gpt-oss"], unlocked.path / "dst").exact  # two may refuse each other
    assert tree(unlocked.path / "dst") == tree(converted["gpt-oss"])
    assert left(unlocked) == ["dst"]


def test_a_signal_removes_the_claim(miniatures, unlocked):
    process = started(miniatures["gpt-oss"], unlocked.path / "dst")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert list((unlocked.path / ".dst.fp4cast" / "claims").iterdir()) == []
