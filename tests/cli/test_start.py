"""The first tenths of a second: nothing heavy before Ctrl-C is in hand, and silence when it comes."""

import signal
import subprocess
import sys
import time

import pytest
import typer

import fp4cast
from fp4cast.cli.app import app
from fp4cast.cli.commands import COMMANDS

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


# What neither a start nor a conversion needs, and may be loaded by neither.
HEAVY = {"asyncio", "email", "httpx", "jinja2", "matplotlib", "numpy.ma", "pydantic", "requests", "torch"}
LOADED = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "


def loaded(*words):
    """The modules that a command has loaded by its end."""
    command = [sys.executable, "-c", LOADED + SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_the_version_needs_no_library_but_typer():
    found = loaded("--version")
    assert not found & (HEAVY | {"numpy", "rich", "huggingface_hub", "yaml", "xxhash"})
    assert {name for name in found if name.startswith("fp4cast.")} <= {
        "fp4cast._version",
        "fp4cast.errors",
        *(f"fp4cast.cli{name}" for name in ("", ".app", ".commands", ".console", ".interruption", ".progress")),
        *(f"fp4cast.cli.{name}" for name in ("streams", "verbosity")),
    }


def test_the_help_needs_rich_alone():
    assert not loaded("--help") & (HEAVY | {"numpy", "huggingface_hub", "yaml", "fp4cast.formats"})


@pytest.mark.parametrize("as_json", [False, True])
def test_a_conversion_needs_no_more_than_it_does(miniatures, tmp_path, as_json):
    found = loaded("convert", miniatures["kimi-k3"], tmp_path / "a", "--no-card", *["--json"] * as_json)
    assert "numpy" in found
    assert not found & (HEAVY | {"huggingface_hub", "yaml", "rich.progress", "typer.rich_utils", "importlib.metadata"})
    rooms = "cli.push_commands conversion.job_array conversion.preview conversion.streaming hub.download hub.ranges"
    assert not found & {f"fp4cast.{name}" for name in f"{rooms} hub.upload miniatures verification.files".split()}
    with_card = loaded("convert", miniatures["kimi-k3"], tmp_path / "b")
    assert not with_card & (HEAVY | {"huggingface_hub"}) and "yaml" in with_card, "for a card's metadata"


def test_the_list_of_commands_says_what_their_helps_say():
    group = typer.main.get_command(app)
    assert list(group.commands) == list(COMMANDS)
    for name, command in group.commands.items():
        assert command.name == name
        assert COMMANDS[name][1] == " ".join(command.help.split("\n\n")[0].split())


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("verify", "a", "b"), "pydantic is not needed"),
        (("verify", "a", "b", "--jobs", "2"), "a number is converted by typer"),
        (("convert", "a", "b", "--layout", "compressed_tensors"), "another spelling is, too"),
    ],
)
def test_values_are_taken_at_once_or_converted_by_typer(words, kind):
    """Parsing alone; both ways give the same values."""
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    slow = typer.main.get_command(app).commands[words[0]]
    for option in slow.get_params(context):
        vars(option).pop("process_value", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp4cast.cli.commands._take_at_once", lambda *_: None)
        assert context.params == slow.make_context(words[0], list(words[1:])).params, kind
