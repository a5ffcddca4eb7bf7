"""Kinds by size and memory, what searches further under a filter, items longer than the sphere, old files."""

import json

import faiss
import numpy as np
import pytest
from safetensors.numpy import save_file

from pinrec_hf.retrieval import faiss_index
from pinrec_hf.retrieval.faiss_index import FaissIndex, choose_kind, item_bytes
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.passing import Passing
from pinrec_hf.retrieval.vectors import ItemVectors

KEYS = {"encoder_fingerprint": "e1", "catalogue_fingerprint": "c1"}
APPROXIMATE = ["hnsw", "ivf", "ivfpq"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 32))[rng.integers(0, 50, 5_000)] + 0.6 * rng.normal(size=(5_000, 32))
    return (points * np.exp(0.2 * rng.normal(size=(5_000, 1)))).astype(np.float32)


@pytest.fixture(scope="module")
def queries(items):
    return items[::100] + np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32) * 0.6


@pytest.fixture(scope="module", params=APPROXIMATE)
def built(request, items):
    return FaissIndex.build(ItemVectors(items), request.param)


def recall(found, items, queries, k, places=None):
    places = np.arange(len(items)) if places is None else places
    best = places[np.argsort(-queries @ items[places].T, axis=1)[:, :k]]
    return np.mean([np.isin(b, f).mean() for b, f in zip(best, found, strict=True)])


def test_kind_by_size_and_memory():
    assert [choose_kind(n, 64, 8) for n in (100_000, 100_001, 10_000_000)] == ["flat", "ivf", "ivf"]
    assert [choose_kind(10_000_000, 64, gib) for gib in (1, 0.5)] == ["ivf", "ivfpq"]
    assert choose_kind(1_000_000, 64, 0.1) == "ivf"
    assert choose_kind(50_000, 64, 0.01) == "ivf"
    with pytest.raises(ValueError, match=r"10,000,000 items need 0.39 GiB, memory_gib is 0.1; raise it"):
        choose_kind(10_000_000, 64, 0.1)


@pytest.mark.parametrize("kind", faiss_index.KINDS)
def test_bytes_of_an_item_are_those_of_the_file(kind, items, tmp_path):
    FaissIndex.build(ItemVectors(items), kind).write(str(tmp_path / "index"))
    most = item_bytes(kind, 32) * len(items) + (0 if kind == "flat" else 100_000)  # lists' centres
    assert 0.6 * most - 1_000_000 < (tmp_path / "index").stat().st_size <= most


@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
def test_filters_inside_the_search_keep_recall(built, share, items, queries):
    mask = np.random.default_rng(2).random(len(items)) < share
    passing = Passing(mask)
    k = min(100, passing.count)
    found = built.search(queries, k, passing)
    assert mask[found[found >= 0]].all()
    assert recall(found, items, queries, k, passing.places) >= 0.95


def test_a_larger_setting_finds_more(built, items, queries):
    settings = built.settings()
    assert settings == sorted(set(settings))
    found = []
    usual = built.setting
    for built.setting in (settings[0], settings[-1]):
        found.append(recall(built.search(queries, 100, None), items, queries, 100))
    built.setting = usual
    assert found[0] < found[1]
    assert found[1] >= 0.98


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_longer_items_added_later_are_found(kind, items, queries, tmp_path):
    index = ItemIndex.build(items[:4_000], kind=kind, **KEYS)
    longer = items.copy()
    longer[4_000:4_050] *= 3
    index.add(longer[4_000:], np.arange(4_000, 5_000))
    index.save(tmp_path)
    for some in (index, ItemIndex.load(tmp_path, **KEYS)):
        assert recall(some.search(queries, 100)[1], longer, queries, 100) >= 0.95
        without = np.arange(5_000) % 2 == 1
        found = some.search(queries, 100, allowed=without)[1]
        assert without[found].all()
        assert recall(found, longer, queries, 100, np.flatnonzero(without)) >= 0.95


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_removal_keeps_recall_without_a_rebuild(kind, items, queries):
    index = ItemIndex.build(items, kind=kind, **KEYS)
    gone = np.random.default_rng(3).permutation(len(items))[:1_500]
    index.remove(gone)
    found = index.search(queries, 100)[1]
    assert not np.isin(found, gone).any()
    assert recall(found, items, queries, 100, np.setdiff1d(np.arange(len(items)), gone)) >= 0.95


def test_the_vectors_stay_on_disk(items, tmp_path):
    np.save(tmp_path / "items.npy", items)
    index = ItemIndex.build(np.load(tmp_path / "items.npy", mmap_mode="r"), kind="ivf", **KEYS)
    assert not index.catalogue_embeddings().flags.writeable  # a copy would be
    index.save(tmp_path)
    loaded = ItemIndex.load(tmp_path, **KEYS)
    first = loaded.catalogue_embeddings()
    loaded.add(items[:10], np.arange(5_000, 5_010))
    assert not first.flags.writeable
    assert (loaded.catalogue_embeddings() == np.concatenate([items, items[:10]])).all()


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_of_the_first_format_is_read(kind, items, queries, tmp_path):
    some = items[:2_000]
    radius = float(np.linalg.norm(some, axis=1).max())
    lifted = np.column_stack([some, np.sqrt(np.maximum(radius**2 - np.square(some).sum(axis=1), 0))])
    factory = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF20,Flat"}[kind]
    old = some if kind == "flat" else lifted
    index = faiss.index_factory(
        old.shape[1], factory, faiss.METRIC_INNER_PRODUCT if kind == "flat" else faiss.METRIC_L2
    )
    index.train(old)
    index.add(old)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    arrays = {"vectors": some, "rows": np.arange(2_000), "removed": np.zeros(2_000, np.uint8)}
    save_file(arrays, tmp_path / "index.safetensors")
    about = {"format": 1, "kind": kind, "dimension": 32, "num_vectors": 2_000, "num_items": 2_000, "radius": radius}
    sizes = {name: (tmp_path / name).stat().st_size for name in ("index.faiss", "index.safetensors")}
    (tmp_path / "index.json").write_text(json.dumps({**about, **KEYS, "bytes": sizes}))
    loaded = ItemIndex.load(tmp_path, **KEYS)
    assert recall(loaded.search(queries, 100)[1], some, queries, 100) >= 0.95
    (tmp_path / "index.json").write_text(json.dumps({**about, **KEYS, "bytes": sizes, "format": 3}))
    with pytest.raises(ValueError, match="newer format; index again"):
        ItemIndex.load(tmp_path, **KEYS)
