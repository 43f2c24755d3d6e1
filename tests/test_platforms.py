"""Windows and macOS, as far as Linux can act them: what they lack is taken away before fp4cast is imported.

What fp4cast depends on is imported first, on the true system; nothing here has run on the others.
"""

import json
import subprocess
import sys

import pytest
from imports import MODULES, room

import fp4cast
from helpers import options

# Source: the "Availability" lines of Python's documentation of os and signal.
ON_LINUX_ONLY = """
copy_file_range eventfd getresuid getxattr memfd_create posix_fadvise posix_fallocate sched_getaffinity setxattr splice
unshare O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_TMPFILE POSIX_FADV_DONTNEED POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED
"""
NOT_ON_WINDOWS = """
chown fchmod fchown fdatasync fork forkpty fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp
getpriority getresgid getsid getuid killpg lchown lockf mkfifo mknod nice openpty pipe2 posix_spawn pread preadv pwrite
pwritev readv register_at_fork sched_yield sendfile setegid seteuid setgid setpgid setsid setuid statvfs sync sysconf
tcgetpgrp ttyname uname wait3 wait4 waitid writev O_ASYNC O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK
O_SYNC WNOHANG
"""
SIGNALS = "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH"
MODULES_OF_POSIX = ["fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"]
LACKS = {
    "win32": ({"os": ON_LINUX_ONLY + NOT_ON_WINDOWS, "signal": SIGNALS}, MODULES_OF_POSIX),
    "darwin": ({"os": ON_LINUX_ONLY}, []),
}

BEFORE = """
import contextlib, ctypes, importlib, io, json, sys
from pathlib import Path

system, modules, lacks, gone = json.loads(sys.argv[1])

def import_all():
    found = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:  # of vLLM
            found[name] = str(error)
        except Exception as error:
            if type(error).__name__ != "MissingExtraError":
                raise
            found[name] = str(error)
    return found

on_linux = import_all()  # and all that they depend on
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # and all that a command imports late
    importlib.import_module("fp4cast.cli.app").app(["env"])
for name in [name for name in sys.modules if name.partition(".")[0] == "fp4cast"]:
    del sys.modules[name]
for module, names in lacks.items():
    for name in names.split():
        vars(importlib.import_module(module)).pop(name, None)
sys.modules.update(dict.fromkeys(gone))
sys.platform = system

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "renameat2":
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
"""
IMPORTS = """
assert import_all() == on_linux
print(json.dumps(on_linux))
"""


NEEDS_TORCH = {"_require_torch", "hf", "kernels", "ptq", "torch", "vllm"}
EVERY = ["fp4cast." + name if name != "__init__" else "fp4cast" for name in MODULES if name != "__main__"]
CORE = [name for name in EVERY if room(name.removeprefix("fp4cast.")) not in NEEDS_TORCH]


def act(system, code, *arguments, modules=CORE):
    """Run code as on another system; what it prints."""
    document = json.dumps([system, modules, *LACKS[system]])
    command = [sys.executable, "-c", BEFORE + code, document, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("system", LACKS)
def test_every_module_can_be_imported(system):
    missing = json.loads(act(system, IMPORTS, modules=EVERY))
    assert not [name for name, why in missing.items() if "not installed" not in why and "vllm" not in why], missing


MAC = """
import fp4cast
from fp4cast import checkpoints, miniatures

for kind in miniatures.KINDS:
    source, destination = miniatures.make(kind, Path(sys.argv[2], kind)), Path(sys.argv[2], kind + "-NVFP4")
    options = {"activations": "w4a4", "input_scales": 0.5} if kind in sys.argv[3:] else {}
    for _ in range(2):  # the second time in place of the first
        assert fp4cast.convert(source, destination, overwrite=True, **options).exact
        destination.joinpath("config.json").touch()
    assert fp4cast.verify(source, destination).ok and fp4cast.inspect(source).domains
    print(kind)
"""


def test_without_what_only_linux_has_every_family_is_converted_and_replaced(tmp_path):
    from fp4cast import miniatures

    w4a4 = [kind for kind in miniatures.KINDS if options(kind)]
    assert act("darwin", MAC, tmp_path, *w4a4).split() == list(miniatures.KINDS)


WINDOWS = """
import numpy as np
import fp4cast

out = fp4cast.cast(np.full((4, 32), 0x72, np.uint8), np.full((4, 1 * 2), 120, np.uint8))
assert out.exact
source, other = sys.argv[2:]
calls = {
    "inspect": lambda: fp4cast.inspect(source),
    "convert": lambda: fp4cast.convert("some-organisation/some-model", other),  # nothing is downloaded
    "verify": lambda: fp4cast.verify(source, source),
}
found = {}
for name, call in calls.items():
    try:
        call()
    except fp4cast.Fp4CastError as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_on_windows_files_are_refused_by_name_and_arrays_are_cast(miniatures, tmp_path):
    source, other = miniatures["moe"], tmp_path / "dst"
    found = json.loads(act("win32", WINDOWS, source, other))
    assert set(found) == {"inspect", "convert", "verify"} and not other.exists()
    for kind, message in found.values():
        assert kind == "PlatformError" and "win32 has no os.preadv: use Linux, macOS" in message
    assert str(source) in found["inspect"][1]


COMMANDS = """
from fp4cast.cli import main

sys.argv[:] = ["fp4cast", *sys.argv[2:]]
sys.exit(main())
"""
EXPECTS_ONE = """
try:
    main()
except SystemExit as end:
    assert end.code == 1
"""


def test_on_windows_commands_say_so(miniatures, tmp_path):
    assert json.loads(act("win32", COMMANDS, "env", "--json"))["fp4cast"] == fp4cast.__version__
    code = COMMANDS.replace("sys.exit(main())", EXPECTS_ONE)
    for command in (["inspect", miniatures["moe"]], ["demo", "--out", tmp_path / "demo"]):
        shown = json.loads(act("win32", code, *command, "--json"))
        assert shown["error"]["type"] == "PlatformError" and "win32 has no os.preadv" in shown["error"]["message"]
