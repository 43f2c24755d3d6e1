"""A local Hub, and the real client of huggingface_hub turned to it."""

import pytest
from huggingface_hub import constants, file_download
from local_hub import LocalHub

_FILE = "{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub; in this process, huggingface_hub speaks to it, without a token and with a cache of its own."""
    server = LocalHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, file_download):  # older versions have copied it there
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{_FILE}", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older versions have no Xet
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.environment = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "TMPDIR": str(tmp_path),
    }
    yield server
    server.close()
