"""Benchmarks that judge answers to questions about images."""
