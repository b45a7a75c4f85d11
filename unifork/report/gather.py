"""Data sets and the image tokenizer, as tables and images for the template.

In: the experiment, its folders and a way to load image tokenizers. Out: what the page shows of them. What has not run
is said to be missing; a damaged file raises a UniForkError.
"""

from typing import Any

from unifork.config import Experiment, load_card
from unifork.image_tokenizer.architecture import CONFIG_FILE, architecture_of
from unifork.layout import Layout
from unifork.report.codec import LoadCodec
from unifork.report.images import data_images, rejected_rows, views_of
from unifork.report.reading import read_json
from unifork.report.tables import Table, count
from unifork.shards.job import KeptRows
from unifork.shards.manifest import MANIFEST, elsewhere, read_manifest
from unifork.shards.task import warnings_of


def dataset(name: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> dict[str, Any]:
    """One data set: its card, the manifests of all stages, and images of what the filter kept and dropped."""
    card = load_card(name, layout.cards)
    folders = {"download": layout.raw(name), "filter": layout.filtered(name)}
    folders |= {f"encode, {view}": layout.codes / name / view for view in views_of(card)}
    found = {name: read_manifest(folder) if (folder / MANIFEST).exists() else None for name, folder in folders.items()}
    shown, rejected = None, []
    if found["filter"] and not elsewhere(layout.raw(name)):
        tokenizer, size = layout.image_tokenizer, experiment.image_tokenizer.image_size
        codec = load_codec(tokenizer) if (tokenizer / CONFIG_FILE).exists() else None
        kept = KeptRows(layout, name)
        shown, rejected = data_images(card, kept, size, codec), rejected_rows(kept)
    rows = [
        [stage, count(manifest.rows), count(len(manifest.shards)),
         f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.2f} MB",
         ", ".join(f"{reason}: {count(number)}" for reason, number in manifest.dropped.items()) or "none"]
        if manifest else [stage, None]
        for stage, manifest in found.items()
    ]  # fmt: skip
    manifests = [(stage, manifest) for stage in ("download", "filter") if (manifest := found[stage])]
    warnings = [line for stage, manifest in manifests for line in warnings_of(manifest, stage, card.losses)]
    return {
        "name": name,
        "card": card,
        "stages": Table(f"Stages of {name}", ["Stage", "Rows", "Shards", "Size", "Dropped, by reason"], rows),
        "lineages": {name: done.lineage for name, done in found.items() if done and done.lineage.get("encoding")},
        "images": shown,
        "rejected": rejected,
        "warnings": warnings,
    }


def tokenizer(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """The image tokenizer: its form, what codes lose, and what readers of data sets read after decoding."""
    measures = read_json(layout.image_tokenizer / "report.json")
    groups = {**measures["groups"], "all": measures} if measures else {}
    columns = ["Images", "Error, gray levels", "PSNR, dB", "Rows used", "Rows used by depth", "Perplexity by depth",
               "Bits per position"]  # fmt: skip
    rows = [
        [name, f"{group['mean_absolute_levels']:.1f}", f"{group['psnr_db']:.1f}",
         count(group["codes"]["codebook_usage"]),
         ", ".join(str(depth["codebook_usage"]) for depth in group["codes"]["depths"]),
         ", ".join(f"{depth['perplexity']:.1f}" for depth in group["codes"]["depths"]),
         f"{group['codes']['bits_per_position']:.2f}"]
        for name, group in groups.items()
    ]  # fmt: skip
    read = [
        [name, f"{count(group['same'])} of {count(group['total'])}", f"{group['same'] / max(group['total'], 1):.3f}"]
        for name, group in (measures.get("detector", {}) if measures else {}).items()
    ]
    return {
        "form": architecture_of(experiment.image_tokenizer, layout.image_tokenizer),
        "images": measures and measures["images"],
        "measures": Table("Reconstruction and codebook use", columns, rows),
        "readers": Table("Readers on reconstructions", ["Images", "The same", "Share"], read),
    }
