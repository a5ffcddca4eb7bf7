import json
from datetime import datetime

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.contract import DataContractError
from pinrec_hf.data.prepare import prepare
from pinrec_hf.modeling.configuration_pinrec import PinRecConfig

DAY = 86_400
T0 = 1_700_006_400  # a midnight, UTC
TYPES = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "surface": pa.string(),
    "timestamp": pa.int64(),
    "outcomes": pa.list_(pa.string()),
}


def make_log(events, **columns):
    """A log of (user, item, surface, seconds after T0 or None, outcomes), plus whole columns."""
    rows = list(zip(*events, strict=True))
    table = pa.table([pa.array(column, kind) for column, kind in zip(rows, TYPES.values(), strict=True)], list(TYPES))
    seconds = pa.array([None if t is None else T0 + t for t in rows[3]], pa.int64())
    table = table.set_column(3, "timestamp", seconds)
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table


def read(folder, split):
    return {row["user_id"]: row for row in pq.read_table(folder / split).to_pylist()}


# somebody is there on each of three days, so that every window has an event
FILLER = [
    ("z", "f", "home", 0, ["save"]),
    ("z", "f", "home", DAY, ["save"]),
    ("z", "f", "home", 2 * DAY, ["save"]),
]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data"


def run(out, events, time_unit="s", **options):
    columns = options.pop("log_columns", {})
    filler = {name: pa.nulls(len(FILLER), values.type) for name, values in columns.items()}
    columns = {name: pa.concat_arrays([values, filler[name]]) for name, values in columns.items()}
    return prepare(make_log([*events, *FILLER], **columns), output_dir=out, time_unit=time_unit, **options)


def test_the_default_split_is_the_last_two_days(out):
    events = [
        ("a", "x", "home", 10, ["save"]),
        ("a", "y", "home", DAY - 1, []),
        ("a", "z", "search", DAY, ["click"]),
        ("a", "x", "home", 2 * DAY + 5, ["save"]),
        ("b", "x", None, None, None),
    ]
    report = run(out, events, name="toy", license="CC0", negative_outcomes=["click"])
    train, validation, test = (read(out, split) for split in ("train", "validation", "test"))
    assert train["a"] == {
        "user_id": "a",
        "item_id": ["x", "y"],
        "surface": ["home", "home"],
        "timestamp": [T0 + 10, T0 + DAY - 1],
        "outcomes": [["save"], []],
        "request_id": [0, 1],
        "target_start": 0,
    }
    assert train["b"]["timestamp"] == [None]
    assert train["b"]["surface"] == [None]
    assert (validation["a"]["item_id"], validation["a"]["target_start"]) == (["x", "y", "z"], 2)
    assert (test["a"]["item_id"], test["a"]["target_start"]) == (["x", "y", "z", "x"], 3)
    assert set(test) == {"a", "z"}
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata == {
        "format": 1,
        "name": "toy",
        "license": "CC0",
        "id_types": {"user_id": "string", "item_id": "string"},
        "surfaces": ["home"],  # search came after the cut
        "outcomes": ["save", "click"],  # negative, so that a model knows it
        "negative_outcomes": ["click"],
        "outcome_counts": {"home": {"save": 2}},
        "split": {
            "kind": "time",
            "train_end": T0 + DAY,
            "validation_end": T0 + 2 * DAY,
            "test_end": T0 + 3 * DAY,
        },
        "content_size": None,
        "query_size": None,
        "num_items": 3,
        "num_users": {"train": 3, "validation": 2, "test": 2},
        "num_events": {"train": 4, "validation": 2, "test": 2},
    }
    assert pq.read_table(out / "items.parquet")["item_id"].to_pylist() == ["f", "x", "y"]
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in out.iterdir()) == [
        "items.parquet", "metadata.json", "report.json", "test", "train", "validation",
    ]  # fmt: skip


def test_windows_may_be_given(out):
    events = [("a", str(hour), "home", hour * 3600, ["save"]) for hour in range(30)]
    report = run(out, events, validation_start=T0 + 36_000, test_start="2023-11-15T12:00Z", test_end=T0 + 54_000)
    assert len(read(out, "train")["a"]["item_id"]) == 10
    assert read(out, "validation")["a"]["target_start"] == 10
    assert len(read(out, "test")["a"]["item_id"]) == 15
    assert report.events_after_test == 15 + 2
    assert "events after the test window, unused: 17" in str(report)


def test_leave_one_out(out):
    events = [("a", str(i), "home", i, ["save"]) for i in range(4)]
    events += [("b", str(i), "home", i, ["save"]) for i in range(2)]
    run(out, events, leave_one_out=True)
    lengths = {
        split: {user: len(row["item_id"]) for user, row in read(out, split).items()}
        for split in ("train", "validation", "test")
    }
    assert lengths == {
        "train": {"a": 2, "b": 2, "z": 1},
        "validation": {"a": 3, "z": 2},
        "test": {"a": 4, "z": 3},
    }
    assert [read(out, split)["a"]["target_start"] for split in ("train", "validation", "test")] == [0, 2, 3]


def test_leave_one_out_of_several_targets(out):
    events = [("a", str(i), "home", i, ["save"]) for i in range(6)]
    events += [("b", str(i), "home", i, ["save"]) for i in range(4)]
    run(out, events, leave_one_out=True, num_targets=2)
    rows = {split: read(out, split) for split in ("train", "validation", "test")}
    assert {split: set(found) for split, found in rows.items()} == {
        "train": {"a", "b", "z"}, "validation": {"a"}, "test": {"a"},  # b and z are too short
    }  # fmt: skip
    assert [len(rows[split]["a"]["item_id"]) for split in rows] == [2, 4, 6]
    assert [rows[split]["a"]["target_start"] for split in rows] == [0, 2, 4]
    assert len(rows["train"]["b"]["item_id"]) == 4
    assert json.loads((out / "metadata.json").read_text())["split"] == {"kind": "leave_one_out", "num_targets": 2}


def test_order_is_time_then_order_then_position_then_item(out):
    events = [
        ("a", "late", "home", 9, []),
        ("a", "b", "home", 5, []),
        ("a", "a", "home", 5, []),
        ("a", "second", "home", 5, []),
        ("a", "first", "home", 5, []),
        ("a", "unknown2", "home", None, []),
        ("a", "unknown1", "home", None, []),
    ]
    order = pa.array([0, 3, 3, 2, 2, 8, 7])
    position = pa.array([0, 1, 1, 1, 0, 0, 0])
    run(out, events, log_columns={"order": order, "position": position})
    row = read(out, "train")["a"]
    assert row["item_id"] == ["unknown1", "unknown2", "first", "second", "a", "b", "late"]
    assert row["position"] == [0, 0, 0, 1, 1, 1, 0]


def test_fractions_of_a_second_decide_the_order(out):
    log = make_log([("a", "second", "home", 0, []), ("a", "first", "home", 0, []), *FILLER])
    millis = pa.array([T0 * 1000 + 900, T0 * 1000 + 100, *((T0 + day * DAY) * 1000 for day in range(3))], pa.int64())
    prepare(log.set_column(3, "timestamp", millis.cast(pa.timestamp("ms", "Asia/Tokyo"))), output_dir=out)
    row = read(out, "train")["a"]
    assert (row["item_id"], row["timestamp"]) == (["first", "second"], [T0, T0])


def test_a_view_ends_at_a_change_or_a_gap(out):
    events = [
        ("a", "1", "home", 0, []),
        ("a", "2", "home", 1800, []),  # a gap of just 30 minutes
        ("a", "3", "home", 3601, []),  # a longer one
        ("a", "4", "search", 3602, []),
        ("a", None, "search", 3603, []),
        ("a", "6", "search", 3604, []),
        ("a", "7", "search", None, []),
        ("a", "8", "search", None, []),
    ]
    queries = pa.array([None, None, None, None, "sofa", "sofa", None, None])
    run(out, events, log_columns={"query": queries})
    row = read(out, "train")["a"]
    assert row["item_id"] == ["7", "8", "1", "2", "3", "4", None, "6"]
    assert row["request_id"] == [0, 1, 2, 2, 3, 4, 5, 5]
    assert row["query"] == [None] * 6 + ["sofa", "sofa"]


def test_what_follows_a_query_event_is_about_it(out):
    events = [
        ("a", None, "search", 0, ["submit"]),
        ("a", "1", "search", 0, ["click"]),
        ("a", "2", "search", 9, ["click"]),
        ("a", None, "search", 20, ["submit"]),
        ("a", "3", "home", 21, ["click"]),
    ]
    run(out, events, log_columns={"query": pa.array(["sofa", None, None, "rug", None])})
    row = read(out, "train")["a"]
    assert row["request_id"] == [0, 0, 0, 1, 2]
    # nobody acts on a query, so that nothing can be asked for its outcomes
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["outcome_counts"]["search"] == {"click": 2}
    assert "submit" in metadata["outcomes"]


def test_given_requests_are_numbered_as_they_begin(out):
    events = [("a", str(i), "home", i, []) for i in range(6)]
    requests = pa.array(["q", "b", "q", None, None, "b"])
    run(out, events, log_columns={"request_id": requests})
    assert read(out, "train")["a"]["request_id"] == [0, 1, 0, 2, 3, 1]


def test_a_late_outcome_is_an_event_of_its_own(out):
    events = [
        ("a", "x", "home", 0, ["click", "save", "hide"]),
        ("a", "y", "home", 30, ["click"]),
        ("a", "w", "home", DAY - 5, ["save"]),  # observed after the cut
        ("a", "v", "home", 40, ["click"]),
    ]
    times = pa.array([[T0, T0 + 60, None], [T0 + 20], [T0 + DAY + 5], None], pa.list_(pa.int64()))
    run(out, events, log_columns={"outcome_timestamps": times})
    train, validation = read(out, "train")["a"], read(out, "validation")["a"]
    assert train["item_id"] == ["x", "y", "v", "x", "w"]
    assert train["outcomes"] == [["click", "hide"], ["click"], ["click"], ["save"], []]
    assert train["request_id"] == [0, 0, 0, 0, 1]
    assert (validation["item_id"][-1], validation["outcomes"][-1], validation["target_start"]) == (
        "w",
        ["save"],
        5,
    )
    assert validation["request_id"][-1] == 1


def test_without_outcomes_and_surface(out):
    log = make_log(FILLER).select(["user_id", "item_id", "timestamp"])
    prepare(log, output_dir=out, time_unit="s")
    row = read(out, "train")["z"]
    assert (row["outcomes"], row["surface"]) == ([["interaction"]], ["default"])


def test_outcomes_become_sets_and_null_stays_unknown(out):
    run(out, [("a", "x", "home", 0, ["save", None, "click", "save"]), ("a", "y", "home", 1, [None])])
    assert read(out, "train")["a"]["outcomes"] == [["click", "save"], None]


def test_a_string_is_a_list_of_one_outcome(out):
    names = pa.array(["save", None, "click", *["save"] * len(FILLER)]).dictionary_encode()
    log = make_log([("a", item, "home", second, []) for second, item in enumerate("xyz")] + FILLER)
    prepare(log.set_column(4, "outcomes", names), output_dir=out, time_unit="s")
    assert read(out, "train")["a"]["outcomes"] == [["save"], None, ["click"]]


def test_a_position_below_zero_is_unknown(out):
    events = [("a", "x", "home", 0, ["save"]), ("a", "y", "home", 0, []), ("a", "z", "home", 0, [])]
    run(out, events, log_columns={"position": pa.array([-1, 2, 1])})
    row = read(out, "train")["a"]
    assert (row["item_id"], row["position"]) == (["x", "z", "y"], [None, 1, 2])


def test_an_empty_string_is_no_outcome(out):
    names = pa.array(["save", "", None, *["save"] * len(FILLER)])
    log = make_log([("a", item, "home", second, []) for second, item in enumerate("xyz")] + FILLER)
    prepare(log.set_column(4, "outcomes", names), output_dir=out, time_unit="s")
    assert read(out, "train")["a"]["outcomes"] == [["save"], [], None]
    assert json.loads((out / "metadata.json").read_text())["outcomes"] == ["save"]
    log = log.append_column("outcome_timestamps", pa.array([None, [None], None, *[None] * len(FILLER)]))
    prepare(log.set_column(4, "outcomes", names), output_dir=out.with_name("again"), time_unit="s")
    assert read(out.with_name("again"), "train")["a"]["outcomes"] == [["save"], [], None]


def test_optional_columns_are_kept(out):
    events = [("a", "x", "related", 0, ["save"]), ("a", "y", "related", 1, [])]
    given = {
        "context_item_id": pa.array(["s", None]),
        "weight": pa.array([0.5, None]),
        "request_features": pa.array([["device=ios", None], None]),
    }
    run(out, events, log_columns=given)
    row = read(out, "train")["a"]
    kept = {name: values.to_pylist() for name, values in given.items()}
    assert {name: row[name] for name in given} == {**kept, "request_features": [["device=ios"], None]}


def test_columns_are_mapped_in_all_tables(out):
    log = make_log(FILLER).rename_columns(["who", "what", "surface", "timestamp", "outcomes"])
    items = pa.table({"what": ["f"], "title": ["F"]})
    prepare(log, items=items, columns={"user_id": "who", "item_id": "what"}, output_dir=out, time_unit="s")
    assert pq.read_table(out / "items.parquet").to_pylist() == [{"item_id": "f", "title": "F"}]


def test_every_kind_of_input_gives_the_same_files(tmp_path):
    log = make_log([(f"u{i % 7}", f"i{i % 5}", "home", i * 2000, ["save"] * (i % 2)) for i in range(150)])
    log = log.set_column(2, "surface", log["surface"].dictionary_encode())
    (tmp_path / "logs").mkdir()
    pq.write_table(log.slice(0, 70), tmp_path / "logs" / "b.parquet")
    pq.write_table(log.slice(70), tmp_path / "logs" / "c.parquet")
    inputs = {
        "table": log,
        "reader": log.to_reader(max_chunksize=13),
        "dataset": datasets.Dataset(log),
        "folder": tmp_path / "logs",
        "glob": str(tmp_path / "logs" / "*.parquet"),
        "paths": [tmp_path / "logs" / "c.parquet", tmp_path / "logs" / "b.parquet"],
    }
    for name, given in inputs.items():
        prepare(given, output_dir=tmp_path / name, time_unit="s")
    for split in ("train", "validation", "test"):
        files = {(tmp_path / name / split / "part-00000.parquet").read_bytes() for name in inputs}
        assert len(files) == 1


def test_a_negative_outcome_that_train_lacks_is_known_to_the_model(out):
    run(out, [("a", "x", "home", 0, ["save"]), ("a", "x", "home", DAY + 5, ["hide"]), ("a", "x", "home", 2 * DAY, [])],
        negative_outcomes=["hide"])  # fmt: skip
    metadata = json.loads((out / "metadata.json").read_text())
    names = {name: metadata[name] for name in ("surfaces", "outcomes", "negative_outcomes")}
    assert PinRecConfig.from_preset("tiny", **names).positive_outcomes == ["save"]


def test_a_life_time_may_have_no_end(out):
    ends = pa.array([datetime(9999, 12, 31), None], pa.timestamp("us"))
    run(out, [("a", "x", "home", 0, ["save"])], items=pa.table({"item_id": ["x", "y"], "available_until": ends}))
    assert pq.read_table(out / "items.parquet")["available_until"].to_pylist()[0] > 253_402_000_000


def test_a_path_is_no_pattern_where_it_exists(out, tmp_path):
    for name, user in (("log[12]", "right"), ("log1", "wrong")):
        table = pa.table({"user_id": [user] * 3, "item_id": ["x", "y", "x"], "timestamp": [T0, T0 + DAY, T0 + 2 * DAY]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    prepare(str(tmp_path / "log[12].parquet"), time_unit="s", output_dir=out)
    assert set(read(out, "train")) == {"right"}


def test_folders_of_folders_as_engines_write_them(out, tmp_path):
    for name, rows in (("1.parquet", FILLER[:2]), ("2.parquet", FILLER[2:])):
        (tmp_path / "log" / name).mkdir(parents=True)
        pq.write_table(make_log(rows), tmp_path / "log" / name / "part-0.parquet")
    patterns = {"folder": "log", "pattern": "log/*.parquet", "both": "log/**/*.parquet"}
    for name, given in patterns.items():
        given = tmp_path / given
        report = prepare(given, output_dir=tmp_path / name, time_unit="s")
        assert report.rows_read["log"] == 3


def test_names_that_differ_in_case_alone_are_refused(out):
    log = pa.table({"USER_ID": ["a"], "user_id": ["b"], "item_id": ["x"], "timestamp": [T0]})
    with pytest.raises(DataContractError, match=r"columns \['USER_ID', 'user_id'\] in the table differ in case"):
        prepare(log, time_unit="s", output_dir=out)


def test_a_train_of_queries_alone_is_refused(out):
    log = pa.table({"user_id": ["a"] * 3, "item_id": pa.array([None, "x", "x"], pa.string()),
                    "query": ["sofa", None, None], "timestamp": [T0, T0 + DAY, T0 + 2 * DAY]})  # fmt: skip
    with pytest.raises(DataContractError, match="train holds queries only"):
        prepare(log, time_unit="s", output_dir=out)
    assert not out.exists()


def test_items_keep_their_order_and_bad_ones_are_counted(out):
    vectors = [
        [1.0, 2.0],
        [3.0],
        [0.0, 0.0],
        [np.nan, 1.0],
        None,
        [np.inf, 1.0],
        [5.0, 6.0],
        [1.0, 1.0],
        [7.0, None],
    ]
    items = pa.table(
        {
            "item_id": ["y", "short", "zero", "nan", "none", "inf", "x", "y", "hole"],
            "title": list("abcdefghi"),
            "embedding": pa.array(vectors, pa.list_(pa.float64())),
            "features": [["author=1", None], None, [], [], [], [], [], [], []],
            "available_from": pa.array([T0 * 1000 + 999] + [None] * 8, pa.int64()).cast(pa.timestamp("ms")),
            "available_until": pa.array([None] * 6 + [T0] + [None] * 2, pa.int64()),
        }
    )
    report = run(out, [("a", "x", "home", 0, []), ("a", "gone", "home", 1, [])], items=items)
    names = ["item_id", "embedding", "features", "available_from", "available_until", "title"]
    written = pq.read_table(out / "items.parquet")
    assert written.column_names == names
    assert [tuple(row.values()) for row in written.to_pylist()] == [
        ("y", [1.0, 2.0], ["author=1"], T0, None, "a"),
        ("x", [5.0, 6.0], [], None, T0, "g"),
    ]
    counts = {finding.reason: finding.count for finding in report.findings}
    assert counts == {
        "embedding has not 2 numbers, as most have": 2,
        "embedding is zero": 1,
        "embedding holds NaN or infinity": 3,
        "item_id repeats an earlier row's": 1,
        "item_id is not in the items table (unknown item, never a target)": 4,
    }
    unknown = next(finding for finding in report.findings if not finding.dropped)
    assert unknown.first[0] == {"row": 1, "user_id": "a", "item_id": "gone"}
    assert read(out, "train")["a"]["item_id"] == ["x", "gone"]
    metadata = json.loads((out / "metadata.json").read_text())
    assert (metadata["content_size"], metadata["num_items"]) == (2, 2)


def test_queries_are_checked_and_written(out):
    queries = pa.table({"query": ["sofa", None, "sofa", "lamp"], "embedding": [[1.0], [2.0], [3.0], [4.0]]})
    report = run(out, [("a", "x", "home", 0, [])], queries=queries)
    assert pq.read_table(out / "queries.parquet")["query"].to_pylist() == ["sofa", "lamp"]
    assert report.rows_kept["queries"] == 2
    assert json.loads((out / "metadata.json").read_text())["query_size"] == 1


BAD_ROWS = [
    (None, "x", "home", 0, []),
    ("a", None, "home", 0, []),
    ("a", "x", "home", -T0 - 5, []),
    ("a", "x", "home", 1, ["save"]),
    ("a", "x", "home", 1, ["save"]),
    ("a", "x", "home", 1, ["save"]),
]


def test_bad_rows_are_dropped_and_counted(out):
    report = run(out, BAD_ROWS)
    assert [(f.table, f.reason, f.count, f.first[0]["row"]) for f in report.findings] == [
        ("log", "negative or NaN timestamp", 1, 2),
        ("log", "neither item_id nor query", 1, 1),
        ("log", "null user_id", 1, 0),
        ("log", "the row repeats another in every column", 2, 5),
    ]
    assert report.findings[0].first == [{"row": 2, "user_id": "a", "item_id": "x", "timestamp": -5}]
    assert (report.rows_read["log"], report.rows_kept["log"]) == (9, 4)
    assert "log: 2 dropped: the row repeats another" in str(report)


@pytest.mark.parametrize("row", range(3))
def test_strict_refuses_bad_rows(out, row):
    with pytest.raises(DataContractError, match="strict refuses:\nlog: 1 dropped"):
        run(out, [BAD_ROWS[row]], strict=True)
    assert not list(out.parent.iterdir())


def test_strict_refuses_duplicates_and_unknown_items(out):
    with pytest.raises(DataContractError, match="2 dropped: the row repeats another"):
        run(out, BAD_ROWS[3:], strict=True)
    with pytest.raises(DataContractError, match="not in the items table"):
        run(out, BAD_ROWS[3:4], items=pa.table({"item_id": ["f"]}), strict=True)
    assert run(out, BAD_ROWS[3:4], items=pa.table({"item_id": ["f", "x"]}), strict=True).findings == []


def test_float_times_with_nan_and_fractions(out):
    log = make_log([("a", "x", "home", 0, []), ("a", "y", "home", 0, []), *FILLER])
    times = [T0 + 1.9, float("nan"), T0, T0 + DAY, T0 + 2 * DAY]
    report = prepare(log.set_column(3, "timestamp", pa.array(times)), output_dir=out, time_unit="s")
    assert read(out, "train")["a"]["timestamp"] == [T0 + 1]
    assert report.findings[0].count == 1


def test_strange_ids_survive(out):
    names = ["", " ", "a b", 'say "x"', "it's", "two\nlines", "🛋️", "{curly}", "%s", "NULL"]
    log = make_log([(user, user, "home", 1, []) for user in names] + FILLER)
    prepare(log, items=pa.table({"item_id": [*names, "f"]}), output_dir=out, time_unit="s", strict=True)
    assert set(names) <= set(read(out, "train"))
    assert all(read(out, "train")[user]["item_id"] == [user] for user in names)
    assert pq.read_table(out / "items.parquet")["item_id"].to_pylist() == [*names, "f"]


def test_a_history_of_a_million_events(out):
    n = 1_000_000
    log = pa.table(
        {
            "user_id": pa.array(np.zeros(n, np.int64)),
            "item_id": pa.array(np.arange(n) % 977),
            "timestamp": pa.array((T0 + np.arange(n)[::-1]) * 1_000_000).cast(pa.timestamp("us")),
        }
    )
    prepare(log, output_dir=out)
    row = pq.read_table(out / "test", columns=["item_id", "timestamp", "target_start"])
    assert row["target_start"].to_pylist() == [950_400]  # whole days before the last one
    items = row["item_id"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(items, (np.arange(n) % 977)[::-1])
