"""Small sequences datasets, written by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.simulator import simulate
from pinrec_hf.evaluation.response_model import ResponseModel
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

TRAIN_END, VALIDATION_END, TEST_END = 1000, 2000, 3000
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.list_(pa.string()),
        "surface": pa.list_(pa.string()),
        "timestamp": pa.list_(pa.int64()),
        "outcomes": pa.list_(pa.list_(pa.string())),
        "request_id": pa.list_(pa.int64()),
        "query": pa.list_(pa.string()),
        "target_start": pa.int64(),
    }
)
EVENT = {
    "item_id": None,
    "surface": "feed",
    "timestamp": None,
    "outcomes": [],
    "request_id": 0,
    "query": None,
}


@pytest.fixture
def catalogue():
    return Catalogue.build(
        [f"i{n}" for n in range(20)], vectors=np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    )


@pytest.fixture
def table():
    """Rows of a sequences dataset, from (user, target_start, events as dicts)."""
    return make_table


def make_table(users):
    rows = []
    for user, start, events in users:
        full = [{**EVENT, **event} for event in events]
        rows.append({"user_id": user, "target_start": start, **{n: [e[n] for e in full] for n in EVENT}})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture
def write_dataset(tmp_path):
    """Cut users' events by time and write all splits; returns the folder."""

    def write(users, **metadata):
        folder = tmp_path / "data"
        for split, low, high in (
            ("train", None, TRAIN_END),
            ("validation", TRAIN_END, VALIDATION_END),
            ("test", VALIDATION_END, TEST_END),
        ):
            rows = []
            for user, events in users.items():
                times = [event.get("timestamp") or 0 for event in events]
                kept = [event for event, time in zip(events, times, strict=True) if time < high]
                start = 0 if low is None else sum(time < low for time in times)
                if kept and (low is None or start < len(kept)):
                    rows.append((user, start, kept))
            (folder / split).mkdir(parents=True)
            pq.write_table(make_table(rows), folder / split / "part-0.parquet")
        found = {
            "format": 1,
            "surfaces": ["feed", "search"],
            "outcomes": ["click", "save", "hide"],
            "negative_outcomes": ["hide"],
            "split": {
                "kind": "time",
                "train_end": TRAIN_END,
                "validation_end": VALIDATION_END,
                "test_end": TEST_END,
            },
            "outcome_counts": {"feed": {"click": 2, "save": 2}, "search": {"click": 1}},
        }
        (folder / "metadata.json").write_text(json.dumps({**found, **metadata}))
        return folder

    return write


@pytest.fixture
def random_users():
    """Events of 40 users on 20 items over all three windows, with ties, ignored items and hides."""
    rng = np.random.default_rng(1)
    users = {}
    for user in range(40):
        count = rng.integers(3, 25)
        events = []
        for time in np.sort(rng.integers(0, 300, size=count)) * 10:
            item = int(19 * rng.random() ** 2)
            outcomes = [["click"], ["save"], ["click", "save"], ["hide"], []][
                rng.choice(5, p=[0.4, 0.2, 0.1, 0.1, 0.2])
            ]
            surface = ["feed", "search"][int(rng.random() < 0.3)]
            events.append({"item_id": f"i{item}", "timestamp": int(time), "outcomes": outcomes, "surface": surface})
        users[f"u{user}"] = events
    return users


@pytest.fixture(scope="session")
def public_data():
    """The folder of the public sets."""
    folder = Path(os.environ.get("PINREC_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip("PINREC_DATA (public sets) is absent")
    return folder


@pytest.fixture(scope="session")
def world_data(tmp_path_factory):
    """A simulated world's folder and the dataset that was prepared from its log."""
    root = tmp_path_factory.mktemp("online")
    simulate(root / "world", size=20_000)
    prepare(
        str(root / "world" / "log"),
        items=str(root / "world" / "items.parquet"),
        queries=str(root / "world" / "queries.parquet"),
        negative_outcomes=["hide"],
        output_dir=root / "data",
    )
    return root / "world", root / "data"


@pytest.fixture(scope="session")
def world_catalogue(world_data):
    return build_catalogue(world_data[1])


@pytest.fixture(scope="session")
def responses(world_data, world_catalogue):
    return ResponseModel.fit(world_data[1], world_catalogue)
