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
    """Import img2dataset, whose import takes seconds that no test should count."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import img2dataset.downloader  # noqa: F401
