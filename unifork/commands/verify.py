"""`unifork verify`: are finished shards what their manifests say, and what to do where they are not."""

from pathlib import Path
from typing import Annotated

import typer

Repair = Annotated[bool, typer.Option(help="remove what is wrong, so that the next run makes only that again")]


def verify(
    folder: Annotated[Path, typer.Argument(help="folder with a manifest.json, or one with such folders below")],
    repair: Repair = False,
) -> None:
    """Check every shard of finished hops against their manifests."""
    from unifork.errors import DataError
    from unifork.shards import repair as repairs
    from unifork.shards.manifest import read_manifest

    folders = repairs.hop_folders(folder)
    if not folders:
        read_manifest(folder)
    wrong = {}
    for place in folders:
        if found := repairs.faults(place):
            wrong[place] = found
            for fault in found:
                print(f"{place}/{fault}")
        else:
            manifest = read_manifest(place)
            print(f"{place}: {len(manifest.shards)} shards, {manifest.rows} rows, all as the manifest says")
    if not wrong:
        return
    then = " && ".join(dict.fromkeys(repairs.command_for(place) for place in wrong))
    count = sum(map(len, wrong.values()))
    if not repair:
        raise DataError(
            f"{folder}: {count} faults, named above. `unifork verify --repair {folder}` removes the files, "
            f"`{then}` makes what is missing"
        )
    for found in wrong.values():
        repairs.repair(found)
    print(f"{folder}: {count} faults removed; now run `{then}`, which makes only what is missing")
