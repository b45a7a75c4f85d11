"""Every program of the pipeline runs as a submitted job, whose working directory is not the experiment's root."""

import json
import re
import shlex
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


FORKED = """
import os, runpy, sys

sys.path.insert(0, "")
from unifork.training import stage  # what most of them import: once

for words in sys.argv[1:]:
    print("+", words, flush=True)
    if not (child := os.fork()):
        from unifork import processes

        processes._PARENT = os.getppid()
        sys.argv = words.split()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(code)
"""
"""Programs one after the other, each in a process of its own that has torch."""


@pytest.mark.cluster
def test_every_stage_runs_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    root, code = tmp_path / "experiment", tmp_path / "code"
    root.mkdir()
    write_experiment(root, CHANGES)
    (root / "clusters" / "far.yaml").write_text(
        f"name: far\naddress: {head.address}\n"
        "jobs: {encode: {workers: 1, cpus: 0.5}, answer: {workers: 1, cpus: 0.5}}\n"
        "train: {row_tokens: 2048}\ntrain_stages: {s1-captions: {workers: 1, cpus: 0.5, row_tokens: 2048}}\n"
    )
    for package in ("unifork", "pipelines"):
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    commands = [command.removeprefix("python -m ") for command in stages(root)]
    assert all(command.startswith("pipelines.") for command in commands)
    variables = {"UNIFORK_ROOT": str(root), "UNIFORK_CLUSTER": "clusters/far.yaml"}
    submit = [BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", code]
    submit += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    (code / "forked.py").write_text(FORKED)
    forked = shlex.join([sys.executable, "forked.py", *commands])
    submit += ["--", "bash", "-exc", f"pwd; test ! -e params.yaml; {forked}"]
    done = subprocess.run(submit, env=head.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(commands) >= 10
    assert (root / "reports/tiny/index.html").stat().st_size > 100_000
    assert json.loads((root / "scores/unifork/shapes-generation/metrics.json").read_text())
