"""Metrics against ranx, against brute force, and their documented examples."""

import doctest
from itertools import combinations

import numpy as np
import pytest

from pinrec_hf.evaluation import bootstrap, evaluate, metrics


@pytest.mark.parametrize("module", [metrics, bootstrap, evaluate])
def test_documented_examples_hold(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@pytest.fixture(scope="module")
def example():
    """300 requests over 200 items with 1-6 targets each, lists of 50 with some left short."""
    rng = np.random.default_rng(7)
    ranked = np.stack([rng.permutation(200)[:50] for _ in range(300)])
    ranked[:20, 30:] = -1
    counts = rng.integers(1, 7, size=300)
    request_index = np.repeat(np.arange(300), counts)
    item_row = np.concatenate([rng.choice(200, size=n, replace=False) for n in counts])
    return ranked, request_index, item_row


@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_agree_with_ranx(example, k):
    ranx = pytest.importorskip("ranx")
    ranked, request_index, item_row = example
    qrels, run = {}, {}
    for request, row in zip(request_index, item_row, strict=True):
        qrels.setdefault(f"{request:04d}", {})[f"d{row}"] = 1
    for request, rows in enumerate(ranked):
        run[f"{request:04d}"] = {f"d{row}": float(99 - place) for place, row in enumerate(rows) if row >= 0}
    names = [f"recall@{k}", f"ndcg@{k}", f"mrr@{k}"]
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names, return_mean=False)
    theirs = {name: np.asarray(values) for name, values in theirs.items()}  # one value a request, by name

    ranks = metrics.target_ranks(ranked, request_index, item_row)
    counts = np.bincount(request_index)
    # ranx averages over requests what we average over targets
    assert metrics.recall_at_k(ranks, k) == pytest.approx(
        (theirs[f"recall@{k}"] * counts).sum() / counts.sum(), abs=1e-9
    )
    np.testing.assert_allclose(metrics.ndcg_at_k(ranks, request_index, k, 300), theirs[f"ndcg@{k}"], atol=1e-9)
    np.testing.assert_allclose(metrics.mrr_at_k(ranks, request_index, k, 300), theirs[f"mrr@{k}"], atol=1e-9)


def test_recall_equals_ranx_with_one_target_a_request(example):
    ranx = pytest.importorskip("ranx")
    ranked, request_index, item_row = example
    first = np.unique(request_index, return_index=True)[1]
    qrels = {f"{request:04d}": {f"d{item_row[i]}": 1} for request, i in enumerate(first)}
    run = {
        f"{request:04d}": {f"d{row}": float(99 - place) for place, row in enumerate(rows) if row >= 0}
        for request, rows in enumerate(ranked)
    }
    ranks = metrics.target_ranks(ranked, np.arange(300), item_row[first])
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), "recall@10")
    assert metrics.recall_at_k(ranks, 10) == pytest.approx(theirs, abs=1e-9)


def test_unordered_recall_is_the_best_embedding(example):
    ranked, request_index, item_row = example
    each = ranked[:, :40].reshape(300, 2, 20)
    hit = [
        any(item in each[request, e, :7] for e in range(2))
        for request, item in zip(request_index, item_row, strict=True)
    ]
    assert metrics.unordered_recall_at_k(each, request_index, item_row, 7) == pytest.approx(np.mean(hit))


def test_lists_described_as_by_brute_force(example):
    ranked = example[0][:, :8].copy()
    ranked[0, 1:] = -1
    ranked[1] = -1
    rng = np.random.default_rng(3)
    vectors, categories = rng.normal(size=(200, 5)), rng.integers(0, 4, size=200)
    vectors[7] = 0
    head = metrics.head_items(rng.integers(0, 30, size=200))
    diversity = metrics.intra_list_diversity(ranked, vectors)
    entropy = metrics.category_entropy(ranked, categories)
    tail = metrics.tail_share(ranked, head)
    assert np.isnan(diversity[[0, 1]]).all()
    assert np.isnan([entropy[1], tail[1]]).all()
    assert entropy[0] == 0

    def cosine(a, b):
        length = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
        return vectors[a] @ vectors[b] / length if length else 0

    for request in range(2, 40):
        rows = ranked[request]
        pairs = [cosine(a, b) for a, b in combinations(rows, 2)]
        assert diversity[request] == pytest.approx(1 - np.mean(pairs))
        share = np.bincount(categories[rows]) / 8
        assert entropy[request] == pytest.approx(-sum(p * np.log2(p) for p in share if p))
        assert tail[request] == np.mean([not head[row] for row in rows])


def test_head_is_the_smallest_set_with_80_percent():
    counts = np.array([50, 20, 10, 10, 5, 5])
    assert metrics.head_items(counts).tolist() == [True, True, True, False, False, False]
    assert not metrics.head_items(np.zeros(3, dtype=int)).any()
