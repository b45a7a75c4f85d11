"""Every program of the pipeline runs as a submitted job, whose working directory is not the experiment's root."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray_heads import BIN, Head
from tiny import REPOSITORY, write_experiment

pytestmark = pytest.mark.slow

CHANGES = {
    "datasets": {"shapes": {"rows": 64, "shard_rows": 32}},
    "image_tokenizer": {"training": {"steps": 12, "quantize_from_step": 6, "held_out_images": 8}},
    "benchmarks": {
        name: {"options": {"samples": count}} for name, count in (("shapes-generation", 1), ("shapes-understanding", 2))
    },
    "text_evals": ["text-0shot"],  # whose files are not here
}


def stages(root: Path) -> list[str]:
    """Every stage of `dvc.yaml`, in its order, as commands of an experiment with one data set, variant and stage."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    names = ("datasets", "prepared", "variants", "runs", "benchmarks", "evaluations", "examined", "text_runs", "scored",
             "analyzed")  # fmt: skip
    loops = {f"${{{name}}}": name for name in names}
    commands = []
    for stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].values():
        entries = params[loops[stage["foreach"]]] if "foreach" in stage else {"": {}}
        for key, item in entries.items():
            command = stage.get("do", stage)["cmd"].replace("${key}", key)
            for field in re.findall(r"\$\{item\.(\w+)\}", command):
                command = command.replace(f"${{item.{field}}}", item[field])
            commands.append(command)
    return commands


@pytest.mark.cluster
def test_every_stage_runs_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    root, code = tmp_path / "experiment", tmp_path / "code"
    root.mkdir()
    write_experiment(root, CHANGES)
    (root / "clusters" / "far.yaml").write_text(
        f"name: far\naddress: {head.address}\n"
        "jobs: {encode: {workers: 1, cpus: 0.5}, prepare: {workers: 1, cpus: 0.5}, answer: {workers: 1, cpus: 0.5}}\n"
        "train: {row_tokens: 2048}\ntrain_stages: {s1-captions: {workers: 1, cpus: 0.5, row_tokens: 2048}}\n"
    )
    for package in ("unifork", "pipelines"):
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    commands = [command.replace("python", sys.executable, 1) for command in stages(root)]
    variables = {"UNIFORK_ROOT": str(root), "UNIFORK_CLUSTER": "clusters/far.yaml"}
    submit = [BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", code]
    submit += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    submit += ["--", "bash", "-exc", "pwd; test ! -e params.yaml; " + "; ".join(commands)]
    done = subprocess.run(submit, env=head.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(commands) >= 10
    assert (root / "reports/tiny/index.html").stat().st_size > 100_000
    assert json.loads((root / "scores/unifork/shapes-generation/metrics.json").read_text())
