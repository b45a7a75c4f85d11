"""Train one stage of one variant, here or on workers of Ray Train, from where an earlier attempt left off."""

import os

from pipelines.common import MODELS, experiment, program
from unifork.cluster import load_cluster, local_ray
from unifork.errors import unknown
from unifork.training.launch import launch
from unifork.training.stage import StageJob


def main(name: str) -> None:
    params, cluster = experiment(), load_cluster()
    if name not in params.runs:
        raise unknown("run", name, params.runs, "params.yaml: runs")
    resources = cluster.for_stage(params.runs[name].stage)
    with local_ray(cluster, needed=resources.workers > 0):
        launch(StageJob(key=name, experiment=params, resources=resources, root=os.getcwd()))


if __name__ == "__main__":
    program("pipelines.train", lambda name: MODELS / name, main, "run, <variant>-<stage>")
