"""What platforms read of `clusters/`: against their schemas and rules; copies with one mistake each must fail.

The schema of RayJob is condensed from KubeRay's custom resource (`ray.io_rayjobs.yaml`, v1, commit feeaf72, under
Apache-2.0): without texts and status, and with unknown keys refused where keys are listed.
"""

import copy
import json
import lzma
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from unifork.config import Cluster, load

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
RAYJOB = json.loads(lzma.decompress((ROOT / "tests/fixtures/kuberay/rayjob.schema.json.xz").read_bytes()))
CLOUDS = ["aws", "gcp"]


def problems_of(schema: dict[str, Any], config: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in Draft7Validator(schema).iter_errors(config)]


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with another value at a path such as `spec.workers.0.name`; None takes it away."""
    config = copy.deepcopy(config)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place: Any = config
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


# ------------------------------------------------------------------------------------------ `ray up`


def ray_up_problems(config: dict[str, Any]) -> list[str]:
    """By Ray's schema, and by ours: tokens everywhere, the dashboard on loopback, spot for workers alone."""
    ray = find_spec("ray")
    assert ray is not None
    assert ray.submodule_search_locations is not None
    schema = json.loads((Path(ray.submodule_search_locations[0]) / "autoscaler/ray-schema.json").read_text())
    if found := problems_of(schema, config):
        return found
    types = config["available_node_types"]
    if config["head_node_type"] not in types:
        return [*found, "head_node_type: no such type"]
    head, start = types[config["head_node_type"]], "head_start_ray_commands"
    for key in (start, "worker_start_ray_commands"):
        line = config.get(key, [""])[-1]
        if "RAY_AUTH_MODE=token" not in line:
            found.append(f"{key}: no tokens")
        if key == start and "--dashboard-host=127.0.0.1" not in line:
            found.append(f"{key}: the dashboard is open")
    if "~/.ray/auth_token" not in config.get("file_mounts", {}):
        found.append("file_mounts: nodes have no token")
    if head["resources"].get("CPU") != 0 or "--num-cpus=0" not in config[start][-1]:
        found.append("the head gets work")
    for name, kind in types.items():
        text = json.dumps(kind["node_config"]).lower()
        if ('"spot"' in text) == (name == config["head_node_type"]):
            found.append(f"{name}: spot is for workers")
        if kind.get("min_workers", 0) != kind.get("max_workers", 0):
            found.append(f"{name}: workers come and go")
        if config["provider"]["type"] == "aws" and "SecurityGroupIds" not in kind["node_config"]:
            found.append(f"{name}: port 22 is open to everybody")  # in a group that Ray makes
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_files(cloud: str) -> None:
    assert ray_up_problems(yaml.safe_load((CLUSTERS / f"{cloud}.ray-up.yaml").read_text())) == []


BROKEN_RAY_UP = [
    ("max_worker", 2, "'max_worker' was unexpected"),
    ("max_workers", "two", "max_workers: 'two' is not of type"),
    ("provider/type", None, "'type' is a required property"),
    ("available_node_types/gpu/node_config", None, "'node_config' is a required property"),
    ("head_node_type", "heads", "no such type"),
    ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "worker_start_ray_commands: no tokens"),
    ("head_start_ray_commands", ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"], "dashboard is open"),
    ("file_mounts", {}, "nodes have no token"),
    ("available_node_types/head/resources", {"CPU": 8}, "the head gets work"),
    ("available_node_types/head/node_config/x", {"MarketType": "SPOT"}, "head: spot is for workers"),
    ("available_node_types/gpu/min_workers", 0, "gpu: workers come and go"),
    ("available_node_types/gpu/node_config/SecurityGroupIds", None, "gpu: port 22 is open"),
]


@pytest.mark.parametrize(("path", "value", "problem"), BROKEN_RAY_UP, ids=[path for path, *_ in BROKEN_RAY_UP])
def test_broken_ray_up_files_are_found(path: str, value: object, problem: str) -> None:
    config = yaml.safe_load((CLUSTERS / "aws.ray-up.yaml").read_text())
    assert problem in "\n".join(ray_up_problems(changed(config, path, value)))


# -------------------------------------------------------------------------------------- Kubernetes


def rayjob_problems(claim: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """By KubeRay's schema, by rules of its operator (`validation.go`) for what the file uses, and by ours."""
    found = problems_of(RAYJOB, job)
    if found:
        return found
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    groups = [head, *workers]
    if spec["submissionMode"] not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        found.append("submissionMode: unknown")
    if spec["submissionMode"] == "SidecarMode" and head["template"]["spec"].get("restartPolicy", "Never") != "Never":
        found.append("restartPolicy of the head must be Never")
    if "ttlSecondsAfterFinished" in spec and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if cluster["authOptions"].get("mode") != "token" or "rayVersion" not in cluster:
        found.append("tokens need a mode and rayVersion")
    if head["rayStartParams"].get("num-cpus") != "0" or not spec.get("entrypointNumCpus"):
        found.append("the head gets work")
    if any(group["minReplicas"] != group["maxReplicas"] for group in workers):
        found.append("workers come and go")
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        if set(mounted) != {volume["name"] for volume in pod["volumes"]}:
            found.append("volumes and mounts differ")
        if (
            mounted.get("unifork") != load(Cluster, CLUSTERS / "kuberay.yaml").root
            or "/dev/shm" not in mounted.values()
        ):
            found.append("root or shared memory is not mounted")
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        if claims != [claim["metadata"]["name"]]:
            found.append("another claim")
    if claim["spec"]["accessModes"] != ["ReadWriteMany"]:
        found.append("the volume is for one node")
    return found


def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kuberay.rayjob.yaml").read_text()))


def test_rayjob() -> None:
    assert rayjob_problems(*kuberay()) == []


CONTAINER = "spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0"
BROKEN_RAYJOB = [
    ("spec/entryPoint", "dvc repro", "'entryPoint' was unexpected"),
    (f"{CONTAINER}/volumeMount", [], "'volumeMount' was unexpected"),
    (f"{CONTAINER}/env/0/value", 1, "1 is not of type 'string'"),
    ("spec/rayClusterSpec/headGroupSpec/template/spec/containers", None, "'containers' is a required property"),
    ("spec/rayClusterSpec/authOptions/mode", "tokens", "'tokens' is not one of"),
    ("spec/rayClusterSpec/authOptions/mode", "disabled", "tokens need a mode"),
    ("spec/submissionMode", "Sidecar", "submissionMode: unknown"),
    ("spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy", "Always", "must be Never"),
    ("spec/shutdownAfterJobFinishes", False, "needs shutdownAfterJobFinishes"),
    ("spec/entrypointNumCpus", None, "the head gets work"),
    (f"{CONTAINER}/volumeMounts/0/mountPath", "/data", "root or shared memory is not mounted"),
    ("spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", 0, "workers come and go"),
]


@pytest.mark.parametrize(("path", "value", "problem"), BROKEN_RAYJOB)
def test_broken_rayjobs_are_found(path: str, value: object, problem: str) -> None:
    claim, job = kuberay()
    assert problem in "\n".join(rayjob_problems(claim, changed(job, path, value)))


# -------------------------------------------------------------------------------- Slurm, and all of them


def test_the_batch_script_is_one_that_bash_reads_and_slurm_knows() -> None:
    path = CLUSTERS / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(), re.MULTILINE))
    assert {"exclusive", "requeue", "signal", "nodes"} <= set(options)
    assert options["signal"].startswith("B:TERM@")  # the script alone gets it, in time
    assert "export RAY_AUTH_MODE=token" in path.read_text()
    trap = re.search(r"pkill .* -f '(\S+ .*)'", path.read_text())
    assert trap is not None
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    commands = [stage.get("do", stage)["cmd"] for stage in stages]
    assert all(re.match(trap[1], command) for command in commands)  # what dvc starts, and not what Ray starts
    assert not re.match(trap[1], f"{ROOT}/.venv/bin/python -m pipelines.train x")


def test_workers_have_room_where_their_manifests_put_them() -> None:
    gpus = 16
    for name in ("slurm", "kuberay", *CLOUDS):
        cluster = load(Cluster, CLUSTERS / f"{name}.yaml")
        assert cluster.train.workers == gpus
        assert cluster.driver.cpus + cluster.train.cpus * 8 <= 64
    assert sum(8 * group["replicas"] for group in kuberay()[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]) == gpus
    (nodes,) = re.findall(r"--nodes=(\d+)", (CLUSTERS / "slurm.sbatch").read_text())
    assert int(nodes) * 8 == gpus


def test_the_image_has_the_python_and_ray_of_the_lock() -> None:
    assert kuberay()[1]["spec"]["rayClusterSpec"]["rayVersion"] in (ROOT / "requirements.lock").read_text()
    assert "requirements.lock" in (CLUSTERS / "Dockerfile").read_text()
