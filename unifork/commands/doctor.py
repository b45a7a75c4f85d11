"""`unifork doctor`: what this machine has and whether the pieces work on it, before a long run starts."""

import json
import os
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="a list of objects with check, verdict and text")] = False,
    cluster: Annotated[str | None, typer.Option(help="cluster file: one line for each node instead")] = None,
    bandwidth: Annotated[bool, typer.Option(help="with --cluster: time an all-reduce over the nodes, too")] = False,
) -> None:
    """Check this machine, what runs on it and what the cluster file asks for; exit code 1 where something failed."""
    from unifork.config import CLUSTER, load_cluster, load_experiment
    from unifork.doctor import CHECKS, Here, examine
    from unifork.layout import Layout
    from unifork.nodes import examine_nodes

    if cluster:
        os.environ[CLUSTER] = cluster
        examine_nodes(bandwidth)
    here = Here(load_cluster(), load_experiment() if Layout().params.exists() else None)
    found = []
    for name in CHECKS:
        verdict, text = examine(name, here)
        found.append({"check": name, "verdict": verdict, "text": text})
        if not as_json:
            print(f"{name:20} {verdict:8} {text}", flush=True)
    if as_json:
        print(json.dumps(found, indent=2))
    raise typer.Exit(any(finding["verdict"] == "failed" for finding in found))
