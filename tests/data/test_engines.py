"""Spark runs the expressions that DuckDB runs: the same rows in the same order, and the same report."""

import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.prepare import prepare

pytestmark = pytest.mark.scale

DAY = 86_400
T0 = 1_700_006_400  # a midnight, UTC


@pytest.fixture(scope="module", autouse=True)
def spark():
    """One small session for all tests here; `prepare` finds it."""
    pytest.importorskip("pyspark", reason="needs the extra spark")
    from pyspark.sql import SparkSession

    settings = {
        "spark.master": "local[2]", "spark.ui.enabled": "false", "spark.log.level": "ERROR",
        "spark.sql.shuffle.partitions": "2", "spark.pyspark.python": sys.executable,
        "spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1",
    }  # fmt: skip
    builder = SparkSession.builder
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


def check_both(folder: Path, log, **options) -> None:
    """Prepares on both engines and compares everything that was written."""
    reports = {engine: prepare(log, output_dir=folder / engine, engine=engine, **options) for engine in ENGINES}
    assert reports["spark"].to_json() == reports["duckdb"].to_json()
    files = sorted(path.relative_to(folder / "duckdb") for path in (folder / "duckdb").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(folder / "spark") for p in (folder / "spark").rglob("*") if p.is_file())
    for file in files:
        a, b = folder / "duckdb" / file, folder / "spark" / file
        if file.suffix == ".parquet":
            assert pq.read_table(b).equals(pq.read_table(a)), file
        else:
            assert a.read_bytes() == b.read_bytes(), file


ENGINES = ("duckdb", "spark")


def make_log(num_rows: int, seed: int) -> pa.Table:
    """Every column of the contract, ties in time, holes, repeated rows, and rows that break the contract."""
    rng = random.Random(seed)
    outcomes = [
        rng.choice([[], ["save"], ["click", "save", "click"], [None], None, ["hide", None]]) for _ in range(num_rows)
    ]
    seconds = [T0 + rng.choice([rng.randrange(3 * DAY), DAY, 2 * DAY]) for _ in range(num_rows)]
    seconds = [rng.choice([None, -5]) if rng.random() < 0.05 else t for t in seconds]
    late = [
        None if names is None or rng.random() < 0.3
        else [rng.choice([None, T0 + rng.randrange(3 * DAY), t]) for _ in names]
        for names, t in zip(outcomes, seconds, strict=True)
    ]  # fmt: skip

    def one_of(*values):
        return [rng.choice(values) for _ in range(num_rows)]

    table = pa.table(
        {
            "who": pa.array(one_of("a", "b", "Ü 🛋", "d", "e'\"", "", None), pa.string()),
            "item_id": pa.array(one_of("x", "y", "z", "gone", None), pa.string()),
            "surface": pa.array(one_of("home", "search", None), pa.string()).dictionary_encode(),
            "timestamp": pa.array(seconds, pa.int64()),
            "outcomes": pa.array(outcomes, pa.list_(pa.string())),
            "outcome_timestamps": pa.array(late, pa.list_(pa.int64())),
            "order": pa.array(one_of(1, 2, None), pa.int8()),
            "position": pa.array(one_of(0, 1, None), pa.uint16()),
            "query": pa.array(one_of("blue sofa", None, None), pa.string()),
            "context_item_id": pa.array(one_of("x", None), pa.string()),
            "weight": pa.array(one_of(0.5, 1.0, None, float("nan")), pa.float32()),
            "request_features": pa.array(one_of(["device=ios"], [], [None, "a=b"], None), pa.list_(pa.string())),
        }
    )
    return pa.concat_tables([table, table.slice(0, 9)])


def test_every_column_hole_and_bad_row(tmp_path):
    vectors = [[1.0, 2.0], [3.0], [0.0, 0.0], [np.nan, 1.0], None, [5.0, 6.0], [5.0, 6.0]]
    items = pa.table(
        {
            "item_id": ["y", "short", "zero", "nan", "none", "x", "y"],
            "embedding": pa.array(vectors, pa.list_(pa.float64())),
            "features": [["author=1", None], None, [], [], [], ["tag=cooking"], []],
            "available_from": pa.array([T0, None, None, None, None, T0 + DAY, T0], pa.int64()),
            "a title": list("abcdefg"),
        }
    )
    queries = pa.table({"query": ["blue sofa", None, "blue sofa"], "embedding": [[1.0], [2.0], [3.0]]})
    check_both(
        tmp_path, make_log(300, seed=0), items=items, queries=queries, columns={"user_id": "who"}, time_unit="s",
        negative_outcomes=["hide"], name="both",
    )  # fmt: skip


def test_given_requests_in_many_files_with_timestamps(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "two logs [x] %20"
    folder.mkdir()
    for i, kind in enumerate([pa.timestamp("us", "Asia/Tokyo")] * 3):
        n = 100
        times = pa.array((T0 + rng.integers(0, 3 * DAY, n)) * 1_000_000 + rng.integers(0, 3, n)).cast(kind)
        pq.write_table(
            pa.table(
                {
                    "user_id": rng.integers(0, 9, n),
                    "item_id": pa.array(rng.integers(0, 40, n), pa.uint32()),
                    "timestamp": times,
                    "request_id": pa.array([int(r) or None for r in rng.integers(0, 5, n)], pa.int64()),
                    "outcomes": pa.array([["save"] if r else [] for r in rng.integers(0, 2, n)], pa.list_(pa.string())),
                }
            ),
            folder / f"é{i}.parquet",
            row_group_size=30,
        )
    check_both(tmp_path, folder, leave_one_out=True, num_targets=2)


def test_nanoseconds_and_no_optional_column(tmp_path):
    """Spark has no type for nanoseconds."""
    times = pa.array((T0 + np.arange(40) * DAY // 10) * 1_000_000_000 + 999).cast(pa.timestamp("ns"))
    check_both(
        tmp_path,
        pa.table({"user_id": ["a", "b"] * 20, "item_id": [f"i{i % 7}" for i in range(40)], "timestamp": times}),
    )
