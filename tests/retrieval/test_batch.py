"""`retrieve` and `export`: every user once, the same as `recommend` says, and again where a killed run stopped."""

import datetime
import fcntl
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf import PinRecRetriever
from pinrec_hf.retrieval import batch
from pinrec_hf.retrieval.batch import retrieve_parquet
from pinrec_hf.retrieval.export import export_parquet
from pinrec_hf.retrieval.users import UserFiles, find_user

NOW = 1_700_006_400 + 7 * 86_400


@pytest.fixture(scope="session")
def retriever(saved_model):
    return PinRecRetriever.from_pretrained(saved_model)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(batch, "USERS_A_PART", 16)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


REQUEST = {"surface": "homefeed", "timestamp": NOW}


def test_candidates_are_what_recommend_gives(retriever, tiny_data, tmp_path, small_parts):
    done = retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out", request=REQUEST, k=7, progress=False)
    table = pq.read_table(tmp_path / "out")
    users = pq.read_table(tiny_data / "test")["user_id"].to_pylist()
    assert done["num_requests"] == len(users)
    assert done["num_parts"] == -(-len(users) // 16)
    assert table.num_rows == done["num_candidates"] == 7 * len(users)
    for place in (0, len(users) - 1):
        history, split = find_user(tiny_data, users[place], retriever.tokenizer)
        assert split == "test"
        (expected,) = retriever.recommend([history], **REQUEST, k=7)
        rows = table.filter(pa.compute.equal(table["request"], place)).to_pylist()
        assert [row["item_id"] for row in rows] == [candidate.item_id for candidate in expected]
        assert [row["outcome"] for row in rows] == [candidate.outcome for candidate in expected]
        assert [row["rank"] for row in rows] == [*range(1, 8)]
        assert {(row["user_id"], row["step"]) for row in rows} == {(users[place], 1)}


def test_a_killed_run_goes_on_and_ends_in_the_same_files(retriever, tiny_data, tmp_path, small_parts, monkeypatch):
    arguments = {"users": tiny_data / "test", "request": REQUEST, "k": 5, "progress": False}
    retrieve_parquet(retriever, output_dir=tmp_path / "whole", **arguments)
    written, replace = [], os.replace

    def killed(source, target):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(batch.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        retrieve_parquet(retriever, output_dir=tmp_path / "out", **arguments)
    monkeypatch.setattr(batch.os, "replace", replace)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    assert sorted(path.name for path in partial.iterdir()) == [
        "_retrieve.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    with pytest.raises(ValueError, match="a run with other k, request"):
        retrieve_parquet(retriever, output_dir=tmp_path / "out", **{**arguments, "k": 6, "request": {}})
    other = PinRecRetriever.build(retriever.model, retriever.tokenizer, retriever.items)
    other.index.remove(np.arange(3))
    other.num_steps = 2
    with pytest.raises(ValueError, match="a run with other index, steps"):
        retrieve_parquet(other, output_dir=tmp_path / "out", **arguments)
    before = (partial / "part-00000.parquet").stat().st_mtime_ns
    (partial / "part-00002.parquet.partial-1").write_text("half")  # SIGKILL leaves no time to tidy
    retrieve_parquet(retriever, output_dir=tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns == before
    assert not partial.exists()


def test_an_output_that_exists_or_is_being_written_is_refused(retriever, tiny_data, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another"):
        retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another"):
        export_parquet(retriever, tmp_path / "out")
    (tmp_path / "two.partial").mkdir()
    lock = os.open(tmp_path / "two.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another run is writing"):
        retrieve_parquet(retriever, tiny_data / "test", tmp_path / "two")
    os.close(lock)


def test_a_refused_request_leaves_nothing(retriever, tiny_data, tmp_path):
    for request, message in (({"surface": "nowhere"}, "nowhere"), ({"outcome_budget": {"hide": 1}}, "negative")):
        with pytest.raises(ValueError, match=message):
            retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out", request=request, progress=False)
        with pytest.raises(ValueError, match=message):
            export_parquet(retriever, tmp_path / "out", users=tiny_data / "test", request=request, progress=False)
    with pytest.raises(ValueError, match="k is 0"):
        retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out", k=0, progress=False)
    filters = {"filters": {"market": datetime.date(2026, 1, 1)}}  # which JSON cannot say
    with pytest.raises(ValueError, match="the column holds string"):
        retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out", request=filters, progress=False)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "part-00000.parquet.partial-7").touch()  # of a run that was killed
    with pytest.raises(ValueError, match="k is 0"):
        retrieve_parquet(retriever, tiny_data / "test", tmp_path / "out", k=0, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_requests_of_their_own(retriever, tmp_path):
    """A row a request: every field of the schema, structs and maps, a null history."""
    history = {"item_id": ["p1"], "surface": ["homefeed"], "timestamp": [NOW - 60], "outcomes": [["save"]]}
    rows = [
        {"user_id": 1, "history": history, "surface": "search", "query": "lamp", "timestamp": NOW},
        {"user_id": 1, "history": None, "surface": None, "outcome_budget": {"save": 1.0}, "filters": {"market": "de"}},
        {"user_id": 2, "history": history, "exclude": ["p2"], "context_item_id": "p4"},
    ]
    pq.write_table(
        pa.Table.from_pylist([{**dict.fromkeys(rows[0] | rows[1] | rows[2]), **row} for row in rows]),
        tmp_path / "u.parquet",
    )
    retrieve_parquet(retriever, tmp_path / "u.parquet", tmp_path / "out", k=30, progress=False)
    found = pq.read_table(tmp_path / "out").to_pylist()
    lists = [[row["item_id"] for row in found if row["request"] == place] for place in range(3)]
    expected = retriever.recommend(
        [history, {}, history],
        surface=["search", None, None],
        query=["lamp", None, None],
        timestamp=[NOW, None, None],
        outcome_budget=[None, {"save": 1}, None],
        filters=[None, {"market": "de"}, None],
        exclude=[None, None, ["p2"]],
        context_item_id=[None, None, "p4"],
        k=30,
    )
    assert lists == [[candidate.item_id for candidate in candidates] for candidates in expected]
    assert {row["user_id"] for row in found} == {1, 2}


def test_names_that_only_the_test_days_know_count_as_unknown(retriever, tmp_path):
    row = {"user_id": "u", "item_id": ["p1", "p2"], "surface": ["new", "homefeed"], "timestamp": [NOW, NOW]}
    pq.write_table(pa.Table.from_pylist([{**row, "outcomes": [["save"], ["new", "save"]]}]), tmp_path / "u.parquet")
    files = UserFiles(tmp_path / "u.parquet", retriever.tokenizer, {"surface": "search"})
    (request,) = files.requests(next(files.batches(10)))
    assert request["history"]["surface"] == [None, "homefeed"]
    assert request["history"]["outcomes"] == [["save"], [None, "save"]]
    assert request["surface"] == "search"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": [["p1"]]}, "needs `user_id`"),
        ({"user_id": ["u"]}, "needs `user_id`, and either `history`"),
        ({"user_id": ["u"], "history": ["p1 p2"]}, "must be a struct"),
        ({"user_id": ["u"], "item_id": [["p1"]], "timestamp": [[0.5]]}, "'timestamp' is list.*whole seconds"),
    ],
)
def test_user_files_of_neither_layout_are_refused(retriever, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=message):
        UserFiles(tmp_path / "u.parquet", retriever.tokenizer)


def test_missing_truncated_and_mixed_user_files(retriever, tmp_path):
    with pytest.raises(FileNotFoundError, match="no parquet file"):
        UserFiles(tmp_path / "no*.parquet", retriever.tokenizer)
    pq.write_table(pa.table({"user_id": ["u"], "item_id": [["p1"]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user_id": [1], "item_id": [["p1"]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has other columns"):
        UserFiles(tmp_path, retriever.tokenizer)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is truncated"):
        UserFiles([tmp_path / "a.parquet", tmp_path / "b.parquet"], retriever.tokenizer)


def test_a_users_newest_history_is_found(retriever, tiny_data):
    in_test = set(pq.read_table(tiny_data / "test")["user_id"].to_pylist())
    train = pq.read_table(tiny_data / "train").to_pylist()
    row = next(row for row in train if row["user_id"] not in in_test)
    history, split = find_user(tiny_data, row["user_id"], retriever.tokenizer)
    assert split != "test"
    assert len(history["item_id"]) >= len(row["item_id"])
    with pytest.raises(ValueError, match=r"user 'nobody' is in no split.*for example"):
        find_user(tiny_data, "nobody", retriever.tokenizer)


def test_integer_users_are_asked_for_by_what_64_bits_hold(retriever, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(
        json.dumps({**metadata, "id_types": {**metadata["id_types"], "user_id": "integer"}})
    )
    for path in data.glob("*/*.parquet"):
        table = pq.read_table(path)
        numbers = pa.array([int(user.lstrip("u")) for user in table["user_id"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("user_id"), "user_id", numbers), path)
    user = pq.read_table(data / "test")["user_id"][0].as_py()
    assert find_user(data, str(user), retriever.tokenizer)[1] == "test"
    with pytest.raises(ValueError, match="integer ids"):
        find_user(data, "u1", retriever.tokenizer)
    with pytest.raises(ValueError, match=f"user {2**63}: the ids of .* fit 64 bits"):
        find_user(data, str(2**63), retriever.tokenizer)


def test_exported_vectors_rank_as_the_index_does(retriever, tiny_data, tmp_path):
    about = export_parquet(
        retriever, tmp_path / "out", users=tiny_data / "test", request={"surface": "search"}, progress=False
    )
    items, users = (pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("items", "users"))
    assert about == json.loads((tmp_path / "out" / "export.json").read_text())
    assert items["item_id"].to_pylist() == retriever.tokenizer.catalogue.ids(np.arange(60))
    shares = retriever.model.config.outcome_budgets["search"]
    assert users.num_rows == about["num_users"] * len(shares)
    user = users.slice(0, 1).to_pylist()[0]
    assert user["share"] == pytest.approx(shares[user["outcome"]])
    scores = np.stack(items["embedding"].to_pylist()) @ np.array(user["embedding"])
    history, _ = find_user(tiny_data, user["user_id"], retriever.tokenizer)
    (candidates,) = retriever.recommend([history], surface="search", outcome_budget={user["outcome"]: 1}, k=60)
    np.testing.assert_allclose([c.score for c in candidates], scores[[c.row for c in candidates]], rtol=1e-4, atol=1e-4)


def test_removed_items_are_not_exported(retriever, tmp_path):
    model, tokenizer = retriever.model, retriever.tokenizer
    other = PinRecRetriever.build(model, tokenizer)
    other.index.remove(np.array([3, 40]))
    assert export_parquet(other, tmp_path / "out", progress=False)["num_items"] == 58
    items = pq.read_table(tmp_path / "out" / "items.parquet")["item_id"].to_pylist()
    assert items == tokenizer.catalogue.ids(np.delete(np.arange(60), [3, 40]))


def test_items_alone_can_be_exported(retriever, tmp_path):
    assert export_parquet(retriever, tmp_path / "out", progress=False)["num_users"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "items.parquet"]
