"""Slots sum to k; merged lists hold k different items in the order of their sources, every time the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinrec_hf.retrieval.merge import allocate_slots, merge_similar, round_robin

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(any)


@given(WEIGHTS, st.integers(1, 2000))
def test_slots_sum_to_k_and_stay_within_one_of_their_share(weights, k):
    slots = allocate_slots(np.array(weights), k)
    shares = np.array(weights) / np.max(weights)
    quotas = shares / shares.sum() * k
    assert slots.sum() == k
    assert slots.dtype == np.int64
    assert (np.abs(slots - quotas) < 1 + 1e-6).all()
    assert (slots[quotas == 0] == 0).all()


@pytest.mark.parametrize(
    ("weights", "k", "slots"),
    [
        ([0.7, 0.3], 10, [7, 3]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1, 1], 1, [1, 0]),
        ([0, 3], 5, [0, 5]),
        ([0.5, 0.3, 0.2], 4, [2, 1, 1]),
        ([1e-320, 1e-320], 2, [1, 1]),
        ([1e308, 1e308], 2, [1, 1]),
    ],
)
def test_slots_by_hand(weights, k, slots):
    assert allocate_slots(np.array(weights), k).tolist() == slots


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [np.nan, 1], [np.inf, 1], [[1.0]]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="finite shares"):
        allocate_slots(np.array(weights, dtype=float), 3)


def test_bad_k_and_shapes():
    with pytest.raises(ValueError, match="k is 0"):
        allocate_slots(np.ones(2), 0)


@pytest.mark.parametrize("steps", [1, 2, 6, 16])
@pytest.mark.parametrize(("shares", "slots"), [((0.7, 0.3), (7, 3)), ((0.6, 0.3, 0.1), (6, 3, 1))])
def test_outcomes_keep_their_slots_however_many_steps_divide_them(shares, slots, steps):
    outcomes = np.tile(np.arange(len(shares)), steps)
    found = allocate_slots(np.tile(shares, steps) / steps, 10, outcomes)
    assert np.bincount(outcomes, found).tolist() == list(slots)
    for outcome in range(len(shares)):
        own = found[outcomes == outcome]
        assert own.max() - own.min() <= 1
    with pytest.raises(ValueError, match="k is -1"):
        round_robin(np.ones((1, 1), int), np.ones((1, 1)), np.ones(1, int), -1)
    with pytest.raises(ValueError, match="differ"):
        round_robin(np.ones((2, 3), int), np.ones((2, 2)), np.ones(2, int), 1)
    with pytest.raises(ValueError, match="differ"):
        merge_similar(np.ones((2, 3)), np.ones(3), np.ones(2))


def test_merge_similar_by_hand():
    angles = np.radians([0, 10, 90, 20, 95, 30])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [5], [2], [3], [1], [9]])
    one = np.zeros(6)
    kept, weights = merge_similar(embeddings, np.array([1, 2, 4, 8, 16, 32]), one)
    # 10 and 20 degrees join 0 (cosine .98, .94), 95 joins 90; 30 is too far from 0 and stays (.87)
    assert kept.tolist() == [0, 2, 5]
    assert weights.tolist() == [11, 20, 32]
    assert merge_similar(embeddings, np.ones(6), one, threshold=1)[0].tolist() == [0, 1, 2, 3, 4, 5]
    # of two kinds: 20 joins 0, 10 stands alone
    kept, weights = merge_similar(embeddings, np.array([1, 2, 4, 8, 16, 32]), np.array([0, 1, 0, 0, 0, 0]))
    assert kept.tolist() == [0, 1, 2, 5]
    assert weights.tolist() == [9, 2, 20, 32]


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(-0.5, 0.99))
def test_merge_similar_properties(q, d, seed, threshold):
    rng = np.random.default_rng(seed)
    embeddings, weights = rng.normal(size=(q, d)).round(1), rng.random(q)
    kept, merged = merge_similar(embeddings, weights, np.zeros(q), threshold)
    assert np.isclose(merged.sum(), weights.sum())
    assert (np.diff(kept) > 0).all()
    assert q == 0 or kept[0] == 0
    directions = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    cosines = directions @ directions.T
    for query in range(q):
        earlier = kept[kept < query]
        assert (query in kept) == (not len(earlier) or cosines[query, earlier].max() <= threshold)


def test_round_robin_by_hand():
    rows = np.array([[1, 2, 3, 4], [2, 1, 5, 6], [7, 8, -1, -1]])
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    merged, merged_scores, source = round_robin(rows, scores, np.array([2, 2, 1]), 5)
    assert merged.tolist() == [1, 2, 7, 3, 5]  # query 0 would take 2, which is gone: 3
    assert source.tolist() == [0, 1, 2, 0, 1]
    assert merged_scores.tolist() == [0, 4, 8, 2, 6]
    merged, merged_scores, source = round_robin(rows, scores, np.array([0, 0, 6]), 6)
    assert merged.tolist() == [7, 8, 1, 2, 3, 5]  # refilled in turn
    assert source.tolist() == [2, 2, 0, 1, 0, 1]
    merged, merged_scores, source = round_robin(rows, scores, np.array([4, 4, 2]), 10)
    assert merged.tolist()[8:] == [-1, -1]
    assert np.isneginf(merged_scores[8:]).all()
    assert source.tolist()[8:] == [-1, -1]
    assert round_robin(rows[:0], scores[:0], np.zeros(0, int), 2)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.7, 0.3), (0.5, 0.3, 0.2)])
def test_the_first_items_of_a_long_list_divide_as_the_whole_does(shares, steps):
    kinds = np.tile(np.arange(len(shares)), steps)
    rows = np.arange(len(kinds) * 60).reshape(len(kinds), 60)
    slots = allocate_slots(np.array(shares)[kinds], 60, kinds)
    _, _, source = round_robin(rows, np.zeros(rows.shape, np.float32), slots, 60, kinds)
    for k in (5, 10, 20, 50, 60):
        found = np.bincount(kinds[source[:k]], minlength=len(shares))
        assert (abs(found - np.array(shares) * k) < 1).all()


@pytest.mark.parametrize("steps", [1, 6])
def test_what_a_filter_leaves_divides_as_the_whole_would(steps):
    kinds = np.tile([0, 1], steps)
    rows = np.stack([np.random.default_rng(query).permutation(12) for query in range(len(kinds))])
    slots = allocate_slots(np.array([0.7, 0.3])[kinds], 100, kinds)
    _, _, source = round_robin(rows, np.zeros(rows.shape, np.float32), slots, 12, kinds)
    assert np.bincount(kinds[source]).tolist() == [8, 4]


@st.composite
def ranked_lists(draw):
    q, m, k = draw(st.integers(1, 6)), draw(st.integers(1, 15)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = draw(st.integers(m, 120))
    rows = np.stack([rng.permutation(pool)[:m] for _ in range(q)])
    rows[np.arange(m) >= rng.integers(1, m + 1, q)[:, None]] = -1  # lists of unequal length
    scores = np.where(rows < 0, -np.inf, -np.sort(-rng.random((q, m)), axis=1)).astype(np.float32)
    return rows, scores, allocate_slots(rng.random(q) + 0.01, k), k


@settings(max_examples=300, deadline=None)
@given(ranked_lists())
def test_round_robin_properties(case):
    rows, scores, slots, k = case
    merged, merged_scores, source = round_robin(rows, scores, slots, k)
    candidates = set(rows[rows >= 0].tolist())
    kept = merged[merged >= 0]
    assert len(merged) == len(merged_scores) == len(source) == k
    assert len(kept) == len(set(kept.tolist())) == min(k, len(candidates))
    assert (merged[len(kept) :] == -1).all()
    counts = np.bincount(source[: len(kept)], minlength=len(rows))
    for query, ranked in enumerate(rows):
        mine = merged[source == query]
        places = [ranked.tolist().index(row) for row in mine]
        assert places == sorted(places)  # a source's order is kept
        assert (merged_scores[source == query] == scores[query, places]).all()
        # a query falls short of its slots only when all of its list has been taken
        assert counts[query] >= slots[query] or set(ranked[ranked >= 0]) <= set(kept.tolist())
    if all((ranked >= 0).sum() >= k for ranked in rows):
        assert (counts == slots).all()
    again = round_robin(rows, scores, slots, k)
    assert all((a == b).all() for a, b in zip(again, (merged, merged_scores, source), strict=True))
