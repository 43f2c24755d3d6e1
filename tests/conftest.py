"""Miniatures, made once a session."""

import os
import signal

import pytest

from fp4cast import miniatures as mini
from helpers import options

# One thread a test process: two processes on two cores would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("SOURCE_DATE_EPOCH", None)  # it dates model cards


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    """kind -> directory; read-only by convention."""
    root = tmp_path_factory.mktemp("miniatures")
    return {kind: mini.make(kind, root / kind) for kind in mini.KINDS}


@pytest.fixture(scope="session")
def plain_miniatures(tmp_path_factory):
    """The same without traps: every half-block verbatim."""
    root = tmp_path_factory.mktemp("plain")
    return {kind: mini.make(kind, root / kind, traps=False) for kind in mini.KINDS}


@pytest.fixture(scope="session")
def converted(miniatures, tmp_path_factory):
    """kind -> its default conversion; read-only by convention."""
    import fp4cast

    root = tmp_path_factory.mktemp("converted")
    for kind, source in miniatures.items():
        fp4cast.convert(source, root / kind, **options(kind))
    return {kind: root / kind for kind in miniatures}


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A runner in the background of a shell ignores Ctrl-C, and so would every process that the tests interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
