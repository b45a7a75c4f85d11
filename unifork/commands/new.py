"""`unifork new`: from somebody's files to a card and an experiment."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from unifork.experiments.new import Proposal

SHOWN, LONGEST = 3, 60


def new(
    name: Annotated[str, typer.Argument(help="what the data set and the experiment are called")],
    files: Annotated[str, typer.Option("--from", help="table, list, tar, folder, or a glob in quotes")],
    like: Annotated[str, typer.Option(help="experiment that it extends: demo, or micro for a trial")] = "demo",
    image: Annotated[str | None, typer.Option(help="column of the images in a table")] = None,
    text: Annotated[str | None, typer.Option(help="column of the texts in a table")] = None,
) -> None:
    """Look at files, write datasets/NAME.yaml and experiments/NAME.yaml, show three rows and the cost."""
    from unifork.errors import ConfigError
    from unifork.experiments import HERE, resolve
    from unifork.experiments.new import propose

    paths = [HERE.cards / f"{name}.yaml", HERE.experiments / f"{name}.yaml"]
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} is there already; nothing is overwritten: take another name, or edit it")
    found = propose(name, files, like, image, text)
    try:
        for path, content in zip(paths, (found.card, found.experiment), strict=True):
            path.write_text(content)
        resolve(name)
        lines = list(_cost(name, found))
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    print(f"{found.total:,} entries; the first:")
    for row in found.rows[:SHOWN]:
        size = f"{row['width']} x {row['height']}" if row.get("image") else row["url"] or "no image"
        texts = row.get("caption") or " / ".join(turn["text"] for turn in row.get("conversations") or ())
        print(f"  {row['key']}  {size}  {' '.join(texts.split())[:LONGEST]!r}")
    counted = Counter(error.reason for error in found.left_out)
    for first in found.left_out[:1]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counted.most_common())
        print(f"left out of the first {len(found.rows) + counted.total()}: {reasons}; {first.key}: {first.detail}")
    print(*lines, sep="\n")
    print(f"written: {paths[0]} (license and whom to credit are yours to fill in), {paths[1]}")
    print(f"next: unifork use {name} && dvc repro")


def _cost(name: str, found: "Proposal") -> "list[str]":
    """What `unifork plan` says of it, as two lines."""
    from unifork import planning
    from unifork.commands.plan import amount
    from unifork.config import load_card
    from unifork.experiments import resolve

    params = resolve(name)
    use = params.datasets[name].model_copy(update={"rows": found.total})
    params = params.model_copy(update={"datasets": {name: use}})
    cards, variant = {name: load_card(name)}, next(iter(params.variants))
    model = planning.meta_model(params, params.variants[variant])
    tracks = list(planning.track_plans(params, cards, variant, model, planning.Assumptions()))
    received = sum(len(row.get("image") or b"") for row in found.rows) / len(found.rows) * found.total
    sizes = {
        "images": received or None,
        "codes": sum(size or 0 for size in planning.code_bytes(params, cards).values()),
        "documents": sum(size or 0 for size in planning.prepared_bytes(params, tracks).values()),
        "a checkpoint": max(planning.checkpoint_bytes(model, [track]) for track in tracks),
    }
    disk = ", ".join(f"{what} {amount(size, 'B') or 'not known'}" for what, size in sizes.items())
    seen = ", ".join(f"{amount(number)} {what}" for what, number in planning.totals(tracks).items() if what != "FLOPs")
    return [f"training (more: unifork plan {name}): {seen}", f"disk: {disk}"]
