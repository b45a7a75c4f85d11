"""Comparison with numbers that the original implementations gave."""
