"""SIGKILL at random moments, up to thirty times each, of the real programs: the end is always the same bytes."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from loopback import ROBOTS, Page, Web, image
from tiny import REPOSITORY, build, bytes_of, start, untrained

from unifork.shards.manifest import read_manifest, recorded_shards
from unifork.training.history import read

KILLS = 30
DEATHS = [signal.SIGKILL] * 15 + [signal.SIGTERM] * 5
CLUSTERS = {
    "here": "name: here\ntrain: {workers: 0, threads: 1, row_tokens: 384}\n",
    "two": "name: two\ncpus: 2\nobject_store_mb: 80\ntrain: {workers: 2, cpus: 0.5, threads: 1, row_tokens: 384}\n",
    "actors": "name: actors\ncpus: 2\njobs: {download: {workers: 2, cpus: 0.5}}\n",
}
CHANGES = {
    "datasets": {"shapes": {"rows": 1200, "shard_rows": 40}},
    "stages": {"s1-captions": {"tracks": {"joint": {"steps": 150, "batch_documents": 16}}, "checkpoint_every": 5}},
}
DOWNLOAD = (("pipelines.download", "shapes"), "data/raw/shapes")
PROGRAMS = {
    "download": DOWNLOAD,
    "filter": (("pipelines.filter", "shapes"), "data/filtered/shapes"),
    "encode": (("pipelines.encode", "shapes"), "data/codes/shapes"),
    "prepare": (("pipelines.prepare", "shapes-conversations-answer"), "data/prepared/shapes-conversations-answer"),
    "publish": (("unifork.cli", "publish", "shapes", "--to", "out"), "out"),
    "train": (("pipelines.train", "unifork-s1-captions"), "models/unifork-s1-captions"),
}
"""Words after `python -m`, and what the program makes."""
ANSWER = (("pipelines.answer", "unifork/shapes-understanding"), "answers/unifork/shapes-understanding")
ITEMS, PARTS = 640, 20
"""Questions, and parts of 32 of them that are answered at once on a CPU."""

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = build(tmp_path_factory.mktemp("soak"), CHANGES)
    for name, text in CLUSTERS.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def finish(program: subprocess.Popen) -> None:
    output = program.communicate(timeout=600)
    assert program.returncode == 0, output


def timed(root: Path, words: tuple[str, ...], cluster: str) -> float:
    started = time.monotonic()
    finish(start(root, *words, cluster=cluster))
    return time.monotonic() - started


def clear(root: Path, output: str) -> None:
    shutil.rmtree(root / output, ignore_errors=True)
    shutil.rmtree(root / "runs", ignore_errors=True)


def state(root: Path, output: str) -> dict[str, int]:
    """What changes as soon as a program does anything but start."""
    found = {}
    with suppress(FileNotFoundError):  # gone while we looked: a change as well
        for path in (*(root / output).rglob("*"), *(root / "runs").rglob("*")):
            found[str(path)] = path.stat().st_mtime_ns
    return found


def prepared(root: Path, words: tuple[str, ...], output: str, cluster: str) -> tuple[dict[str, bytes], float, float]:
    """What an undisturbed run makes, how long a program takes to start, and how long the work."""
    clear(root, output)
    whole = timed(root, words, cluster)
    starting = timed(root, words, cluster)
    expected = bytes_of(root / output)
    clear(root, output)
    return expected, starting, max(0.5, whole - starting)


def killed_after(
    seconds: float, program: subprocess.Popen, root: Path, output: str, expected: dict[str, bytes]
) -> bool:
    """Whether a program was killed; one that ended before made what it should, which is cleared away."""
    try:
        printed = program.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        program.kill()
        program.communicate()
        return True
    assert program.returncode == 0, printed
    assert bytes_of(root / output) == expected
    clear(root, output)
    return False


def killed_at_random(root: Path, words: tuple[str, ...], output: str, most: int) -> None:
    """Every second kill is in the start of a program, the others are in its work. What has ended begins anew."""
    expected, starting, working = prepared(root, words, output, "here.yaml")
    random.seed(words[-1])
    kills = in_work = finished = 0
    while kills < most:
        before = state(root, output)
        program = start(root, *words, cluster="here.yaml")
        if kills % 2:
            while program.poll() is None and state(root, output) == before:
                time.sleep(0.01)
            moment = random.uniform(0, 0.3 * working)
        else:
            moment = random.uniform(0, starting)
        if killed_after(moment, program, root, output, expected):
            kills += 1
            in_work += state(root, output) != before
        else:
            finished += 1
    finish(start(root, *words, cluster="here.yaml"))
    assert bytes_of(root / output) == expected
    print(f"\n{' '.join(words)}: {kills} kills, {in_work} of them in its work, {finished + 1} times finished")
    assert in_work >= most // 2


@pytest.mark.parametrize("name", PROGRAMS)
def test_random_kills_change_nothing(root, name):
    killed_at_random(root, *PROGRAMS[name], KILLS)


@pytest.fixture(scope="module")
def questions_root(tmp_path_factory) -> Path:
    """A root in which the model of step 0 is asked ITEMS questions."""
    name = ANSWER[1].rpartition("/")[2]
    root = untrained(tmp_path_factory.mktemp("answers"), {name: {"options": {"samples": ITEMS // 10}}})
    (root / "here.yaml").write_text(CLUSTERS["here"])
    finish(start(root, "pipelines.items", name, cluster="here.yaml"))
    return root


def shard_of(part: str) -> str:
    """The name of the shard that a part is of."""
    return re.sub(r"\.\d+\.json$", "", part)


def answered(folder: Path) -> dict[str, int]:
    """Answers that a program left, by the name of their shard: all of a finished one, or those of its parts."""
    found = Counter[str]()
    for part in folder.glob("part-*.json"):
        found[shard_of(part.name)] += len(json.loads(part.read_text())["answers"])
    return {**found, **{name: shard.rows for name, shard in recorded_shards(folder).items()}}


def has_more(folder: Path, before: dict[str, int]) -> bool:
    """Whether a running program has finished another part or shard."""
    with suppress(FileNotFoundError):  # gone while we looked
        return answered(folder) != before
    return False


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files hold them, and when they were written: a part until its shard is finished, then the shard."""
    shards = recorded_shards(folder)
    files = [path for path in folder.glob("part-*.json") if shard_of(path.name) not in shards]
    files += [folder / name for name in shards]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_random_kills_of_answers_cost_no_finished_part(questions_root):
    """Every second kill is in the start of the program, the others come after it has finished a part more."""
    words, output = ANSWER
    folder = questions_root / output
    expected, starting, working = prepared(questions_root, words, output, "here.yaml")
    random.seed(words[-1])
    kills = finished = 0
    progress = [0]
    while kills < KILLS:
        before, files = answered(folder), written(folder)
        program = start(questions_root, *words, cluster="here.yaml")
        if kills % 2:
            while program.poll() is None and not has_more(folder, before):
                time.sleep(0.01)
            moment = random.uniform(0, 2 * working / PARTS)
        else:
            moment = random.uniform(0, starting)
        if not killed_after(moment, program, questions_root, output, expected):
            finished, progress = finished + 1, [*progress, 0]
            continue
        kills += 1
        after, now = answered(folder), written(folder)
        again = [name for name in files.keys() & now.keys() if files[name] != now[name]]
        assert again == [], "work that was kept is made again"
        assert all(after[name] >= count for name, count in before.items())
        progress.append(sum(after.values()))
        print(f"kill {kills}: {progress[-1]} of {ITEMS} answers kept, {len(recorded_shards(folder))} whole shards")
    finish(start(questions_root, *words, cluster="here.yaml"))
    assert bytes_of(folder) == expected
    gains = sum(later > earlier for earlier, later in pairwise(progress))
    print(f"{' '.join(words)}: {kills} kills, {gains} of them after more answers, {finished + 1} times finished")
    assert gains >= KILLS // 3


def test_random_kills_of_a_download_from_the_web_change_nothing(tmp_path):
    """Of 12 shards of 40 rows, a fourth of which cannot be had, from a server that takes its time."""
    web, rows, forms = Web("127.0.0.1"), 480, ("PNG", "JPEG", "WEBP")
    web.pages["/robots.txt"] = ROBOTS
    bad = ("/gone", "/private/a", "/page", "/cut", "/moved", "http://127.0.0.2/a", "ftp://a", "http://")
    web.pages |= {"/page": b"<html>", "/cut": image("PNG")[:-500]}
    web.pages["/moved"] = lambda page: page.answer(302, Location="http://10.0.0.1/a.png")

    def slowly(page: Page, number: int) -> None:
        time.sleep(0.1)
        page.answer(200, image(forms[number % len(forms)], number))

    web.pages |= {f"/{number}": partial(slowly, number=number) for number in range(rows)}
    paths = [bad[number // 4 % len(bad)] if number % 4 == 3 else f"/{number}" for number in range(rows)]
    urls = [path if ":" in path else f"{web.root}{path}?{number}" for number, path in enumerate(paths)]
    web.pages |= {url.removeprefix(web.root): web.pages.get(path) for url, path in zip(urls, paths, strict=True)}
    (tmp_path / "lists").mkdir()
    pq.write_table(
        pa.table({"URL": urls, "TEXT": [f"text {number}" for number in range(rows)]}), tmp_path / "lists/a.parquet"
    )
    card = {
        "name": "web",
        **dict.fromkeys(("title", "homepage", "license", "attribution"), "-"),
        "redistribute_codes": False,
        "source": {"kind": "url_list", "options": {"files": "lists", "fetch": {"allow_addresses": ["127.0.0.1/32"]}}},
        "tasks": {"generation": {"view": "crop", "texts": ["caption"]}},
    }
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["datasets"]["web"] = {"rows": None, "shard_rows": 40}
    (tmp_path / "datasets").mkdir()
    for file, plain in (("datasets/web.yaml", card), ("params.yaml", params)):
        (tmp_path / file).write_text(yaml.safe_dump(plain))
    (tmp_path / "here.yaml").write_text(CLUSTERS["here"])
    killed_at_random(tmp_path, ("pipelines.download", "web"), "data/raw/web", KILLS // 2)
    manifest = read_manifest(tmp_path / "data/raw/web")
    assert (manifest.rows, len(manifest.shards)) == (rows * 3 // 4, 12)
    assert manifest.dropped == {
        **dict.fromkeys(("forbidden_address", "bad_url"), 30),
        **dict.fromkeys(("http_404", "robots_denied", "not_an_image", "undecodable"), 15),
    }


def actors(program: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes below a driver, those not asked for anything included."""
    try:
        below = psutil.Process(program.pid).children(recursive=True)
        return [child for child in below if child.name().startswith("ray::") and not child.name().endswith("Agent")]
    except psutil.NoSuchProcess:
        return []


def test_random_kills_of_drivers_and_actors_change_nothing(root):
    """Of two actors on a Ray of the program's own: one is killed at a random moment, then the driver at another."""
    words, output = DOWNLOAD
    expected, starting, working = prepared(root, words, output, "actors.yaml")
    random.seed("actors")
    killed = {"driver": 0, "actor": 0}
    finished = 0
    while sum(killed.values()) < KILLS:
        program = start(root, *words, cluster="actors.yaml")
        if sum(killed.values()) % 2:
            while program.poll() is None and not actors(program):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5 * working))
            if workers := actors(program):
                random.choice(workers).kill()
                killed["actor"] += 1
        if killed_after(random.uniform(0, starting + 2 * working), program, root, output, expected):
            killed["driver"] += 1
        else:
            finished += 1
    finish(start(root, *words, cluster="actors.yaml"))
    assert bytes_of(root / output) == expected
    print(f"\n{killed['driver']} drivers and {killed['actor']} actors killed, {finished + 1} times finished")
    assert min(killed.values()) >= KILLS // 4


@pytest.mark.parametrize("cluster", ["here.yaml", "two.yaml"])
def test_deaths_in_the_steps_of_training_change_nothing_and_announced_ones_lose_no_step(root, cluster):
    """On one worker and on two of Ray Train; every death is in the steps, announced or not, until all are through."""
    words, output = PROGRAMS["train"]
    expected, _, working = prepared(root, words, output, cluster)
    run, done = root / "runs" / words[1], {signal.SIGKILL: 0, signal.SIGTERM: 0}
    deaths = random.Random(cluster).sample(DEATHS, len(DEATHS))
    while deaths:
        before = starts(run)
        program = start(root, *words, cluster=cluster)
        while program.poll() is None and starts(run) == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1 * working))
        steps = len(read(run))
        program.send_signal(deaths[-1])
        program.communicate(timeout=100)
        if program.returncode == 0:  # it had come to its end
            assert bytes_of(root / output) == expected
            clear(root, output)
            continue
        number = deaths.pop()
        done[number] += 1
        if number == signal.SIGTERM:
            assert program.returncode == 128 + number
            assert steps <= latest_step(run) == len(read(run))
    finish(start(root, *words, cluster=cluster))
    assert bytes_of(root / output) == expected
    print(f"\n{cluster}: {done[signal.SIGKILL]} kills and {done[signal.SIGTERM]} signals in the steps of training")


def starts(run: Path) -> int:
    """How often the steps of a run began; its history may grow by workers that outlive their driver for a moment."""
    return (run / "log.txt").read_text().count(" M parameters\n") if (run / "log.txt").exists() else 0


def latest_step(run: Path) -> int:
    """Steps that are saved."""
    return int((run / "latest").read_text().removeprefix("step-")) if (run / "latest").exists() else 0
