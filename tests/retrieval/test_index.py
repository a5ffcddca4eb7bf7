"""The index finds what brute force finds, honours every filter, and refuses what it should not serve."""

import fcntl
import os

import faiss
import numpy as np
import pytest

from pinrec_hf.retrieval.index import ItemIndex

KEYS = {"encoder_fingerprint": "e1", "catalogue_fingerprint": "c1"}
KINDS = ["flat", "hnsw", "ivf", "ivfpq"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # a graph built by one thread is the same each time
    yield
    faiss.omp_set_num_threads(threads)


def clustered(n: int, m: int, dimension: int = 16, norms: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, dimension))
    points = centres[rng.integers(0, 40, n + m)] + 0.6 * rng.normal(size=(n + m, dimension))
    points[:n] *= np.exp(norms * rng.normal(size=(n, 1)))
    return points[:n].astype(np.float32), points[n:].astype(np.float32)


def brute_force(items, queries, k, mask=None):
    scores = queries @ items.T
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, 1), best


def overlap(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)])


def test_flat_equals_brute_force():
    items, queries = clustered(2000, 9)
    rows = np.random.default_rng(1).permutation(5000)[:2000]
    scores, found = ItemIndex.build(items, rows=rows, **KEYS).search(queries, 50)
    expected_scores, expected = brute_force(items, queries, 50)
    assert (found == rows[expected]).all()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    assert scores.dtype == np.float32
    assert found.dtype == np.int64


@pytest.mark.parametrize("norms", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_approximate_kinds_recall(kind, norms):
    items, queries = clustered(10_000, 100, norms=norms)
    scores, found = ItemIndex.build(items, kind=kind, **KEYS).search(queries, 100)
    assert overlap(found, brute_force(items, queries, 100)[1]) >= 0.95
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, items[found]), rtol=1e-4, atol=1e-4)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_approximate_kinds_do_not_mind_the_scale_of_queries():
    items, queries = clustered(5000, 20)
    index = ItemIndex.build(items, kind="ivf", **KEYS)
    assert (index.search(queries, 10)[1] == index.search(queries * 1e-3, 10)[1]).all()
    assert (index.search(np.zeros((1, 16)), 10)[1] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.02, 0.001])
def test_filter_goes_into_the_search(kind, share):
    items, queries = clustered(5000, 20)
    allowed = np.random.default_rng(2).random(5000) < share
    scores, found = ItemIndex.build(items, kind=kind, **KEYS).search(queries, 20, allowed=allowed)
    expected = brute_force(items, queries, 20, allowed)[1]
    if allowed.sum() < 20:
        assert ((found >= 0).sum(axis=1) == allowed.sum()).all()
        assert (np.isneginf(scores) == (found < 0)).all()
        found = np.where(found < 0, expected, found)
    assert allowed[found[:, : allowed.sum()]].all()
    assert overlap(found, expected) == 1 if share < 0.1 or kind == "flat" else overlap(found, expected) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_exclusions_leave_exactly_k(kind):
    items, queries = clustered(3000, 6)
    index = ItemIndex.build(items, kind=kind, **KEYS)
    order = brute_force(items, queries, 3000)[1]
    # none, the best five (one twice, one unknown, one none), 2,500 in a row, all but 3, all, one of low rank
    excluded = [
        np.zeros(0),
        np.array([*order[1, :5], order[1, 0], 9999, -1]),
        order[2, :2500],
        order[3, :2997],
        order[4],
        order[5, -1:],
    ]
    scores, found = index.search(queries, 10, excluded_rows=excluded)
    assert (found >= 0).sum(axis=1).tolist() == [10, 10, 10, 3, 0, 10]
    for row, without in zip(found, excluded, strict=True):
        kept = row[row >= 0]
        assert len(set(kept.tolist())) == len(kept)
        assert not np.isin(kept, without).any()
    assert found[2].tolist() == order[2, 2500:2510].tolist()
    assert found[3, :3].tolist() == order[3, 2997:].tolist()
    if kind == "flat":
        assert found[1].tolist() == order[1, 5:15].tolist()
    assert np.isneginf(scores[4]).all()


def test_exclusions_and_filter_together():
    items, queries = clustered(1000, 2)
    allowed = np.arange(1000) % 2 == 0
    order = brute_force(items, queries, 500, allowed)[1]
    found = ItemIndex.build(items, **KEYS).search(
        queries, 30, allowed=allowed, excluded_rows=[order[0, :7], np.array([1, 3, 5])]
    )[1]
    assert found.tolist() == [order[0, 7:37].tolist(), order[1, :30].tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_k_above_the_live_items_returns_all_padded(kind):
    items, queries = clustered(60, 3)
    index = ItemIndex.build(items, kind=kind, **KEYS)
    index.remove(np.array([4]))
    scores, found = index.search(queries, 100)
    assert found.shape == scores.shape == (3, 100)
    assert sorted(found[0, :59]) == [row for row in range(60) if row != 4]
    assert (found[:, 59:] == -1).all()
    assert np.isneginf(scores[:, 59:]).all()


def test_one_item_catalogue_and_no_queries():
    index = ItemIndex.build(np.ones((1, 3)), **KEYS)
    assert index.search(np.ones((1, 3)), 2)[1].tolist() == [[0, -1]]
    assert index.search(np.zeros((0, 3)), 2)[1].shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_add_and_remove(kind, tmp_path):
    items, queries = clustered(2000, 10)
    index = ItemIndex.build(items[:1500], kind=kind, **KEYS)
    index.add(items[1500:], np.arange(1500, 2000), catalogue_fingerprint="c2")
    gone = np.unique(brute_force(items, queries, 3)[1])
    index.remove(gone)
    index.save(tmp_path)
    loaded = ItemIndex.load(tmp_path, encoder_fingerprint="e1", catalogue_fingerprint="c2")
    mask = ~np.isin(np.arange(2000), gone)
    for some in (index, loaded):
        assert len(some) == 2000 - len(gone)
        found = some.search(queries, 20)[1]
        assert overlap(found, brute_force(items, queries, 20, mask)[1]) >= 0.95
        assert not np.isin(found, gone).any()
    assert (loaded.search(queries, 20)[1] == index.search(queries, 20)[1]).all()
    loaded.add(items[gone[:1]], gone[:1])  # a removed item comes back
    assert gone[0] in loaded.search(items[gone[:1]], 5)[1]
    loaded.remove(gone[:1])
    with pytest.raises(ValueError, match=f"row {gone[0]} is not in the index"):
        loaded.remove(gone[:1])
    with pytest.raises(ValueError, match="row 1999 is in the index already"):
        loaded.add(items[1999:], np.array([1999]))
    with pytest.raises(ValueError, match="width 3, this index 16"):
        loaded.add(np.ones((1, 3)), np.array([5000]))


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_round_trip_over_an_old_index(kind, tmp_path):
    items, queries = clustered(1000, 5)
    ItemIndex.build(items[:10], encoder_fingerprint="e0", catalogue_fingerprint="c1").save(tmp_path)
    index = ItemIndex.build(items, kind=kind, **KEYS)
    index.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["index.faiss", "index.json", "index.safetensors"]
    loaded = ItemIndex.load(tmp_path, **KEYS)
    assert (loaded.kind, loaded.dimension, len(loaded)) == (kind, 16, 1000)
    for a, b in zip(index.search(queries, 7), loaded.search(queries, 7), strict=True):
        assert (a == b).all()


def test_another_encoders_or_catalogues_index_is_refused(tmp_path):
    ItemIndex.build(np.eye(3), **KEYS).save(tmp_path)
    with pytest.raises(ValueError, match=r"made by another encoder \(e1, not e2\).*pinrec index --model"):
        ItemIndex.load(tmp_path, encoder_fingerprint="e2", catalogue_fingerprint="c1")
    with pytest.raises(ValueError, match=r"made by another catalogue \(c1, not c2\)"):
        ItemIndex.load(tmp_path, encoder_fingerprint="e1", catalogue_fingerprint="c2")


@pytest.mark.parametrize("name", ["index.faiss", "index.safetensors", "index.json"])
def test_truncated_missing_and_foreign_files_are_refused(name, tmp_path):
    ItemIndex.build(np.eye(30), kind="hnsw", **KEYS).save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{name} is .*truncated"):
            ItemIndex.load(tmp_path, **KEYS)
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=r"truncated|no faiss index"):
        ItemIndex.load(tmp_path, **KEYS)
    path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"missing|no complete index"):
        ItemIndex.load(tmp_path, **KEYS)


def test_a_failed_save_is_no_index_and_leaves_nothing(tmp_path, monkeypatch):
    index = ItemIndex.build(np.eye(3), **KEYS)
    index.save(tmp_path)
    replace = os.replace

    def killed(source, target):
        if "safetensors" in target:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["index.faiss", "index.safetensors"]
    with pytest.raises(FileNotFoundError, match="no complete index"):
        ItemIndex.load(tmp_path, **KEYS)


def test_two_runs_in_one_folder(tmp_path):
    index = ItemIndex.build(np.eye(3), **KEYS)
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another run is writing"):
        index.save(tmp_path)
    os.close(lock)
    index.save(tmp_path)


def test_bad_input():
    with pytest.raises(ValueError, match="n at least 1"):
        ItemIndex.build(np.zeros((0, 3)), **KEYS)
    with pytest.raises(ValueError, match="embedding of row 1 holds NaN"):
        ItemIndex.build(np.array([[1.0], [np.nan]]), **KEYS)
    for rows in ([1, 1], [0, -1]):
        with pytest.raises(ValueError, match="each once"):
            ItemIndex.build(np.ones((2, 3)), rows=np.array(rows), **KEYS)
    with pytest.raises(ValueError, match="unknown index kind 'tree'; known are 'flat', 'hnsw', 'ivf', 'ivfpq'"):
        ItemIndex.build(np.eye(3), kind="tree", **KEYS)
    index = ItemIndex.build(np.eye(3), **KEYS)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k is {k}; ask for at least 1"):
            index.search(np.eye(3), k)
    with pytest.raises(ValueError, match=r"shape \(2, 4\); this index takes \(n, 3\)"):
        index.search(np.ones((2, 4)), 1)
    with pytest.raises(ValueError, match="query 1 holds NaN"):
        index.search(np.array([[1, 1, 1], [np.inf, 1, 1]]), 1)
    for allowed in (np.ones(2, dtype=bool), np.ones(3)):
        with pytest.raises(ValueError, match="one bool a catalogue row, at least 3"):
            index.search(np.eye(3), 1, allowed=allowed)
    with pytest.raises(ValueError, match="1 lists of excluded rows for 3 queries"):
        index.search(np.eye(3), 1, excluded_rows=[np.array([1])])
