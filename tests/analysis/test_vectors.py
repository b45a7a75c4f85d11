"""The measures of `unifork.analysis` against vectors that were computed independently, in float64."""

import numpy as np
import pytest
import torch

from unifork.analysis.alignment import ROWS, curve, masked_means, neighbors, overlaps, similarities
from unifork.analysis.entropy import conditional_entropy, entropies
from unifork.analysis.gradients import conflict
from unifork.batch import TEXT, Document
from unifork.config import Analysis
from unifork.errors import ConfigError, DataError

SCORES = {  # rows, channels of both, k: l2, raw, centered, clamped by all values, clamped by rows
    (12, 5, 4, 1): (0.5, 0.4166666667, 0.5, 0.5, 0.5),
    (12, 5, 4, 2): (0.4166666667, 0.4166666667, 0.4583333333, 0.4166666667, 0.5),
    (12, 5, 4, 3): (0.6111111111, 0.5833333333, 0.5555555556, 0.6111111111, 0.6111111111),
    (12, 5, 4, 5): (0.6666666667, 0.65, 0.6333333333, 0.6833333333, 0.7),
    (100, 16, 12, 5): (0.378, 0.372, 0.382, 0.38, 0.376),
    (100, 16, 12, 10): (0.355, 0.365, 0.358, 0.354, 0.352),
    (100, 16, 12, 20): (0.364, 0.359, 0.364, 0.365, 0.3655),
}


def waves(rows: int, *channels: int) -> list[torch.Tensor]:
    i = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    first, second = (torch.arange(1, count + 1, dtype=torch.float64) for count in channels)
    return [
        torch.sin(i * (first + 0.5)),
        torch.sin(i * (second + 0.5)) + 0.8 * torch.cos(1.7 * i * (second + 0.25) + 0.3),
    ]


def score(a, b, k, rows="l2"):
    return float(overlaps(similarities(a, rows), similarities(b, rows), k).mean())


@pytest.mark.parametrize("case", SCORES)
def test_alignment_scores(case):
    *shape, k = case
    a, b = waves(*shape)
    assert [score(a, b, k, rows) for rows in ROWS] == pytest.approx(SCORES[case], abs=1e-9)
    assert [score(b, a, k, rows) for rows in ROWS] == pytest.approx(SCORES[case], abs=1e-9)
    assert score(a.float(), b.float(), k) == pytest.approx(SCORES[case][0], abs=1e-9)


def test_neighbors_and_overlaps():
    a, b = map(similarities, waves(12, 5, 4))
    assert neighbors(a, 3)[:4].tolist() == [[4, 7, 8], [8, 9, 3], [9, 10, 7], [10, 1, 7]]
    assert neighbors(b, 3)[:4].tolist() == [[10, 7, 8], [8, 3, 6], [9, 4, 7], [1, 6, 11]]
    assert (overlaps(a, b, 2) * 2).tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    with pytest.raises(ConfigError, match="k is 12; among 12 prompts each has 11"):
        neighbors(a, 12)


def test_means_over_masks():
    i, t, c = (torch.arange(1, n + 1, dtype=torch.float64).view(shape) for n, shape in (
        (8, (8, 1, 1)), (5, (1, 5, 1)), (3, (1, 1, 3))))  # fmt: skip
    x, y = torch.sin(0.9 * i * c + 0.37 * t**2), torch.cos(0.6 * i * c + 0.21 * t)
    masks = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 1, 3, 4])[:, None, None]
    masked, plain = masked_means(x, masks)[:, 0], y.mean(1)
    assert masked[1].tolist() == pytest.approx([-0.07541378, -0.35579887, 0.23709028], abs=5e-9)
    assert [score(masked, plain, k) for k in (1, 2, 3)] == pytest.approx([0.125, 0.25, 1 / 3], abs=1e-9)
    assert [score(x.mean(1), plain, k) for k in (1, 2, 3)] == pytest.approx([0.25, 0.25, 0.4166666667], abs=1e-9)


def test_equal_states_score_1_and_shuffled_pairs_score_chance():
    states = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    shuffled = states[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    found = curve(torch.stack([states, shuffled]), states, Analysis(k=10))
    assert found["score"][0] == 1.0
    assert found["chance_low"][1] <= found["score"][1] <= found["chance_high"][1]
    assert found["chance"] == pytest.approx([10 / 199] * 2, abs=2e-3)


def test_the_standard_error_is_that_of_other_prompts():
    """The spread of scores over sets of prompts of their own; half samples give no less, and not much more."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return 0.7 * torch.randn(120, 8, generator=generator)

    common = [torch.randn(120, 8, generator=generator) for _ in range(60)]
    pairs = [(both + noise(), both + noise()) for both in common]
    spread = float(np.std([score(a, b, 10) for a, b in pairs], ddof=1))
    errors = [curve(a[None], b, Analysis(k=10))["standard_error"][0] for a, b in pairs[:6]]
    assert 0.9 * spread < np.mean(errors) < 2 * spread


def test_conditional_entropy():
    t = np.arange(400)
    ids = (t**3 + 3 * t * (t // 5)) % 11
    assert conditional_entropy(ids, 1) == pytest.approx(3.368151418452, abs=1e-9)
    assert conditional_entropy(ids, 2) == pytest.approx(2.119143168010, abs=1e-9)
    assert conditional_entropy(ids, 3) == pytest.approx(0.256039570250, abs=1e-9)
    assert conditional_entropy(ids, 2, whole=True) == pytest.approx(2.122723952934, abs=1e-9)
    assert conditional_entropy(ids, 3, whole=True) == pytest.approx(0.259427800264, abs=1e-9)
    names = ids * 1000 + 7
    assert conditional_entropy(names, 3) == conditional_entropy(ids, 3)


def test_entropies_are_of_equally_many_tokens():
    kinds, ids = np.array([TEXT] * 9), np.arange(9) % 2
    codes = np.stack([np.arange(4), np.zeros(4, int)], 1)
    document = Document("", "understanding", kinds, ids, np.zeros(9, bool), codes)
    again = Document("", "understanding", kinds[:0], ids[:0], np.zeros(0, bool), codes)
    found = entropies([document, again])  # with the same image
    assert found["tokens"] == 4
    assert found["bits"] == {"text": [1, 0, 0], "codes, depth 0": [2, 0, 0], "codes, depth 1": [0, 0, 0]}
    with pytest.raises(DataError, match="0 documents with 0 tokens"):
        entropies([])


def test_gradient_conflict():
    text, multi, *halves = (
        torch.tensor(values, dtype=torch.float64)
        for values in ((1, 0, 2, 1), (0, 1, 2, -1), (1, 1, 2, 0), (1, 0, 2, 0.5))
    )
    found = conflict((text, multi), tuple(halves))
    assert found["baseline"] == pytest.approx(0.890870806375, abs=1e-9)
    assert found["similarity"] == pytest.approx(0.5, abs=1e-9)
    assert found["conflict"] == pytest.approx(0.390870806375, abs=1e-9)
