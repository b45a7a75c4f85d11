"""Stand-in: the version of what download makes of a card."""

DOWNLOAD_VERSION = 1
"""Raise when the same card and task would give other rows."""
