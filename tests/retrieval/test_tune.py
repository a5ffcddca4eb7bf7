"""Tuning measures what the index finds, and keeps the smallest setting that finds enough."""

import json

import numpy as np
import pytest

from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.tune import measure_frontier, real_queries, tune, write_frontier

KEYS = {"encoder_fingerprint": "e1", "catalogue_fingerprint": "c1"}


@pytest.fixture(scope="module")
def items():
    return np.random.default_rng(0).normal(size=(4_000, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).normal(size=(20, 16)).astype(np.float32)


def test_the_smallest_setting_that_reaches_the_recall_is_saved(items, queries, tmp_path):
    index = ItemIndex.build(items, kind="ivf", **KEYS)
    chosen, frontier = tune(index, queries, 0.8)
    settings, recalls = ([point[name] for point in frontier] for name in ("setting", "recall"))
    assert settings == sorted(settings)
    assert recalls[0] < 0.8 <= chosen["recall"]
    assert recalls[-1] >= 0.999
    assert chosen == next(point for point in frontier if min(point["recall"], point["recall_of_half"]) >= 0.8)
    index.save(tmp_path)
    loaded = ItemIndex.load(tmp_path, **KEYS)
    assert loaded.neighbours.setting == chosen["setting"]
    best = np.argsort(-queries @ items.T, axis=1)[:, :100]
    found = loaded.search(queries, 100)[1]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]) == pytest.approx(chosen["recall"])
    write_frontier(tmp_path, "ivf", chosen, frontier)
    assert json.loads((tmp_path / "index_frontier.json").read_text())["chosen"] == chosen
    assert (tmp_path / "index_frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_what_was_tuned_keeps_its_recall_under_filters(kind):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((120, 32), dtype=np.float32)

    def draw(n):
        return centres[rng.integers(120, size=n)] + 0.5 * rng.standard_normal((n, 32), dtype=np.float32)

    items, tuning, queries = draw(12_000), draw(100), draw(50)
    index = ItemIndex.build(items, kind=kind, **KEYS)
    chosen, _ = tune(index, tuning, 0.95)
    assert min(chosen["recall"], chosen["recall_of_half"]) >= 0.95
    for share in (0.8, 0.5, 0.2):
        allowed = rng.random(len(items)) < share
        best = np.argsort(-(queries @ items.T - 1e9 * ~allowed), axis=1)[:, :100]
        found = index.search(queries, 100, allowed=allowed)[1]
        assert np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]) >= 0.93


def test_measuring_changes_nothing_and_flat_is_exact(items, queries):
    index = ItemIndex.build(items, kind="ivf", rows=np.arange(4_000) * 2, **KEYS)
    before = index.neighbours.setting
    assert measure_frontier(index, queries)[-1]["recall"] >= 0.999
    assert index.neighbours.setting == before
    (point,) = measure_frontier(ItemIndex.build(items, **KEYS), queries)
    assert (point["recall"], point["recall_of_half"]) == (1, 1)
    with pytest.raises(ValueError, match="recall is 95"):
        tune(index, queries, 95)


def test_queries_are_the_models_of_validation_users(model, tokenizer, tiny_data):
    queries = real_queries(model, tokenizer, tiny_data)
    assert len(queries) > 1
    assert np.isfinite(queries).all()
    assert len(np.unique(queries, axis=0)) > 1
