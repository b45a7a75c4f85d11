"""Finished codes as a data set for strangers: shards, card, checksums, upload, and the way back."""
