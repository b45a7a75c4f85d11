"""`unifork verify`: are finished shards what their manifests say, and what to do where they are not."""

from pathlib import Path
from typing import Annotated

import typer

Repair = Annotated[bool, typer.Option(help="remove what is wrong, so that the next run makes only that again")]


def verify(
    folder: Annotated[Path, typer.Argument(help="folder with a manifest.json, or one with such folders below")],
    repair: Repair = False,
) -> None:
    """Check every shard of finished stages against their manifests."""
    from unifork.errors import DataError
    from unifork.layout import command_for
    from unifork.shards import repair as repairs
    from unifork.shards.manifest import read_manifest

    folders = repairs.job_folders(folder)
    if not folders:
        read_manifest(folder)
    wrong = []
    for place in folders:
        if found := repairs.faults(place):
            print("\n".join(f"{place}/{fault}" for fault in found))
            wrong += found
        else:
            manifest = read_manifest(place)
            print(f"{place}: {len(manifest.shards)} shards, {manifest.rows} rows, all as the manifest says")
    if not wrong:
        return
    then = ", ".join(dict.fromkeys(command_for(fault.folder) for fault in wrong))
    if not repair:
        raise DataError(
            f"{folder}: {len(wrong)} faults, named above. `unifork verify --repair {folder}` removes the files, "
            f"{then} makes what is missing"
        )
    repairs.repair(wrong)
    print(f"{folder}: {len(wrong)} faults removed; now run {then}, which makes only what is missing")
