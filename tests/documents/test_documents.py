"""Prepared mixtures: what is quarantined, what is refused, what a step contains."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import ROWS, copy_of, prepare_set

from unifork.batch import IMAGE, pack
from unifork.config import Experiment, MixtureEntry, load
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError, IdentityError
from unifork.layout import Layout
from unifork.shards.manifest import read_manifest

GENERATE = MixtureEntry(dataset="shapes", task="generation", text="caption", template="generate", weight=1.0)
ANSWER = MixtureEntry(dataset="shapes", task="understanding", text="conversations", template="answer", weight=1.0)


def identity_of(root: Path) -> CodesIdentity:
    lineage = read_manifest(root / "data/codes/shapes/crop").lineage
    return CodesIdentity(36, 4, lineage["codebook_id"], lineage["encoder_id"])


def opened(root, entry, context=400, identity=None):
    tokenizer = TextTokenizer(root / "tokenizers/text")
    return MixturePart(entry, Layout(root), tokenizer, identity or identity_of(root), context)


def part(root, entry, context=400, identity=None):
    """A part of a mixture, its documents prepared if they are not."""
    prepare_set(root, entry.dataset, entry.text, entry.template)
    return opened(root, entry, context, identity)


def test_a_code_that_the_codebook_does_not_have_is_named_when_it_is_read(tiny_root):
    identity = replace(identity_of(tiny_root), codebook_size=3)
    with pytest.raises(
        DataError, match=r"crop/part-00000\.parquet: key 'shapes-\d+' of shapes has code \d+; the codebook ends at 2"
    ):
        part(tiny_root, GENERATE, identity=identity).codes(0)


def test_documents_carry_the_codes_of_their_own_row(tiny_root):
    import pyarrow.parquet as pq

    folder = tiny_root / "data/codes/shapes/crop"
    rows = [r for s in read_manifest(folder).shards for r in pq.read_table(folder / s.path).to_pylist()]
    mixture_part = part(tiny_root, GENERATE)
    assert len(mixture_part) == ROWS
    for number in (0, 31, 32, ROWS - 1):
        document = mixture_part.document(number)
        assert document.key == rows[number]["key"]
        expected = np.frombuffer(rows[number]["codes"][0], "<u2").reshape(36, 4)
        assert (document.codes_ND == expected).all()
        assert (document.kinds_T == IMAGE).sum() == 36
        assert mixture_part.length(number) == len(document)


def test_documents_that_are_too_long_are_counted_and_the_others_keep_their_order(tiny_root):
    everything = part(tiny_root, ANSWER, context=1000)
    lengths = [everything.length(n) for n in range(len(everything))]
    assert (len(everything), everything.quarantined) == (ROWS, {})
    for context in (sorted(lengths)[-5] - 1, sorted(lengths)[ROWS // 2], min(lengths)):
        fitting = [n for n, length in enumerate(lengths) if length <= context]
        short = part(tiny_root, ANSWER, context=context)
        assert short.folder == everything.folder  # no second one is made for another context
        assert short.quarantined == {f"longer than the context of {context} tokens": ROWS - len(fitting)}
        assert sum(short.group_sizes) == len(short) == len(fitting)
        assert [short.key(n) for n in range(len(short))] == [everything.key(n) for n in fitting]
        assert [short.length(n) for n in range(len(short))] == [lengths[n] for n in fitting]
        for number, whole in enumerate(fitting):
            found, expected = short.document(number), everything.document(whole)
            assert all((getattr(found, name) == getattr(expected, name)).all() for name in ("text_ids_T", "codes_ND"))


def test_rows_without_a_image_are_dialogues_of_text_alone(tiny_root, tmp_path):
    """No codes mean no image; what cannot be written then is quarantined with its key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = copy_of(tiny_root, tmp_path)
    folder = root / "data/codes/shapes/pad"
    shard = read_manifest(folder).shards[0]
    table = pq.read_table(folder / shard.path)
    rows = table.to_pylist()
    rows[1]["codes"] = rows[3]["codes"] = []
    rows[3]["conversations"] = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "x"}]
    rows[5]["conversations"] = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "a <image>"}]
    rows[6]["conversations"] = [{"role": "assistant", "text": "x"}]
    (folder / shard.path).unlink()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / shard.path, row_group_size=16)
    plain = json.loads((folder / "manifest.json").read_text())
    data = (folder / shard.path).read_bytes()
    plain["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(plain))

    with pytest.raises(DataError, match=r"answer: made with other codes than are here now; `dvc repro --force"):
        opened(root, ANSWER)
    mixture_part = part(root, ANSWER)
    assert pq.read_table(
        mixture_part.folder / "quarantine/part-00000.parquet", columns=["key", "reason", "detail"]
    ).to_pylist() == [
        {"key": rows[number]["key"], "reason": "broken_dialogue", "detail": detail}
        for number, detail in (
            (3, "image markers: 1, images: 0"),
            (5, "an image marker inside an answer"),
            (6, "roles are ['assistant'], not user and assistant in turn"),
        )
    ]
    assert mixture_part.quarantined == {"broken_dialogue": 3}
    assert mixture_part.group_sizes[:2].tolist() == [13, 16]
    documents = [mixture_part.document(number) for number in range(4)]
    assert [mixture_part.length(number) for number in range(4)] == [len(document) for document in documents]
    assert [document.key for document in documents] == [rows[n]["key"] for n in (0, 1, 2, 4)]
    assert [(document.kinds_T == IMAGE).sum() for document in documents] == [36, 0, 36, 36]
    assert [document.codes_ND.shape for document in documents] == [(36, 4), (0, 4), (36, 4), (36, 4)]
    assert (documents[2].codes_ND == np.frombuffer(rows[2]["codes"][0], "<u2").reshape(36, 4)).all()
    assert documents[1].loss_mask_T.any()
    assert len(pack([documents], 2048, 4).image_index_N) == 3 * 36


def test_nothing_usable_is_an_error(tiny_root):
    with pytest.raises(DataError, match=r"none of its rows can be used .*'longer than the context of 10 tokens': 96"):
        part(tiny_root, ANSWER, context=10)


def test_codes_of_another_tokenizer_are_refused(tiny_root):
    right = identity_of(tiny_root)
    with pytest.raises(IdentityError, match="codebook_id"):
        part(tiny_root, GENERATE, identity=CodesIdentity(36, 4, "0" * 16, right.encoder_id))
    with pytest.raises(IdentityError, match="encoder_id"):
        part(tiny_root, GENERATE, identity=CodesIdentity(36, 4, right.codebook_id, "0" * 16))
    with pytest.raises(IdentityError, match="shape"):
        part(tiny_root, GENERATE, identity=CodesIdentity(64, 4, right.codebook_id, right.encoder_id))


def test_a_wrong_view_is_an_error(tiny_root, tmp_path):
    shutil.copytree(tiny_root / "data/codes/shapes/crop", tmp_path / "data/codes/shapes/pad")
    for name in ("tokenizers", "datasets"):
        shutil.copytree(tiny_root / name, tmp_path / name)
    entry = GENERATE.model_copy(update={"task": "understanding", "template": "caption"})
    with pytest.raises(DataError, match=r"view 'crop'.*understanding reads 'pad'"):
        part(tmp_path, entry, identity=identity_of(tiny_root))


def test_a_template_of_the_other_task_is_an_error(tiny_root):
    with pytest.raises(ConfigError, match=r"'answer' is for understanding"):
        opened(tiny_root, GENERATE.model_copy(update={"template": "answer"}))
    with pytest.raises(ConfigError, match=r"unknown prompt template 'generat'.*Did you mean 'generate'"):
        opened(tiny_root, GENERATE.model_copy(update={"template": "generat"}))


def loader(root, workers_rows=(512, 1), drop=0.5):
    experiment = load(Experiment, root / "params.yaml")
    track = experiment.stages["s2-pretrain"].tracks["joint"].model_copy(update={"prompt_drop": drop})
    return TrackLoader(
        "joint", track, Layout(root), TextTokenizer(root / "tokenizers/text"), identity_of(root),
        seed=0, context=400, row_tokens=workers_rows[0], rows_per_microbatch=workers_rows[1],
    )  # fmt: skip


def contents(batches):
    """The documents of packed batches as comparable tuples, wherever they lie."""
    found = []
    for batch in batches:
        T = batch.text_ids_BT.shape[1]
        rows = np.zeros(batch.text_ids_BT.numel(), np.int64)
        rows[batch.image_index_N.numpy()] = np.arange(len(batch.image_index_N))
        for b in range(batch.text_ids_BT.shape[0]):
            for number in range(int(batch.documents_BT[b].max()) + 1):
                where = np.flatnonzero(batch.documents_BT[b].numpy() == number)
                kinds = batch.kinds_BT[b, where]
                codes = batch.codes_ND[rows[b * T + where[kinds.numpy() == IMAGE]]]
                found.append((tuple(batch.text_ids_BT[b, where].tolist()), tuple(codes.reshape(-1).tolist())))
    return sorted(found)


def test_a_step_is_the_same_whatever_the_rows_and_workers(tiny_root):
    reference = loader(tiny_root)
    plan = reference.plan(7, 1)
    expected = contents(reference.batches(plan, 0))
    assert len(expected) == 16
    for row_tokens, rows, workers in [(384, 1, 1), (512, 2, 2), (1024, 1, 4)]:
        other = loader(tiny_root, (row_tokens, rows))
        plans = other.plan(7, workers)
        assert plans.keys == plan.keys
        assert (plans.text_targets, plans.image_targets) == (plan.text_targets, plan.image_targets)
        assert contents(b for w in range(workers) for b in other.batches(plans, w)) == expected


def test_the_plan_counts_the_targets_that_the_batches_hold(tiny_root):
    track_loader = loader(tiny_root)
    for step in range(4):
        plan = track_loader.plan(step, 2)
        batches = [b for worker in range(2) for b in track_loader.batches(plan, worker)]
        assert sum(len(b.text_target_S) for b in batches) == plan.text_targets
        assert sum(len(b.image_target_MD) for b in batches) == plan.image_targets


def test_prompts_are_dropped_at_their_rate_and_by_step_alone(tiny_root):
    track_loader = loader(tiny_root, drop=0.25)
    plans = [track_loader.plan(step, 1) for step in range(60)]
    generation = sum(track_loader.parts[s.part].task == "generation" for p in plans for s in p.slots)
    dropped = sum(sum(p.dropped) for p in plans)
    assert abs(dropped / generation - 0.25) < 0.06
    assert loader(tiny_root, drop=0.25).plan(41, 1).dropped == plans[41].dropped
