"""Stages, tracks and steps: from a model directory and code shards to the next model directory."""
