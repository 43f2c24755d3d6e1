"""The first tenths of a second: nothing heavy before Ctrl-C is in hand, and silence when it comes."""

import signal
import subprocess
import sys
import time

import pytest

import fp4cast

# Says when Ctrl-C is in hand. What comes before is the interpreter's own start, which nothing here can change.
HOOK = """
import sys
class Hook:
    def find_spec(self, name, *_):
        if name == "fp4cast.cli.app":
            print("in hand", flush=True)
sys.meta_path.insert(0, Hook())
sys.argv = ["fp4cast", "demo"]
"""
SCRIPT = "from fp4cast.cli import main; main()"  # as an installed script does
MODULE = "import runpy; runpy.run_module('fp4cast', run_name='__main__')"


@pytest.mark.parametrize("start", [SCRIPT, MODULE], ids=["script", "module"])
def test_ctrl_c_while_modules_are_loaded_ends_without_a_traceback(start):
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        process = subprocess.Popen(
            [sys.executable, "-c", HOOK + start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "in hand\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130, (delay, err)
        assert "Traceback" not in err and err.startswith("error: interrupted: ")


def test_a_ctrl_c_that_the_shell_has_ignored_stays_ignored():
    code = (
        f"import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = ['fp4cast', '--version']\n"
        f"import atexit; atexit.register(lambda: print(signal.getsignal(signal.SIGINT).name))\n{SCRIPT}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SIG_IGN"


@pytest.mark.parametrize("module", ["fp4cast", "fp4cast.cli"])
def test_the_entry_point_is_light(module):
    code = f"import sys, {module}; print(len(sys.modules), sorted({{'numpy', 'typer', 'rich'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-S", "-c", path() + code], capture_output=True, text=True, check=True)
    count, rest = done.stdout.split(maxsplit=1)
    assert rest.strip() == "[]"
    assert int(count) < 120


def path():
    """What `-S`, a start without site-packages, needs to find fp4cast."""
    return f"import sys; sys.path.insert(0, {str(next(iter(fp4cast.__path__)) + '/..')!r}); "


def test_public_names_are_found_when_they_are_used():
    assert set(fp4cast.__all__) <= set(dir(fp4cast))
    from fp4cast import Report, convert

    assert fp4cast.convert is convert
    assert Report.__module__ == "fp4cast.verification.report"
    names = {}
    exec("from fp4cast import *", names)  # noqa: S102
    assert set(fp4cast.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="module 'fp4cast' has no attribute 'konvert'"):
        fp4cast.konvert  # noqa: B018
    with pytest.raises(ImportError):
        from fp4cast import konvert  # noqa: F401
