"""The programs that some of these tests start."""

from stage_programs import experiment, start

__all__ = ["experiment", "start"]
