"""Decisions about rows: rules, duplicates, takedowns."""
