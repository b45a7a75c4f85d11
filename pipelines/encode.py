"""Turn kept images into residual-VQ codes, one folder for each view. 1 image-text shard : 1 shard of each view.

Decoding, views and the network run in the same actor: no image travels between processes.
"""

from unifork.cluster import run_jobs
from unifork.config import load_card, load_cluster
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.job import KeptRows

LAYOUT = Layout()


def main(name: str) -> None:
    card, cluster = load_card(name), load_cluster()
    device, threads = cluster.device("encode"), max(1, int(cluster.for_step("encode").cpus))
    tokenizer = LAYOUT.image_tokenizer.absolute()
    rows = KeptRows(LAYOUT, name)
    jobs = [encode_job(card, task, rows, LAYOUT.codes / name / use.view, tokenizer) for task, use in card.tasks.items()]
    manifests = run_jobs(jobs, Encode, card, tokenizer, device, threads, cluster=cluster, step="encode")
    for job, manifest in zip(jobs, manifests, strict=True):
        print(manifest.summary(job.folder))


if __name__ == "__main__":
    program(lambda name: LAYOUT.codes / name, main, "data set, a card in datasets/")
