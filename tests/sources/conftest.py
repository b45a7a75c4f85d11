"""A folder to stand in, and a bound on memory."""

import tracemalloc

import pytest


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Work in an empty folder; cards name relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def little_memory():
    """Python may hold little more than the largest thing that is read at once."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 130e6, f"{peak / 1e6:.0f} MB"
