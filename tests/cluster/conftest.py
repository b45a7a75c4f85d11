"""The real cluster that some of these tests run on."""

from ray_heads import head

__all__ = ["head"]
