"""Processes forked from one that has imported what they need, so that a process costs no start.

The server is started by the first process; the environment of that moment is that of all.
"""

import multiprocessing

LIBRARY = [
    "cli", "documents.prepare", "image_tokenizer.encode", "publish.publication", "sources.web.download",
    "training.stage",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "pandas", "pipelines.download", *(f"unifork.{name}" for name in LIBRARY)])
