"""`unifork publish`, `fetch` and `takedown`: codes and models for strangers, back, and rows that have to go."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

TAKEDOWN = Path("takedown.txt")
NAMED = 5
"""Entries that the report of a takedown shows; the others are counted."""


def publish(
    what: Annotated[
        str, typer.Argument(help="data set with finished codes, a card in datasets/; or a model directory")
    ],
    to: Annotated[str, typer.Option(help="a folder, hf://user/name, s3://bucket/path, ...")],
    takedown: Annotated[Path, typer.Option(help="rows to leave out; the default, where it exists")] = TAKEDOWN,
    verify: Annotated[bool, typer.Option(help="read every published file again afterwards")] = False,
    with_tokenizer: Annotated[bool, typer.Option(help="put the image tokenizer beside codes")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="address of the image tokenizer, for the page of codes")] = None,
    library: Annotated[str | None, typer.Option(help="what pip installs unifork from, for the page")] = None,
    license: Annotated[str | None, typer.Option(help="license of a model, by the Hub's name")] = None,
) -> None:
    """Publish the codes of a data set, or a model: only what is missing or differs is uploaded."""
    from unifork.errors import DataError
    from unifork.filters.rules import listing
    from unifork.layout import Layout
    from unifork.processes import exclusive
    from unifork.publish import model
    from unifork.publish.card import Offer
    from unifork.publish.publication import build
    from unifork.publish.stores import open_store, reread, sync

    layout, offer = Layout(), Offer(library and quote(library), tokenizer, with_tokenizer, license)
    is_model = (Path(what) / model.CONFIG).exists()
    store = open_store(to, "model" if is_model else "dataset")
    place = layout.published_model(Path(what).resolve().name) if is_model else layout.published(what)
    folder = store.local or place
    with exclusive(folder):
        if is_model:
            print(f"{folder}: {model.build(Path(what), layout, folder, offer)} files")
        else:
            entries = listing(str(takedown)) if takedown != TAKEDOWN or takedown.exists() else None
            for view in build(what, layout, folder, entries, offer):
                withheld = sum(view.manifest.dropped.values())
                print(f"{folder / view.name}: {view.manifest.rows} rows, {withheld} withheld")
        if store.local is None:
            done = sync(folder, store)
            print(f"{to}: {len(done.uploaded)} files uploaded, {done.kept} were there, {len(done.removed)} removed")
    if verify:
        if faults := reread(store):
            raise DataError(f"{to}: {len(faults)} files: {'; '.join(faults)}. Publish again: only these are uploaded")
        print(f"{to}: every file read again, all as SHA256SUMS says")


def fetch(
    source: Annotated[str, typer.Argument(help="where it was published: a folder, hf://..., s3://..., ...")],
    name: Annotated[str, typer.Argument(help="name of the data set or model here")],
) -> None:
    """Make of a publication the code shards it came from, data/codes/NAME, or the model, models/NAME."""
    from unifork.layout import Layout
    from unifork.processes import exclusive
    from unifork.publish import model, publication
    from unifork.publish.stores import checksums, published_at

    layout, store = Layout(), published_at(source)
    sums = checksums(store)
    holds_codes = publication.CARD in sums
    folder = layout.codes / name if holds_codes else layout.model(name)
    with exclusive(folder):
        if not holds_codes:
            print(f"{model.fetch(store, sums, name, layout)}: {len(sums)} files, as {source} says")
            return
        manifests = publication.fetch(store, name, layout)
    print(f"{folder}: {', '.join(f'{manifest.rows} rows' for manifest in manifests)}, as {source} says")


def takedown(
    dataset: Annotated[str, typer.Argument(help="data set, a card in datasets/")],
    rows: Annotated[Path, typer.Argument(help="list of rows: `url ADDRESS`, `host NAME`, `sha256 HEX`, `key SET/KEY`")],
) -> None:
    """Remove rows from all finished shards of a data set: images, measurements, codes and prepared documents."""
    import sys
    from contextlib import ExitStack

    import yaml

    from unifork.config import load_card
    from unifork.filters.rules import listing
    from unifork.filters.takedown import take_down
    from unifork.layout import Layout
    from unifork.processes import exclusive

    layout, entries, card = Layout(), listing(str(rows)), load_card(dataset)
    with ExitStack() as held:
        for folder in (layout.raw(dataset), layout.filtered(dataset), layout.codes / dataset, layout.prepared):
            held.enter_context(exclusive(folder))
        gone, unmatched = take_down(dataset, layout, entries)
    for folder, count in gone.items():
        print(f"{folder}: {count} rows removed")
    if unmatched:
        shown = ", ".join([*unmatched[:NAMED], *(["..."] if len(unmatched) > NAMED else [])])
        print(f"{len(unmatched)} of {len(entries.entries)} entries name no row of {dataset}, or none any more: {shown}")
    again = f"unifork publish {dataset} --to ... --takedown {quote(str(rows))}"
    print(f"Now `dvc repro` makes what follows from them, and `{again}` replaces what was published.")
    if str(rows) not in [rule.options.get("file") for rule in card.filters if rule.rule == "takedown"]:
        plain = {"rule": "takedown", "options": {"file": str(rows)}}
        rule = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=sys.maxsize)
        print(
            f"Rows of shards that are downloaded again would come back: add {rule.strip()} to the filters of its card."
        )
