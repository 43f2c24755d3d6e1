"""The local Hub serves what huggingface_hub asks for, with its faults; or the tests beside this one show nothing."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from helpers import tree


def test_the_real_client_downloads_a_repository(hub, miniatures):
    commit = hub.add("org/moe", miniatures["moe"])
    assert tree(Path(snapshot_download("org/moe", revision="v1"))) == tree(miniatures["moe"])
    assert HfApi().model_info("org/moe", files_metadata=True).sha == commit
    assert not hub.leaks


def test_faults_are_met_and_mended(hub, miniatures):
    hub.add("org/moe", miniatures["moe"])
    hub.fault("GET /storage/.*00001-of", "cut")
    hub.fault("GET /storage/.*00002-of", "status", status=429)
    assert tree(Path(snapshot_download("org/moe"))) == tree(miniatures["moe"])
    assert next(request.sent for request in hub.asked("/storage/.*00001-of")) < hub.sent("/storage/.*00001-of") / 2
    assert [request.status for request in hub.asked("/storage/.*00002-of")] == [429, 200]


def test_what_is_not_there(hub, miniatures):
    hub.add("org/moe", miniatures["moe"])
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/none")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/moe", revision="none")
