"""Mount the FUSE file system of fuse_server.py for a `with` block."""

import json
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60  # then the server is killed, and whoever waits for it gets an error


class Unavailable(Exception):
    """Nobody may mount here, or there is no FUSE."""


@dataclass
class Fuse:
    """A mounted file system.

    Attributes:
        path: where it is mounted.
        behind: the directory that it shows.
        server: the process that serves it.
    """

    path: Path
    behind: Path
    server: subprocess.Popen[str]

    def change(self, **settings: object) -> dict[str, int]:
        """Change settings; returns the requests, "bytes read" and "bytes written" since the last call."""
        self.server.stdin.write(json.dumps(settings) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@contextmanager
def served(behind, path, seconds=SECONDS, **settings):
    """Yield a `Fuse` that shows the directory `behind` at `path`.

    Raises:
        Unavailable: it cannot be mounted.
    """
    behind.mkdir(exist_ok=True)
    path.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("fuse_server.py")), str(behind), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    server = subprocess.Popen([*command, json.dumps(settings)], text=True, **pipes)
    watchdog = threading.Timer(seconds, server.kill)
    watchdog.start()
    try:
        if server.stdout.readline() != "ready\n":
            raise Unavailable(f"no FUSE here: {server.stderr.read().strip()}")
        yield Fuse(path, behind, server)
    finally:
        subprocess.run([shutil.which("umount") or "umount", "-l", str(path)], capture_output=True, check=False)
        watchdog.cancel()
        server.kill()
        _, said = server.communicate(timeout=10)
    assert "Traceback" not in said, said


def on(disk, source):
    """A copy of a checkpoint on the disk."""
    shutil.copytree(source, disk.behind / "src")
    return disk.path / "src"


def left(disk):
    return sorted(path.name for path in disk.path.iterdir())
