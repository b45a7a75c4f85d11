"""Answering that is killed in the middle of a shard goes on with the next part of it and ends with the same bytes."""

import os
import signal

import pytest
import torch
from forks import SERVER
from tiny import REPOSITORY, bytes_of, run_here

from unifork.config import Benchmark, load_eval
from unifork.evaluation import answering
from unifork.evaluation.answering import Answerer, answer_job
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import write_items
from unifork.evaluation.suites import suite_of
from unifork.inference import Engine

CARDS = {"shapes-understanding": "answer_questions", "shapes-generation": "generate_images"}
"""And what has a model answer them."""
ITEMS, PART, DONE = 76, 8, 3
"""Items in two shards, items of a part, and parts of the first shard that are there when a run is killed."""


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A folder of items for each card."""
    root = tmp_path_factory.mktemp("items")
    for name in CARDS:
        card = load_eval(name, REPOSITORY / "datasets/evals").used(Benchmark(options={"samples": 10}))
        suite, options = suite_of(card)
        archive = Archive(card, options)
        first = suite.read(archive, options, 0)[:ITEMS]
        write_items(card, first, lambda image, s=suite, a=archive: s.image(a, image), root / name, {})
    return root


def answer(model, items, folder, card, seed=0):
    """All answers of a benchmark, in parts of PART items."""
    torch.set_num_threads(1)
    answering.PART = {"cpu": PART}
    job = answer_job(card, items, folder, model, seed)
    run_here([job], Answerer(model, card.answer, "cpu"))


def die_in_a_part(*arguments) -> None:
    """The same in a process that is killed before the next part after DONE has its name."""
    replace, parts = os.replace, []

    def dying(source, target):
        parts.extend([target] if str(target).endswith(".json") else [])
        if len(parts) > DONE:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying
    answer(*arguments)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.slow
def test_only_what_is_left_is_answered_and_the_bytes_are_the_same(tiny_root, items, tmp_path, monkeypatch, name):
    card, folder, numbers = load_eval(name, REPOSITORY / "datasets/evals"), tmp_path / "killed", []
    engine_answers = getattr(Engine, CARDS[name])

    def counted(engine, given, *others, **options):
        numbers.append(len(given))
        return engine_answers(engine, given, *others, **options)

    monkeypatch.setattr(Engine, CARDS[name], counted)
    monkeypatch.setattr(answering, "PART", {})
    given = (tiny_root / "models/unifork-init", items / name)
    answer(*given, tmp_path / "whole", card)
    assert sum(numbers) == ITEMS
    assert numbers[: DONE + 1] == [PART] * (DONE + 1)
    whole = bytes_of(tmp_path / "whole")
    for seed, left in ((0, ITEMS - DONE * PART), (1, ITEMS)):  # with another seed nothing is taken over
        process = SERVER.Process(target=die_in_a_part, args=(*given, folder, card))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(folder.glob("part-00000.parquet.*.json"))) == DONE
        assert not list(folder.glob("*.done"))
        numbers.clear()
        answer(*given, folder, card, seed)
        assert sum(numbers) == left
        assert {file for file in bytes_of(folder) if file != "manifest.json"} == whole.keys() - {"manifest.json"}
        if seed == 0:
            assert bytes_of(folder) == whole
        for path in folder.iterdir():
            path.unlink()
