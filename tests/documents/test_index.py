"""The prepared index: made once, never stale, made again when damaged, the same whoever makes it."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from unifork.documents import mixture as documents
from unifork.documents.index import COLUMNS, META, QUARANTINE, TokenizedDocument, prepared
from unifork.errors import DataError

DOCUMENTS = [
    TokenizedDocument(f"key-é-{n}", np.arange(n + 1), np.arange(n + 1) % 2 == 0, image_at=n % 3, row=2 * n)
    for n in range(7)
]


def prepare(writer):
    writer.add(0, 0, DOCUMENTS[:3])
    writer.quarantine("bad", "no text")
    writer.add(0, 1, [])
    writer.add(1, 0, DOCUMENTS[3:])


def assert_right(index):
    assert index.rows == 7
    assert index.group_sizes_G.tolist() == [3, 4]
    assert index.quarantined == {"no text": 1}
    for number, document in enumerate(DOCUMENTS):
        assert index.key(number) == document.key
        assert (index.text_ids_S[index.text(number)] == document.ids_T).all()
        assert (index.loss_mask_S[index.text(number)] == document.loss_mask_T).all()
        assert index.image_at_R[number] == document.image_at
        assert index.supervised_count_R[number] == document.loss_mask_T.sum()
    assert index.where_R3[4].tolist() == [1, 0, 8]


def never(writer):
    raise AssertionError("prepared again")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "text_ids_S"),
    "a flipped bit in the quarantine": lambda folder: flip(folder / QUARANTINE),
    "a file cut short": lambda folder: os.truncate(folder / "where_R3", 12),
    "a file missing": lambda folder: (folder / "key_bytes").unlink(),
    "the last file missing": lambda folder: (folder / META).unlink(),
    "the last file damaged": lambda folder: (folder / META).write_text("{"),
    "another format": lambda folder: (folder / META).write_text(json.dumps({"format": 0, "files": {}})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_whole_index_is_kept_and_a_damaged_one_is_made_again(tmp_path, damage):
    folder = tmp_path / "index"
    assert_right(prepared(folder, prepare))
    assert_right(prepared(folder, never))
    DAMAGE[damage](folder)
    assert_right(prepared(folder, prepare))
    assert_right(prepared(folder, never))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert {path.name for path in folder.iterdir()} == {*COLUMNS, QUARANTINE, META}


def test_nothing_is_kept_when_preparing_fails(tmp_path):
    def fails(writer):
        prepare(writer)
        raise DataError("no")

    with pytest.raises(DataError):
        prepared(tmp_path / "index", fails)
    assert list(tmp_path.iterdir()) == []


def started(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_a_worker_killed_while_preparing_leaves_nothing_in_the_way(tmp_path):
    def killed(writer):
        prepare(writer)
        os.kill(os.getpid(), signal.SIGKILL)

    process = started(prepared, tmp_path / "index", killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_right(prepared(tmp_path / "index", prepare))


def test_of_several_workers_one_prepares(tmp_path):
    def slow(writer):
        (tmp_path / f"made-by-{os.getpid()}").touch()
        time.sleep(0.3)
        prepare(writer)

    def worker():
        assert_right(prepared(tmp_path / "index", slow))

    workers = [started(worker) for _ in range(4)]
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("made-by-*"))) == 1


def test_what_documents_are_made_of_decides_which_index_is_read(tiny_root, monkeypatch):
    from test_documents import ANSWER, GENERATE, part

    first = part(tiny_root, GENERATE)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "skeleton", never)
        again = part(tiny_root, GENERATE)
    assert again.index.folder == first.index.folder
    others = [
        part(tiny_root, GENERATE, context=399),
        part(tiny_root, GENERATE.model_copy(update={"template": "generate-plain"})),
        part(tiny_root, ANSWER),
    ]
    for name in ("DOCUMENTS_VERSION", "VOCABULARY_VERSION"):
        monkeypatch.setattr(documents, name, 2)
        others.append(part(tiny_root, GENERATE))
    assert len({first.index.folder, *(other.index.folder for other in others)}) == 6
    assert all((others[-1].codes(n) == first.codes(n)).all() for n in range(5))
