"""Distances of features: the official numbers, closed forms, MJHQ-30K from images to its score, bad statistics."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from generation_files import benchmark
from test_generation_rules import VECTORS, distance, scores_of

from unifork.errors import DataError
from unifork.evaluation.answers import join
from unifork.evaluation.generation.frechet import moments
from unifork.evaluation.generation.mjhq import Options, summarize
from unifork.evaluation.suites import Answer


@pytest.mark.parametrize("vector", VECTORS["frechet"], ids=lambda vector: str(vector["official"]))
def test_distances_of_the_official_scorer(vector):
    found = distance(*(np.array(vector[name]) for name in ("mu1", "sigma1", "mu2", "sigma2")))
    assert found == pytest.approx(vector["official"], abs=1e-12)


def test_moments_are_over_one_less_than_the_rows():
    vector = VECTORS["fid_stats_example"]
    mean, covariance = moments(np.array(vector["activations"], dtype=np.float32))
    assert mean.tolist() == vector["mu"]
    assert covariance.tolist() == vector["sigma_np_cov_rowvar_False (ddof 1)"]


def test_distances_in_closed_form_and_of_few_rows():
    i, j = np.mgrid[1:9, 1:4].astype(float)
    assert distance([0, 1, 2], np.diag([1, 4, 9]), [1, 1, 0], np.diag([4, 1, 9])) == pytest.approx(7, abs=1e-12)
    rows, others = np.sin(i * j), np.cos(i * (j + 0.5)) + 0.2
    assert distance(*moments(rows), *moments(others)) == pytest.approx(0.060174924860, abs=1e-10)
    i, j = np.mgrid[1:4, 1:6].astype(float)
    singular = distance(*moments(np.sin(i * j)), *moments(np.cos(i * j)))
    assert singular == pytest.approx(6.082172286377, abs=1e-6)


def features(rows, name="pytorch-fid-abc"):
    return [json.dumps({name: base64.b64encode(row.astype("<f4").tobytes()).decode()}) for row in rows]


def mjhq_scores(folder, rows, reference, **options):
    folder.mkdir(parents=True, exist_ok=True)
    summarize(folder, [Answer("", text) for text in features(reference)])
    card, items = benchmark("mjhq", folder / "files", options={"reference": str(folder), **options})
    texts = dict(zip([item.id for item in items], features(rows), strict=True))
    return scores_of(card, items, lambda item: texts[item.id])


def test_fid_of_the_reference_is_0_of_a_constant_known_and_of_noise_above(tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    scores, records = mjhq_scores(tmp_path / "same", rows, rows)
    assert scores["fid"].value == pytest.approx(0, abs=1e-9)
    assert scores["fid"].rule == "pytorch-fid"
    assert records[0]["answer"] is None
    assert records[0]["verdicts"] == {}
    mean, covariance = moments(rows)
    constant, _ = mjhq_scores(tmp_path / "constant", np.ones((6, 3)), rows)
    assert constant["fid"].value == pytest.approx(((mean - 1) ** 2).sum() + np.trace(covariance))
    assert mjhq_scores(tmp_path / "noise", rows[::-1] + 1, rows)[0]["fid"].value == pytest.approx(3, rel=1e-5)


def test_fids_error_is_a_bootstrap_and_few_images_are_warned_of(tmp_path):
    rows = np.random.default_rng(1).normal(size=(6, 3))
    scores, _ = mjhq_scores(tmp_path / "a", rows, rows + 1)
    assert scores["fid"].standard_error > 0
    assert "pytorch-fid-abc; 6 images; error of 10 bootstrap draws; WARNING: fewer than 2048 images" in str(
        scores["fid"]
    )
    assert mjhq_scores(tmp_path / "b", rows, rows, resamples=0)[0]["fid"].standard_error is None
    many = np.random.default_rng(1).normal(size=(2048, 3))
    from unifork.evaluation.generation.mjhq import whole

    note = whole(Options(reference=str(tmp_path / "a")), "pytorch-fid", [Answer("", t) for t in features(many)])[2]
    assert "WARNING" not in note


def test_fid_refuses_other_networks_missing_statistics_and_fewer_images(tmp_path):
    rows = np.random.default_rng(2).normal(size=(6, 3))
    card, items = benchmark("mjhq", tmp_path / "files", options={"reference": str(tmp_path)})
    texts = dict(zip([item.id for item in items], features(rows), strict=True))
    with pytest.raises(DataError, match=r"pytorch-fid-abc\.npz: no statistics of the reference.*examine mjhq"):
        scores_of(card, items, lambda item: texts[item.id])
    other = {**texts, items[0].id: features(rows[:1], "pytorch-fid-def")[0]}
    with pytest.raises(DataError, match=r"features of \['pytorch-fid-abc', 'pytorch-fid-def'\] for pytorch-fid"):
        scores_of(card, items, lambda item: other[item.id])
    with pytest.raises(DataError, match="features of no network for pytorch-fid"):
        scores_of(card, items, lambda _: "an image")
    np.savez(tmp_path / "pytorch-fid-abc.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"\(4,\) features; the answers are \(6, 3\)"):
        scores_of(card, items, lambda item: texts[item.id])
    with pytest.raises(DataError, match="1 items have no answer"):
        join(card, items, [Answer(item.id, texts[item.id]) for item in items[1:]], "test")


class Harm:
    """What touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_statistics_that_are_pickled_are_refused_unread(tmp_path):
    rows = np.random.default_rng(2).normal(size=(6, 3))
    card, items = benchmark("mjhq", tmp_path / "files", options={"reference": str(tmp_path)})
    harm = np.array([Harm(tmp_path / "harm")] * 3, dtype=object)
    np.savez(tmp_path / "pytorch-fid-abc.npz", mu=harm, sigma=np.eye(3))
    texts = dict(zip([item.id for item in items], features(rows), strict=True))
    with pytest.raises(DataError, match=r"pytorch-fid-abc\.npz: no mean .*Object arrays cannot be loaded"):
        scores_of(card, items, lambda item: texts[item.id])
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04x", b"text", "no sigma", "small", "nan"], ids=repr)
def test_fid_refuses_statistics_that_are_none(tmp_path, damage):
    rows = np.random.default_rng(2).normal(size=(6, 3))
    card, items = benchmark("mjhq", tmp_path / "files", options={"reference": str(tmp_path)})
    path, mean = tmp_path / "pytorch-fid-abc.npz", np.zeros(3)
    arrays = {"no sigma": {}, "small": {"sigma": np.eye(2)}, "nan": {"sigma": np.full((3, 3), np.nan)}}
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        np.savez(path, mu=mean, **arrays[damage])
    texts = dict(zip([item.id for item in items], features(rows), strict=True))
    with pytest.raises(DataError, match=r"pytorch-fid-abc\.npz: no mean `mu` and covariance `sigma` of features: "):
        scores_of(card, items, lambda item: texts[item.id])


@pytest.mark.parametrize("text", [3, "!", "AAA", ""])
def test_fid_refuses_features_that_are_none(tmp_path, text):
    rows = np.random.default_rng(2).normal(size=(6, 3))
    card, items = benchmark("mjhq", tmp_path / "files", options={"reference": str(tmp_path)})
    texts = dict(zip([item.id for item in items], features(rows), strict=True))
    for odd in (json.dumps({"pytorch-fid-abc": text}), *features(np.full((1, 3), np.nan))):
        texts[items[0].id] = odd
        with pytest.raises(DataError, match="features are no base64 of equally many float32 numbers: "):
            scores_of(card, items, lambda item: texts[item.id])
