"""Tokenize a text column of a data set for one prompt template. 1 shard of codes : 1 shard of documents.

Stages with other contexts, steps or weights share the result; training only maps it into memory.
"""

from unifork.cluster import run_jobs
from unifork.config import load_card, load_cluster, load_experiment
from unifork.documents.prepare import Prepare, prepare_job
from unifork.documents.prompts import template_named
from unifork.errors import one_of
from unifork.jobs import program
from unifork.layout import Layout

LAYOUT = Layout()


def main(name: str) -> None:
    params, cluster = load_experiment(), load_cluster()
    one_of("prepared set", name, params.prepared, "params.yaml: prepared")
    chosen, tokenizer = params.prepared[name], LAYOUT.text_tokenizer.absolute()
    card = load_card(chosen.dataset, LAYOUT.cards)
    job = prepare_job(card, chosen, LAYOUT.root / chosen.codes, LAYOUT.prepared / name, tokenizer)
    template = template_named(chosen.template, f"params.yaml: prepared.{name}")
    (manifest,) = run_jobs([job], Prepare, card, chosen.text, template, tokenizer, cluster=cluster, step="prepare")
    print(manifest.summary(job.folder))


if __name__ == "__main__":
    program(lambda name: LAYOUT.prepared / name, main, "prepared set, <data set>-<text>-<template>")
