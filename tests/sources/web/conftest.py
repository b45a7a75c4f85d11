"""A server on the loopback for each test."""

import pytest
from loopback import ROBOTS, Web


@pytest.fixture
def web():
    server = Web("127.0.0.1")
    server.pages["/robots.txt"] = ROBOTS
    yield server
    server.shutdown()
    server.server_close()
