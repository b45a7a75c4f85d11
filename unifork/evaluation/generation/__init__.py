"""Benchmarks that judge images generated from prompts."""
