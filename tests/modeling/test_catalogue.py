"""The catalogue finds every id, refuses every bad one, and opens a million items without reading them."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pinrec_hf.modeling import catalogue_pinrec
from pinrec_hf.modeling.catalogue_pinrec import ALWAYS, Catalogue, stable_hash

IDS = ["plain", "with space", 'quo"te', "new\nline", "emoji 🛋️", "", "日本"]


@pytest.fixture
def catalogue() -> Catalogue:
    rng = np.random.default_rng(0)
    return Catalogue.build(
        IDS,
        vectors=rng.normal(size=(7, 3)).astype(np.float32),
        features=[["a=1", "b=2"], [], None, ["a=1"], ["c", "d", "e"], [], ["b=2"]],
        available_from=[0, None, 5, 5, 5, 5, 5],
    )


def test_stable_hash_is_pinned():
    # These values are in released models: they may never change.
    assert stable_hash(["a", ""]).tolist() == [3405396810240292928, -5426141060434712860]
    assert stable_hash([1, -1]).tolist() == [-214719569263328205, 3246705950370657501]
    assert stable_hash(np.array([1, -1], np.int32)).tolist() == stable_hash([1, -1]).tolist()
    assert stable_hash([]).shape == (0,)


def test_lookups(catalogue, tmp_path):
    catalogue.save(tmp_path / "catalogue.safetensors")
    for c in (catalogue, Catalogue.open(tmp_path / "catalogue.safetensors")):
        assert len(c) == 7
        assert (c.id_type, c.content_size) == ("string", 3)
        assert c.rows(["日本", "no", None, "", "plain"]).tolist() == [6, -1, -1, 5, 0]
        assert c.rows([]).shape == (0,)
        assert c.rows([None]).tolist() == [-1]
        assert c.ids([6, 3, 5]) == ["日本", "new\nline", ""]
        assert c.hashes([0, 6]).tolist() == stable_hash(["plain", "日本"]).tolist()
        assert c.vectors(np.array([[0, 1], [2, 3]])).shape == (2, 2, 3)
        a, b = stable_hash(["a=1", "b=2"])
        assert c.features([1, 0, 3]).tolist() == [[0, 0], [a, b], [a, 0]]
        assert c.features([1, 2]).shape == (2, 0)
        assert c.features(np.array([[0], [4]])).shape == (2, 1, 3)
        assert c.availability([0, 1]).tolist() == [[0, ALWAYS[1]], list(ALWAYS)]
        assert c.fingerprint == catalogue.fingerprint


def test_integer_ids_and_arrow_columns(tmp_path):
    c = Catalogue.build(pa.array([7, -3, 2**40]), features=pa.array([["x"], None, []]))
    c.save(tmp_path / "c")
    c = Catalogue.open(tmp_path / "c")
    assert c.id_type == "integer"
    assert c.rows([2**40, 8, None, -3]).tolist() == [2, -1, -1, 1]
    assert c.rows(np.array([7, 9])).tolist() == [0, -1]
    assert c.ids([1, 0]) == [-3, 7]
    assert c.hashes([0]) == stable_hash([7])
    assert c.vectors([0, 1]).shape == (2, 0)
    assert c.availability([2]).tolist() == [list(ALWAYS)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.lists(st.text(max_size=8), min_size=1, max_size=40, unique=True),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40, unique=True),
    ),
    st.integers(0, 40),
    st.booleans(),
)
def test_ids_round_trip_through_append_and_file(tmp_path, ids, cut, collide):
    with pytest.MonkeyPatch.context() as patch:
        if collide:  # hashes of four values only: verified bytes must still tell the ids apart
            patch.setattr(catalogue_pinrec, "hash_bytes", lambda encoded: np.array([len(b) % 4 for b in encoded]))
        known, rest = ids[:cut] or ids[:1], ids[max(cut, 1) :]
        first = Catalogue.build(known)
        whole = first.append(rest)
        whole.save(tmp_path / "c")
        opened = Catalogue.open(tmp_path / "c")
        assert opened.rows(ids).tolist() == list(range(len(ids)))
        assert opened.ids(np.arange(len(ids))) == ids
        assert first.rows(ids).tolist() == [row if row < len(known) else -1 for row in range(len(ids))]
        if not collide:
            assert opened.fingerprint == Catalogue.build(ids).fingerprint


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 2)])
def test_arrow_vectors(kind):
    column = pa.array([[1, 2], [3, 4], [5, 6]], kind)
    for vectors in (
        column,
        pa.chunked_array([column[:1], column[1:]]),
        column.to_numpy(zero_copy_only=False),
    ):
        c = Catalogue.build(["a", "b", "c"], vectors=vectors)
        assert c.vectors([2, 1]).tolist() == [[5, 6], [3, 4]]
    with pytest.raises(ValueError, match="row 1: a vector of width 0, row 0 has 2"):
        Catalogue.build(["a", "b"], vectors=pa.array([[1, 2], None], kind))


def test_append_keeps_rows_and_fills_what_either_side_lacks(catalogue):
    grown = catalogue.append(["new", "er"], vectors=np.ones((2, 3)), available_until=[None, 9])
    assert grown.ids(np.arange(9)) == [*IDS, "new", "er"]
    old = np.arange(7)
    assert (grown.vectors(old) == catalogue.vectors(old)).all()
    assert (grown.features(old) == catalogue.features(old)).all()
    assert grown.features([7, 8]).shape == (2, 0)
    assert grown.availability([0, 7, 8]).tolist() == [[0, ALWAYS[1]], list(ALWAYS), [ALWAYS[0], 9]]
    assert grown.fingerprint != catalogue.fingerprint
    featured = Catalogue.build(["a"]).append(["b"], features=[["f"]])
    assert featured.features([0, 1]).tolist() == [[0], stable_hash(["f"]).tolist()]
    with pytest.raises(ValueError, match=r"row 1: id 'plain' is already in the catalogue"):
        catalogue.append(["x", "plain"], vectors=np.ones((2, 3)))
    with pytest.raises(ValueError, match="width 2, the catalogue of width 3"):
        catalogue.append(["x"], vectors=np.ones((1, 2)))
    with pytest.raises(ValueError, match="string ids"):
        catalogue.append([1], vectors=np.ones((1, 3)))


def test_fingerprint_sees_ids_vectors_and_features_alone():
    base = Catalogue.build(["a", "b"], vectors=np.ones((2, 2)), features=[["x"], []])
    same = Catalogue.build(["a", "b"], vectors=np.ones((2, 2)), features=[["x"], []], available_from=[1, 2])
    assert same.fingerprint == base.fingerprint
    others = [
        Catalogue.build(["a", "c"], vectors=np.ones((2, 2)), features=[["x"], []]),
        Catalogue.build(["ab", ""], vectors=np.ones((2, 2)), features=[["x"], []]),
        Catalogue.build(["a", "b"], vectors=np.ones((2, 2)) * 2, features=[["x"], []]),
        Catalogue.build(["a", "b"], vectors=np.ones((2, 2)), features=[[], ["x"]]),
    ]
    assert len({base.fingerprint, *(c.fingerprint for c in others)}) == 5


@pytest.mark.parametrize(
    ("ids", "columns", "message"),
    [
        ([], {}, "at least one item"),
        (["a", "b", "a"], {}, "row 2: id 'a' is row 0's too"),
        ([3, 3], {}, "row 1: id 3 is row 0's too"),
        (["a", None], {}, "row 1: a null id"),
        ([1, None], {}, "row 1: a null id"),
        ([float("nan")], {}, "row 0: a null id"),
        (["a", 1], {}, "row 1: id 1 is int"),
        ([1, "a"], {}, "row 1: id 'a' is str"),
        ([1, True], {}, "row 1: id True is bool"),
        ([1.5], {}, "row 0: id 1.5 is float"),
        ([2**63], {}, "does not fit 64 bits"),
        (np.array([2**63], np.uint64), {}, "does not fit 64 bits"),
        (["a", "b"], {"vectors": [[1.0, 2.0], [1.0, np.nan]]}, "row 1: a NaN or infinite vector"),
        (["a", "b"], {"vectors": [[1.0, np.inf], [1.0, 2.0]]}, "row 0: a NaN or infinite vector"),
        (["a"], {"vectors": np.array([[1e300]])}, "row 0: a NaN or infinite vector"),
        (["a", "b"], {"vectors": [[1.0, 2.0], [0.0, 0.0]]}, "row 1: a vector of zeros"),
        (["a", "b"], {"vectors": [[1.0, 2.0], [1.0]]}, "row 1: a vector of width 1, row 0 has 2"),
        (["a", "b"], {"vectors": [[1.0, 2.0], None]}, "row 1: a vector of width 0"),
        (["a"], {"vectors": [["x"]]}, "not numbers"),
        (["a", "b"], {"vectors": [[1.0]]}, r"shape \(1, 1\); expected \(2, width\)"),
        (["a", "b"], {"features": [["x"], "tag=1"]}, "row 1: features 'tag=1' are no list of strings"),
        (["a"], {"features": [[1]]}, "row 0: features"),
        (["a"], {"features": [1]}, "row 0: features 1 are no list"),
        (["a"], {"features": []}, "0 feature lists for 1 items"),
        (["a", "b"], {"available_from": [1, float("nan")]}, "row 1: available_from nan is no whole number"),
        (["a"], {"available_until": [1, 2]}, "available_until has 2 times for 1 items"),
    ],
)
def test_bad_input_names_row_and_remedy(ids, columns, message):
    with pytest.raises(ValueError, match=message):
        Catalogue.build(ids, **columns)


def test_bad_lookups(catalogue):
    with pytest.raises(ValueError, match="has string ids, but id 3 was asked for; convert the ids to str"):
        catalogue.rows([3])
    with pytest.raises(ValueError, match="has integer ids, but id '3' was asked"):
        Catalogue.build([3]).rows(["3"])
    for bad in (-1, 7):
        with pytest.raises(ValueError, match=f"row {bad} is not in this catalogue of 7 items"):
            catalogue.vectors([0, bad])


def test_pickle_and_copy(catalogue, tmp_path):
    clone = pickle.loads(pickle.dumps(catalogue))
    assert clone.rows(IDS).tolist() == list(range(7))
    path = tmp_path / "c"
    catalogue.save(path)
    opened = Catalogue.open(path)
    data = pickle.dumps(opened)
    assert len(data) < 1000
    assert pickle.loads(data).ids([4]) == copy.deepcopy(opened).ids([4]) == [IDS[4]]
    Catalogue.build(["other"]).save(path)
    assert opened.ids([4]) == [IDS[4]]  # the old file stays mapped
    with pytest.raises(ValueError, match="another catalogue than when it was opened"):
        pickle.loads(data)


def test_damaged_and_foreign_files_are_refused(catalogue, tmp_path):
    path = tmp_path / "c"
    catalogue.save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            Catalogue.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="its header says"):
        Catalogue.open(path)
    path.write_bytes(b"PAR1" * 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        Catalogue.open(path)
    save_file({"weight": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no PinRec catalogue: its format is 'pt'"):
        Catalogue.open(path)
    save_file({"hashes": np.ones(3, np.int64)}, path, metadata={"format": catalogue_pinrec.FORMAT})
    with pytest.raises(ValueError, match="do not belong together"):
        Catalogue.open(path)
    with pytest.raises(FileNotFoundError):
        Catalogue.open(tmp_path / "missing")


def test_failed_save_leaves_nothing(catalogue, tmp_path, monkeypatch):
    path = tmp_path / "c"
    catalogue.save(path)

    def full_disk(arrays, name, metadata):
        open(name, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalogue_pinrec, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        Catalogue.build(["other"]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
    assert len(Catalogue.open(path)) == 7


MEASURE = """
import re, sys, time
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
def private():
    return sum(map(int, re.findall(r"^Private_\\w+: +(\\d+)", open("/proc/self/smaps_rollup").read(), re.M)))
before, start = private(), time.process_time()
catalogue = Catalogue.open(sys.argv[1])
seconds = time.process_time() - start
catalogue.vectors(catalogue.rows(["item 7", "item 999999"]))
print(seconds, private() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps_rollup")
def test_a_million_items_open_at_once(tmp_path):
    path = tmp_path / "c"
    vectors = np.random.default_rng(0).random((10**6, 64), dtype=np.float32)
    Catalogue.build([f"item {i}" for i in range(10**6)], vectors=vectors).save(path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kib = map(float, result.stdout.split())
    assert seconds < 0.1
    assert kib < 50 * 1024
