"""UniFork: training unified image understanding and generation models, from pictures to scores."""

__version__ = "0.1.0"
