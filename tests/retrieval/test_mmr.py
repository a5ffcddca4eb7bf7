"""Maximal marginal relevance against its definition, a pick at a time."""

import numpy as np
import pytest

from pinrec_hf.retrieval.mmr import maximal_marginal_relevance


def by_hand(scores, vectors, k, trade_off):
    """One list by the formula, in loops."""
    free = [i for i in range(len(scores)) if scores[i] > -np.inf]
    low, high = min(scores[free]), max(scores[free])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    picked = []
    while free and len(picked) < k:
        value = {}
        for i in free:
            relevance = (scores[i] - low) / (high - low)
            alike = max((unit[i] @ unit[j] for j in picked), default=0.0)
            value[i] = trade_off * relevance - (1 - trade_off) * alike if picked else relevance
        picked.append(max(value, key=value.get))
        free.remove(picked[-1])
    return picked + [-1] * (k - len(picked))


@pytest.mark.parametrize("trade_off", [1.0, 0.7, 0.3, 0.0])
def test_picks_as_by_hand(trade_off):
    rng = np.random.default_rng(0)
    scores, vectors = rng.normal(size=(30, 12)), rng.normal(size=(30, 12, 4))
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0, 3:] = -np.inf  # fewer candidates than places
    scores[0, :3] = [1.0, 2.0, 0.0]
    found = maximal_marginal_relevance(scores, vectors, 6, trade_off)
    assert found.tolist() == [by_hand(s, v, 6, trade_off) for s, v in zip(scores, vectors, strict=True)]


def test_one_is_the_order_of_the_scores_whatever_their_scale():
    scores = np.array([[3e6, -2e6, 1e6]])
    assert maximal_marginal_relevance(scores, np.ones((1, 3, 2)), 3, 1.0).tolist() == [[0, 2, 1]]


def test_a_copy_gives_way_to_something_else():
    vectors = np.array([[[1.0, 0], [1, 0], [0, 1]]])
    scores = np.array([[1.0, 0.9, 0.5]])
    assert maximal_marginal_relevance(scores, vectors, 2, 0.5).tolist() == [[0, 2]]
    assert maximal_marginal_relevance(np.ones((1, 3)), vectors, 2, 0.5).tolist() == [[0, 2]]  # equal scores


def test_no_candidate_is_no_pick():
    assert maximal_marginal_relevance(np.full((1, 2), -np.inf), np.ones((1, 2, 2)), 2, 0.5).tolist() == [[-1, -1]]
    assert maximal_marginal_relevance(np.zeros((1, 0)), np.ones((1, 0, 2)), 2, 0.5).tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("scores", "vectors", "k", "trade_off", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 3, 2)), 1, 0.5, "differ"),
        (np.ones((1, 2)), np.ones((1, 2, 2)), 0, 0.5, "at least 1"),
        (np.ones((1, 2)), np.ones((1, 2, 2)), 1, 1.5, "from 0 to 1"),
        (np.full((1, 2), np.nan), np.ones((1, 2, 2)), 1, 0.5, "NaN"),
    ],
)
def test_refuses(scores, vectors, k, trade_off, message):
    with pytest.raises(ValueError, match=message):
        maximal_marginal_relevance(scores, vectors, k, trade_off)
