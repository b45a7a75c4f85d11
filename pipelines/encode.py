"""Turn filtered pictures into RVQ codes, one folder per task's view, on a pool of actors. 1 shard : 1 shard.

Decoding, views and the network run in the same actor: no picture travels between processes.
"""

from pipelines.common import CODES, FILTERED, IMAGE_TOKENIZER, program, run
from unifork.cluster import load_cluster, local_ray
from unifork.config import HopResources, load_card
from unifork.data.encoding import Encode, encode_hop, encode_identity, encoder_for
from unifork.data.schema import codes_schema, columns_of


def main(name: str) -> None:
    card, cluster = load_card(name), load_cluster()
    resources = cluster.hops.get("encode", HopResources())
    device = "cuda" if resources.gpus else "cpu"
    with local_ray(cluster, needed=resources.workers > 0):  # one Ray for all views
        for task, use in card.tasks.items():
            encoder = encoder_for(card, task, IMAGE_TOKENIZER)
            hop = encode_hop(card, task, FILTERED / name, CODES / name / use.view, encoder)
            identity, shape = encode_identity(encoder), encoder.tokenizer.architecture
            columns = columns_of(codes_schema(card, task, shape.grid, shape.depth, identity))
            arguments = (card.model_dump(mode="json"), task, str(IMAGE_TOKENIZER.absolute()), device)
            run(hop, Encode, arguments, "encode", columns, {**identity, "task": task})


if __name__ == "__main__":
    program("pipelines.encode", lambda name: CODES / name, main, "data set, a card in datasets/")
