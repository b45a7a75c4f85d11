"""The procedural demo world: scenes, their pictures, their texts, their rows, and an exact reader of pictures."""

from unifork.shapes.source import world_rows

__all__ = ["world_rows"]
