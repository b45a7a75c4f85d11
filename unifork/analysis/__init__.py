"""What the papers look at inside a model: alignment and gradient conflict by layer, entropy of its tokens; no Ray."""

ANALYZE_VERSION = 1
"""Raise when the same model would be analyzed to other numbers."""
