"""Milvus (milvus-lite, in a file) gives faiss's answers."""

import json

import numpy as np
import pytest

from pinrec_hf.retrieval.index import ItemIndex

pytestmark = pytest.mark.scale
pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
pytest.importorskip("milvus_lite", reason="the extra `milvus` is not installed")

KEYS = {"encoder_fingerprint": "e1", "catalogue_fingerprint": "c1"}
SIZE = 2_000


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(SIZE, 16)) * np.exp(0.3 * rng.normal(size=(SIZE, 1)))).astype(np.float32)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).normal(size=(10, 16)).astype(np.float32)


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "milvus.db")


def agreement(index, exact, queries, **search):
    found, expected = (some.search(queries, 50, **search)[1] for some in (index, exact))
    return np.mean([np.isin(a[a >= 0], b).mean() for a, b in zip(expected, found, strict=True)]), found


def test_milvus_gives_faiss_answers(items, queries, uri, tmp_path):
    exact = ItemIndex.build(items, kind="flat", **KEYS)
    ItemIndex.build(items, milvus=uri, **KEYS).save(tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    assert about["kind"] == "milvus"
    assert list(about["bytes"]) == ["index.safetensors"]
    loaded = ItemIndex.load(tmp_path / "index", **KEYS)
    assert agreement(loaded, exact, queries)[0] >= 0.99
    excluded = [exact.search(queries[[i]], 30)[1][0] for i in range(len(queries))]
    share, found = agreement(loaded, exact, queries, excluded_rows=excluded)
    assert share >= 0.99
    assert not any(np.isin(a, b).any() for a, b in zip(found, excluded, strict=True))
    for passes in (0.5, 0.3, 0.1, 0.01):
        allowed = np.random.default_rng(2).random(SIZE) < passes
        share, found = agreement(loaded, exact, queries, allowed=allowed)
        assert share >= 0.99
        assert allowed[found[found >= 0]].all()
    np.testing.assert_allclose(loaded.search(queries, 1)[0], exact.search(queries, 1)[0], rtol=1e-5)


def test_items_come_and_go(items, queries, uri):
    exact, index = ItemIndex.build(items[:1_500], **KEYS), ItemIndex.build(items[:1_500], milvus=uri, **KEYS)
    longer = items[1_500:].copy()
    longer[:20] *= 4
    gone = exact.search(queries, 3)[1].ravel()
    for some in (exact, index):
        some.add(longer, np.arange(1_500, SIZE))
        some.remove(np.unique(gone))
    share, found = agreement(index, exact, queries)
    assert share >= 0.99
    assert not np.isin(found, gone).any()
    assert (found >= 1_500).any()


def test_a_collection_that_is_gone_is_an_error(items, uri, tmp_path):
    index = ItemIndex.build(items[:100], milvus=uri, **KEYS)
    index.save(tmp_path / "index")
    index.neighbours._client.drop_collection(index.neighbours.collection)
    with pytest.raises(ValueError, match=r"has no collection pinrec_\w+; index again"):
        ItemIndex.load(tmp_path / "index", **KEYS)
