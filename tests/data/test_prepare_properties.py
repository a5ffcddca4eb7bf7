import json
import tempfile
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinrec_hf.data import duckdb_engine
from pinrec_hf.data.contract import DataContractError
from pinrec_hf.data.prepare import prepare

T0, DAY = 1_700_006_400, 86_400
CUTS = (T0 + DAY, T0 + 2 * DAY, T0 + 3 * DAY)
WINDOWS = {"validation_start": CUTS[0], "test_start": CUTS[1], "test_end": CUTS[2]}

seconds = st.integers(0, 4 * DAY // 600).map(lambda n: T0 + 600 * n)
names = st.sampled_from(["save", "click", "hide", None])
event = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["a", "b b", "ç", None]),
        "item_id": st.sampled_from(["x", "y", "🛋️", None]),
        "timestamp": st.none() | seconds,
        "surface": st.sampled_from(["home", "search", None]),
        "pairs": st.lists(st.tuples(names, st.none() | seconds), max_size=3, unique_by=lambda pair: pair[0]),
        "order": st.none() | st.integers(0, 3),
        "query": st.sampled_from([None, "q"]),
    }
)
ANCHOR = {
    "user_id": "z",
    "item_id": "x",
    "surface": "home",
    "pairs": [("save", None)],
    "order": None,
    "query": None,
}
ANCHORS = [{**ANCHOR, "timestamp": T0 + day * DAY} for day in range(3)]  # no window is empty
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "timestamp": pa.int64(),
        "surface": pa.string(),
        "outcomes": pa.list_(pa.string()),
        "outcome_timestamps": pa.list_(pa.int64()),
        "order": pa.int64(),
        "query": pa.string(),
    }
)


def as_table(rows):
    split = [
        {
            **{name: value for name, value in row.items() if name != "pairs"},
            "outcomes": [name for name, _ in row["pairs"]],
            "outcome_timestamps": [t for _, t in row["pairs"]],
        }
        for row in rows
    ]
    return pa.Table.from_pylist(split, SCHEMA)


def low(value):
    """Sorts None first."""
    return (value is not None, value if value is not None else 0)


def text(value):
    return (value is not None, value or "")


def sort_key(e):
    return (
        low(e["timestamp"]),
        low(e["order"]),
        text(e["item_id"]),
        text(e["surface"]),
        text(e["query"]),
        (e["outcomes"] is not None, e["outcomes"] or ()),
    )


def names_of(given):
    """A sorted set; None where nothing but unknown names was given."""
    return None if given and not any(given) else tuple(sorted({name for name in given if name is not None}))


def reference(rows):
    """The same sequences by plain Python: user -> events, oldest first."""
    base = {}
    for row in rows:
        if row["user_id"] is None or (row["item_id"] is None and row["query"] is None):
            continue
        late = [
            (name, t)
            for name, t in row["pairs"]
            if t is not None and (row["timestamp"] is None or t > row["timestamp"])
        ]
        early = names_of([name for name, t in row["pairs"] if (name, t) not in late])
        shown = {name: row[name] for name in ("user_id", "item_id", "timestamp", "surface", "order", "query")}
        base.setdefault((*shown.values(), early), ({**shown, "outcomes": early}, set()))[1].update(late)
    users = defaultdict(list)
    for shown, late in base.values():
        users[shown["user_id"]].append((shown, late))
    sequences = {}
    for user, events in users.items():
        events.sort(key=lambda pair: sort_key(pair[0]))
        everything, request, previous = [], -1, None
        for shown, late in events:
            same = previous is not None and None not in (previous["timestamp"], shown["timestamp"])
            same = same and shown["timestamp"] - previous["timestamp"] <= 1800
            same = same and all(previous[name] == shown[name] for name in ("surface", "query"))
            request, previous = request + (not same), shown
            everything.append({**shown, "request_id": request})
            acts = [(names_of([name]), t) for name, t in late]
            everything += [{**shown, "outcomes": names, "timestamp": t, "request_id": request} for names, t in acts]
        everything.sort(key=lambda e: (*sort_key(e)[:5], e["request_id"], sort_key(e)[5]))
        sequences[user] = everything
    return sequences


def run(rows, folder, **options):
    return prepare(as_table(rows), output_dir=folder, time_unit="s", **WINDOWS, **options)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(event, max_size=25))
def test_sequences_agree_with_plain_python(rows):
    rows = [*rows, *ANCHORS]
    expected = reference(rows)
    with tempfile.TemporaryDirectory() as folder:
        report = run(rows, Path(folder) / "data")
        for split, begin, end in zip(("train", "validation", "test"), (None, *CUTS), CUTS, strict=False):
            written = {row["user_id"]: row for row in pq.read_table(Path(folder) / "data" / split).to_pylist()}
            wanted = {}
            for user, events in expected.items():
                known = [e for e in events if e["timestamp"] is None or e["timestamp"] < end]
                start = sum(e["timestamp"] is None or e["timestamp"] < begin for e in known) if begin else 0
                if len(known) > start:
                    wanted[user] = (known, start)
            assert written.keys() == wanted.keys()
            assert report.num_users[split] == len(wanted)
            for user, (events, start) in wanted.items():
                row = written[user]
                assert row["target_start"] == start
                columns = ("item_id", "surface", "timestamp", "request_id", "query")
                assert [row[name] for name in columns] == [[e[name] for e in events] for name in columns]
                assert row["outcomes"] == [e["outcomes"] if e["outcomes"] is None else [*e["outcomes"]] for e in events]


def files_of(folder):
    """What may not depend on anything after the cut."""
    files = [*sorted((folder / "train").iterdir()), folder / "items.parquet"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(event, max_size=20), st.randoms(use_true_random=False), st.lists(event, max_size=8))
def test_canary_no_row_after_the_cut_changes_train(rows, random, others):
    """Poison: later rows are changed, removed and added, and so are later outcomes of earlier rows."""

    def later(t):
        return t is not None and t >= CUTS[0]

    rows = [*rows, *ANCHORS]
    poisoned = []
    for row in rows:
        if later(row["timestamp"]):
            if row["user_id"] != "z" and random.random() < 0.5:
                continue
            changed = {"item_id": "poison", "surface": "poison", "pairs": [("poison", None)]}
            poisoned.append({**row, **(changed if row["user_id"] != "z" else {})})
        else:
            kept = [pair for pair in row["pairs"] if not later(pair[1])]
            poisoned.append({**row, "pairs": [*kept, ("late", CUTS[0] + 600 * random.randrange(100))]})
    poisoned += [row for row in others if later(row["timestamp"])]
    random.shuffle(poisoned)
    with tempfile.TemporaryDirectory() as folder:
        for name, log in (("clean", rows), ("poisoned", poisoned)):
            run(log, Path(folder) / name)
        assert files_of(Path(folder) / "clean") == files_of(Path(folder) / "poisoned")
        clean, poison = (metadata_of(Path(folder) / name) for name in ("clean", "poisoned"))
        for name in ("surfaces", "outcomes", "outcome_counts", "num_items", "split"):
            assert clean[name] == poison[name]


def metadata_of(folder):
    return json.loads((folder / "metadata.json").read_text())


def test_partitions_and_row_order_do_not_show(tmp_path, monkeypatch):
    log = pa.table(
        {
            "user_id": [f"u{i % 13}" for i in range(600)],
            "item_id": [f"i{i % 13}" for i in range(600)],
            "timestamp": [T0 + i * 400 for i in range(600)],
        }
    )
    results = []
    for name, rows, limit in (
        ("one", log, 10**6),
        ("sixteen", log, 100),
        ("many", log.take(list(range(599, -1, -1))), 2),
    ):
        monkeypatch.setattr(duckdb_engine, "ROWS_PER_PARTITION", limit)
        prepare(rows, output_dir=tmp_path / name, time_unit="s")
        splits = [(tmp_path / name / split / "part-00000.parquet").read_bytes() for split in ("validation", "test")]
        results.append([files_of(tmp_path / name), *splits])
    assert results[0] == results[1] == results[2]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(event, min_size=1, max_size=15))
def test_strict_accepts_exactly_what_is_not_dropped(rows):
    rows = [*rows, *ANCHORS]
    with tempfile.TemporaryDirectory() as folder:
        report = run(rows, Path(folder) / "default")
        assert report.rows_kept["log"] + sum(finding.count for finding in report.findings) == len(rows)
        if report.findings:
            with pytest.raises(DataContractError, match="strict refuses"):
                run(rows, Path(folder) / "strict", strict=True)
        else:
            run(rows, Path(folder) / "strict", strict=True)
