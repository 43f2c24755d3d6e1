"""File systems that a FUSE server of our own shows."""

from contextlib import ExitStack

import pytest

from fuse import Unavailable, served


def mounted(tmp_path, **settings):
    """A mounted file system, or a skipped test."""
    with ExitStack() as stack:
        try:
            fuse = stack.enter_context(served(tmp_path / "behind", tmp_path / "disk", **settings))
        except Unavailable as error:
            pytest.skip(str(error))
        yield fuse


@pytest.fixture
def disk(tmp_path):
    yield from mounted(tmp_path)


@pytest.fixture
def unlocked(tmp_path):
    """A file system without locks."""
    yield from mounted(tmp_path, locks=True, errors={"SETLK": "ENOSYS"})
