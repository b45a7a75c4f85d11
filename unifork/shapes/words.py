"""Words for objects: a shape, a colour and a number go in, a noun or a noun phrase comes out."""

NUMBERS = ("zero", "one", "two", "three", "four")
"""Numbers as they are spoken; a picture never holds more than four objects."""


def noun(shape: str, color: str | None = None, count: int = 1) -> str:
    """`red circle`, `crosses`."""
    ending = "" if count == 1 else "es" if shape.endswith("s") else "s"
    return f"{color} {shape}{ending}" if color else shape + ending


def phrase(shape: str, color: str | None = None, count: int = 1) -> str:
    """`a red circle`, `two crosses`."""
    return f"{'a' if count == 1 else NUMBERS[count]} {noun(shape, color, count)}"
