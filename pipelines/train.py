"""Train one stage of one variant, here or on workers of Ray Train, from where an earlier attempt left off."""

import os
import signal

from unifork.cluster import local_ray
from unifork.config import load_cluster, load_experiment
from unifork.errors import one_of
from unifork.jobs import program
from unifork.layout import Layout
from unifork.processes import die_with_parent
from unifork.training.launch import launch
from unifork.training.stage import StageJob

LAYOUT = Layout()


def main(name: str) -> None:
    params, cluster = load_experiment(), load_cluster()
    one_of("run", name, params.runs, "params.yaml: runs")
    resources = cluster.for_stage(params.runs[name].stage)
    die_with_parent(signal.SIGTERM)  # which saves; a signal to a whole group ends `dvc` first
    with local_ray(cluster, needed=resources.fewest > 0):
        launch(StageJob(key=name, experiment=params, resources=resources, root=os.getcwd()))


if __name__ == "__main__":
    program(LAYOUT.model, main, "run, <variant>-<stage>")
