"""A server on the loopback for each test."""

import os

import pytest
from loopback import ROBOTS, Web


@pytest.fixture
def web():
    server = Web("127.0.0.1")
    server.pages["/robots.txt"] = ROBOTS
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session", autouse=True)
def imported():
    """img2dataset, whose import takes seconds that no test should count."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import img2dataset.downloader  # noqa: F401


@pytest.fixture(params=["own", "img2dataset"], autouse=True)
def engine(request, monkeypatch):
    if request.param == "img2dataset":
        from unifork.sources.web import download, engine

        monkeypatch.setattr(download, "ENGINE", engine.fetch_all)
        monkeypatch.setattr(download, "fetch_all", engine.fetch_all)
