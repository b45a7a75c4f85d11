"""What stands beside published shards: the README with its front matter, and Croissant metadata.

In: plain facts of the views (`ViewFacts`) and the data set's card. Out: texts that are equal for equal facts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from unifork.config import Card
from unifork.publish.shards import LAYOUT, TAKEDOWN, features_of
from unifork.shards.manifest import Manifest
from unifork.vocabulary import Task

README = "README.md"
CROISSANT = "croissant.json"

HUB_LICENCES = {
    *("apache-2.0", "mit", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "odc-by", "odbl", "pddl"),
}
"""Identifiers of the Hub's list that are SPDX identifiers in small letters; any other licence is `other`."""

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
HUB_TASKS: dict[Task, str] = {"generation": "text-to-image", "understanding": "image-to-text"}

DECODE = """\
import json
import datasets, numpy as np, pyarrow.parquet as pq
from unifork.image_tokenizer.code_encoder import CodeEncoder
shard = "{shard}"
meta = json.loads(pq.read_schema(shard).metadata[b"unifork.codes"])
rows = datasets.load_dataset("parquet", data_files=shard, split="train").select(range({rows}))
decoder = CodeEncoder("tokenizers/image", "{view}", None, batch_images={rows})
assert decoder.tokenizer.codebook_id == meta["codebook_id"]
for key, picture in zip(rows["key"], decoder.decode_codes(np.array(rows["codes"]).reshape(-1, *meta["shape"]))):
    picture.save(f"{{key}}.png")
"""


@dataclass(frozen=True)
class ViewFacts:
    """One published view."""

    task: Task
    manifest: Manifest
    """Of the published shards."""
    plain_bytes: int
    """Size of all columns without compression."""

    @property
    def identity(self) -> dict[str, Any]:
        """Tokenizer and encoding, as the encode hop recorded them."""
        lineage: dict[str, Any] = self.manifest.lineage["codes"]["lineage"]
        return lineage

    @property
    def name(self) -> str:
        """The view, which is the name of the folder and of the Hub's configuration."""
        return str(self.manifest.lineage["about"]["view"])


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    limits = [10 ** (3 + power) for power in range(len(SIZES))]
    below = next((number for number, limit in enumerate(limits) if rows < limit), len(SIZES))
    if below == 0:
        return f"n<{SIZES[0]}"
    return f"n>{SIZES[-1]}" if below == len(SIZES) else f"{SIZES[below - 1]}<n<{SIZES[below]}"


def front_matter(card: Card, views: Sequence[ViewFacts]) -> dict[str, Any]:
    """The YAML head that the Hub reads: licence, size, configurations, features."""
    licence = card.licence.lower()
    known = licence in HUB_LICENCES
    other = {"license_name": re.sub(r"[^a-z0-9]+", "-", licence).strip("-"), "license_link": card.homepage}
    return {
        "license": licence if known else "other",
        **({} if known else other),
        "pretty_name": card.title,
        "size_categories": [size_category(max(view.manifest.rows for view in views))],
        "task_categories": [HUB_TASKS[view.task] for view in views],
        "tags": ["image-tokens", "residual-vq", "unifork"],
        "configs": [
            {
                "config_name": view.name,
                "data_files": [{"split": "train", "path": f"{view.name}/train-*.parquet"}],
                **({"default": True} if number == 0 else {}),
            }
            for number, view in enumerate(views)
        ],
        "dataset_info": [
            {
                "config_name": view.name,
                "features": features_of(view.manifest.columns),
                "splits": [{"name": "train", "num_bytes": view.plain_bytes, "num_examples": view.manifest.rows}],
                "download_size": sum(shard.bytes for shard in view.manifest.shards),
                "dataset_size": view.plain_bytes,
            }
            for view in views
        ],
    }


def readme(card: Card, views: Sequence[ViewFacts], hops: Mapping[str, Manifest | None]) -> str:
    """The page of the data set. hops: manifests of download and filter where they are at hand."""
    head = yaml.safe_dump(front_matter(card, views), sort_keys=False, allow_unicode=True, width=110)
    tables = "\n".join(
        f"| `{v.name}` | {v.task} | {v.manifest.rows} | {len(v.manifest.shards)} | "
        f"{', '.join(name for name in v.manifest.columns if name not in ('key', 'codes'))} |"
        for v in views
    )
    identities = "\n".join(_identity(view) for view in views)
    first = next((v for v in views if v.manifest.rows), views[0])
    shard = next((s for s in first.manifest.shards if s.rows), first.manifest.shards[0])
    code = DECODE.format(shard=f"{first.name}/{shard.path}", rows=min(4, shard.rows), view=first.name)
    return f"""---
{head}---

# {card.title}

Residual-VQ codes of the pictures, with their texts, made with unifork.
The codes can be decoded to pictures that look like the originals; the pictures' licence applies to them.

- **Source**: {card.homepage} (read as `{card.source.kind}`)
- **Licence**: {card.licence}
- **Credit**: {card.attribution}

| configuration | made for | rows | shards | texts |
|---|---|---|---|---|
{tables}

`crop` shows the centre of a picture, its shorter side filling the square; `pad` the whole picture on grey.
The same picture has other codes in the other view. `key` names a picture in all of them.

## Tokenizer

`codes` holds {LAYOUT}.
Codes mean nothing without the tokenizer that made them: the directory whose `config.json` names the same identities.

| configuration | shape | codebook_id | encoder_id | preprocessing | batch | dtype |
|---|---|---|---|---|---|---|
{identities}

## Pictures again

In the folder of this page, with the tokenizer's directory at `tokenizers/image`:

```python
{code}```

## What was left out

{_left_out(card, views, hops)}

## Checking and training

`sha256sum -c SHA256SUMS` checks every file. `unifork fetch ADDRESS {card.name}` makes of this publication
the code shards it came from, which the training stages read.
"""


def _identity(view: ViewFacts) -> str:
    lineage = view.identity
    encoding = lineage["encoding"]
    cells = [
        f"`{view.name}`",
        " x ".join(map(str, view.manifest.lineage["about"]["shape"])),
        f"`{lineage['codebook_id']}`",
        f"`{lineage['encoder_id']}`",
        *(str(encoding.get(name, "")) for name in ("preprocessing", "batch_shape", "dtype")),
    ]
    return f"| {' | '.join(cells)} |"


def _left_out(card: Card, views: Sequence[ViewFacts], hops: Mapping[str, Manifest | None]) -> str:
    options = {rule.rule: ", ".join(f"{k}: {v}" for k, v in rule.options.items()) for rule in card.filters}
    lines = ["| step | rule | rows |", "|---|---|---|"]
    for hop, manifest in hops.items():
        if manifest is None:
            lines.append(f"| {hop} | its manifest is not at hand | |")
            continue
        lines.append(f"| {hop} | kept | {manifest.rows} |")
        asked = options if hop == "filter" else {}
        for rule in [*asked, *(reason for reason in manifest.dropped if reason not in asked)]:
            shown = f"`{rule}` ({asked[rule]})" if asked.get(rule) else f"`{rule}`"
            lines.append(f"| {hop} | {shown} | {manifest.dropped.get(rule, 0)} |")
    for view in views:
        encoded = Manifest.model_validate(view.manifest.lineage["codes"])
        lines += [f"| encode, {view.name} | `{rule}` | {rows} |" for rule, rows in encoded.dropped.items()]
        if view.manifest.dropped:
            lines.append(f"| publish, {view.name} | `{TAKEDOWN}` | {view.manifest.dropped[TAKEDOWN]} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- Croissant

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of Croissant 1.0."""


def croissant(card: Card, views: Sequence[ViewFacts]) -> dict[str, Any]:
    """Croissant 1.0 JSON-LD: every shard with its hash, every configuration with its columns."""
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": card.name,
        "description": f"{card.title}. Residual-VQ codes of the pictures, with their texts.",
        "license": card.licence,
        "url": card.homepage,
        "creator": {"@type": "sc:Organization", "name": card.attribution},
        "citeAs": card.attribution,
        "distribution": [entry for view in views for entry in _files(view)],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": view.name,
                "name": view.name,
                "key": {"@id": f"{view.name}/key"},
                "field": [_field(view.name, feature) for feature in features_of(view.manifest.columns)],
            }
            for view in views
        ],
    }


def _files(view: ViewFacts) -> list[dict[str, Any]]:
    names = [f"{view.name}/{shard.path}" for shard in view.manifest.shards]
    objects: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{shard.bytes} B",
            "encodingFormat": "application/x-parquet",
            "sha256": shard.sha256,
        }
        for name, shard in zip(names, view.manifest.shards, strict=True)
    ]
    together = {
        "@type": "cr:FileSet",
        "@id": f"{view.name}-shards",
        "name": f"{view.name}-shards",
        "containedIn": [{"@id": name} for name in names],
        "encodingFormat": "application/x-parquet",
        "includes": f"{view.name}/train-*.parquet",
    }
    return [*objects, together]


def _field(view: str, feature: dict[str, Any]) -> dict[str, Any]:
    name = feature["name"]
    field = {"@type": "cr:Field", "@id": f"{view}/{name}", "name": name}
    source = {"fileSet": {"@id": f"{view}-shards"}, "extract": {"column": name}}
    kind = feature.get("dtype") or feature["list"]
    if isinstance(kind, str):
        plain = {"string": "sc:Text", "uint16": "sc:Integer"}[kind]
        return {**field, "dataType": plain, "source": source, **({"repeated": True} if "list" in feature else {})}
    parts = [
        {
            "@type": "cr:Field",
            "@id": f"{view}/{name}/{part['name']}",
            "name": part["name"],
            "dataType": "sc:Text",
            "source": {**source, "transform": {"jsonPath": part["name"]}},
        }
        for part in kind
    ]
    return {**field, "repeated": True, "subField": parts}
