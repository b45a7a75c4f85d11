"""From sources to packed rows: everything that happens to data before a model sees it."""
