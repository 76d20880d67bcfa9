from __future__ import annotations

import pytest
from hub_server import Hub, serve
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from suffuse.hub import transfer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of our own, asked instead of the real one, with an empty cache and short time-outs."""
    hub = Hub()
    server = serve(hub)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    close_session()
    yield hub
    close_session()
    server.shutdown()
    server.server_close()
