"""Benchmarks that judge pictures painted from prompts."""
