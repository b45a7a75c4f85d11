"""Networks look at images: a table of answers, or a folder in an official layout, goes in; what is in them comes out.

What they find is a table of answers again, whose text is what the suite's rules read, so that scoring stays a function
of files. Networks stand behind small protocols, each an object called with

- `detector`: an image; gives objects with `name`, `score`, `box` (left, top, right, bottom) and `mask`;
- `colors`: an image and objects; gives the color of each;
- `pytorch-fid`, `clean-fid`: an image; gives its features, one row;
- `answerer`: an image and a question; gives a text.

They are made from a folder and a device. Nothing is downloaded: a card says what to put where.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from unifork.config import EvalCard
from unifork.errors import ConfigError, DataError
from unifork.evaluation.answers import origin_of, read_answers
from unifork.evaluation.archive import Archive
from unifork.evaluation.generation.layout import Files, checked_images, image_of
from unifork.evaluation.items import AT_ONCE, Item, identity
from unifork.evaluation.names import ABSENT, MADE_ON, REGISTRIES
from unifork.evaluation.suites import suite_of
from unifork.registry import Registry
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import MANIFEST, file_sha256, read_manifest
from unifork.shards.schema import columns_of
from unifork.shards.task import ShardResult, ShardTask, Slice

EXAMINE_VERSION = 1
"""Raise when the same networks would find other things in the same images."""
CANARY = "canary.json"
"""In the folder of a network: what it gave for some drawn images."""
SCHEMA = pa.schema([*((name, pa.string()) for name in ("id", "prompt", "text")), ("image", pa.binary())])
"""As answers, without images."""
KINDS = Registry("network", type, REGISTRIES["networks"])
"""Classes of networks that cards name."""


def absent_networks(card: EvalCard) -> str | None:
    """What to put where, if the card names no network or a file of one is not there."""
    if not card.networks:
        return f"card {card.name}: no network is named in `networks`: give kind MODULE:OBJECT and path, or score a file"
    absent = [
        f"the network {name}: put {network.access or ', '.join(network.sha256) or 'its files'} into {network.path}"
        + "".join(f", {file} with sha256 {digest}" for file, digest in network.sha256.items() if digest)
        for name, network in card.networks.items()
        if not all((Path(network.path) / file).exists() for file in (".", *network.sha256))
    ]
    return "; ".join(absent) or None


def network_hashes(card: EvalCard) -> dict[str, str]:
    """The identity of every network of a card, of its kind and files. Raises DataError for what is absent or wrong."""
    if absent := absent_networks(card):
        raise DataError(f"{card.name}: {absent}")
    hashes = {}
    for name, network in card.networks.items():
        folder = Path(network.path)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CANARY)
        digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        for file, wanted in network.sha256.items():
            if not digests[file].startswith(wanted):
                raise DataError(f"{folder / file}: sha256 is {digests[file]}, the card {card.name} wants {wanted}")
        hashes[name] = sha256(repr([network.kind, digests]).encode()).hexdigest()[:12]
    return hashes


def load_networks(card: EvalCard, device: str, trusted: bool = False) -> dict[str, Any]:
    """The networks of a card by name. Raises DataError for absent ones, and for outputs other than their canaries'.

    trusted: write canaries instead of checking them.
    """
    from unifork.evaluation.generation.networks import check_canary  # noqa: PLC0415  only workers wait for torch

    networks = {}
    for name, digest in network_hashes(card).items():
        spec = card.networks[name]
        networks[name] = KINDS.find(spec.kind, f"card {card.name}: networks.{name}")(Path(spec.path), device)
        networks[name].hash = digest
        check_canary(networks[name], Path(spec.path) / CANARY, f"unifork answers canary {card.name}", trusted)
    return networks


class Examiner:
    """The networks of a card, applied to images: those of a table of answers, or files by the id of their item."""

    def __init__(self, card: EvalCard, items: Sequence[Item], files: Files, folder: Path, device: str) -> None:
        import torch  # noqa: PLC0415  only workers wait for it

        here = {"device": torch.device(device).type, "torch": str(torch.__version__)}
        self.schema = SCHEMA.with_metadata({MADE_ON: json.dumps(here)})
        self.look, self.networks = suite_of(card)[0].examine, load_networks(card, device)
        self.items, self.files, self.folder = items, files, folder
        self.by_id = {item.id: item for item in items}

    def __call__(self, task: ShardTask) -> ShardResult:
        assert self.look is not None
        chosen = self.items[task.piece.start : task.piece.stop] if task.piece else []
        rows: list[dict[str, Any]] = [{"id": item.id} for item in chosen] or input_rows(task)
        for row in rows:
            item, data = self.by_id.get(row["id"]), row.pop("image", None)
            if item and task.piece:
                data = image_of(item, self.folder, self.files[item.id][0])
            if not item or not data:
                raise DataError(f"{self.folder}: {row['id']} is no item of the card, or has no image")
            row["text"] = self.look(self.networks, item, data)
        return write_shard(task, table_of(rows, self.schema), {})


def examine_job(
    card: EvalCard, items: Sequence[Item], images: Path | None, out: Path, files_at: Path | None = None
) -> tuple[ShardJob, tuple[EvalCard, Sequence[Item], Files, Path]]:
    """The plan of looking at all images of a folder, None: the reference's in the archive; arguments of its worker.

    files_at: another archive than the card's. Where images or networks are not here, the plan has no tasks and says
    what to put where. Raises DataError, for an official layout after all its files were read; ConfigError for a suite
    whose images are not looked at.
    """
    suite, options = suite_of(card)
    if suite.examine is None or (images is None and suite.summarize is None):
        raise ConfigError(f"{card.name}: its answers are read as they are; nothing is to be examined")
    archive = Archive(card, options, files_at)
    folder = images or archive.folder / archive.images
    source = read_manifest(folder) if (folder / MANIFEST).exists() else None
    lineage = (source.lineage if source else {}) | origin_of(folder)
    absent = lineage.get(ABSENT) or (archive.absent if images is None else None) or absent_networks(card)
    tasks, files = list[ShardTask](), Files()
    if absent:
        lineage[ABSENT] = absent
    else:
        lineage["networks"] = network_hashes(card)
        seen = ", ".join(f"{name} {card.networks[name].kind} {digest}" for name, digest in lineage["networks"].items())
        lineage["decoding"] += f"; examined by {seen}"
        if source:
            tasks = [ShardTask(shard=shard) for shard in source.shards]
        else:
            equal = images is not None and not card.networks.keys() <= set(suite.any_size)
            files = checked_images(card, items, folder, equal)
            for start in range(0, len(items), AT_ONCE):
                stop = min(start + AT_ONCE, len(items))
                content = sha256(repr([files[item.id] for item in items[start:stop]]).encode()).hexdigest()
                tasks.append(ShardTask(piece=Slice(start, stop, content=content)))
    made_with = {"version": EXAMINE_VERSION, "networks": lineage.get("networks"), "items": identity(items)}
    place, columns = folder if source else None, columns_of(SCHEMA)
    job = ShardJob("answers", card.name, out, columns, made_with, lineage, tasks, place, may_be_empty=True)
    return job, (card, items, files, folder)


def write_summary(card: EvalCard, folder: Path) -> list[Path]:
    """Write the files that answers are compared with, from what networks found in the reference."""
    suite, _ = suite_of(card)
    return suite.summarize(folder, read_answers(folder)) if suite.summarize else []
