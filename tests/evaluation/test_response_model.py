"""The ranker of the online test learns from the log, sees no future, and sees the same when it serves."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pinrec_hf.evaluation.events import flatten_events, read_split
from pinrec_hf.evaluation.response_model import ResponseModel, _auc
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

HISTORY = ("item_id", "surface", "timestamp", "outcomes")


def test_it_tells_better_from_worse_impressions(responses):
    assert set(responses.validation_auc) == {"save", "click", "hide"}
    assert responses.validation_auc["click"] > 0.62
    assert responses.validation_auc["save"] > 0.62


def test_the_same_seed_gives_the_same_model_and_leaves_other_chance_alone(responses, world_data, world_catalogue):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = ResponseModel.fit(world_data[1], world_catalogue)
    assert torch.rand(1) == expected
    for name, value in responses.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])


def test_it_serves_on_the_features_that_it_was_trained_on(responses, world_data, world_catalogue):
    """Of the first request of each validation day's user, from a history cut by hand."""
    rows = read_split(world_data[1], "validation", max_users=2_000)
    features, _ = responses._examples("validation", 2_000, 0)
    events = flatten_events(rows, world_catalogue)
    example = np.flatnonzero((events.item_row >= 0) & (np.arange(len(events)) >= events.target_start[events.user]))
    table = {name: events.columns[name].to_pylist() for name in (*HISTORY, "query", "context_item_id")}
    for number in range(0, len(example), 37):
        event = example[number]
        past = range(events.offsets[events.user[event]], event)
        past = [i for i in past if events.time[i] < events.time[event]]
        request = {
            "history": {name: [table[name][i] for i in past] for name in HISTORY},
            **{name: table[name][event] for name in ("surface", "timestamp", "query", "context_item_id")},
        }
        mine = [0], events.item_row[[event]], np.zeros(1)
        served = responses._features(responses._situations([request]), np.array(mine[0]), *mine[1:])[0]
        differing = np.flatnonzero(~np.isclose(served, features[number], atol=1e-5))
        position = len(served) - 1 - len(responses.surfaces)
        assert set(differing) <= {position}


def test_popularity_counts_only_the_days_before(responses, world_data):
    assert not responses._counts[0].any()
    train = pq.read_table(world_data[1] / "train").to_pylist()
    times = np.array([time for row in train for time in row["timestamp"]])
    is_item = np.array([item is not None for row in train for item in row["item_id"]])
    day = (times - times.min() // 86_400 * 86_400) // 86_400
    shown = responses._counts[:, -1, :, 0].sum(axis=1)
    assert shown.tolist() == [int((is_item & (day < d)).sum()) for d in range(len(shown))]
    assert responses._counts[:, :-1, :, 0].sum(axis=(1, 2)).tolist() == shown.tolist()


def test_best_orders_by_expected_outcomes_and_keeps_gaps_last(responses):
    request = {"history": {name: [] for name in HISTORY}, "surface": "homefeed", "timestamp": 1_705_200_000}
    rows = np.array([[3, -1, 10, 40, 7]])
    chance = responses.predict([request], rows)[0]
    assert np.isnan(chance[1]).all()
    columns = {name: chance[:, place] for place, name in enumerate(responses.outcomes)}
    value = columns["save"] + columns["click"] - columns["hide"]
    expected = sorted([0, 2, 3, 4], key=lambda place: -value[place])
    assert responses.best([request], rows).tolist() == [[*rows[0, expected], -1]]


def test_area_under_the_curve():
    scores, labels = np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, True, False, True])
    assert _auc(scores, labels) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert np.isnan(_auc(scores, np.ones(4, bool)))


def test_refuses_what_it_cannot_learn_from(write_dataset, random_users, catalogue):
    bare = Catalogue.build([f"i{n}" for n in range(20)])
    folder = write_dataset(random_users)
    with pytest.raises(ValueError, match="have no vectors"):
        ResponseModel.fit(folder, bare)
    part = folder / "train" / "part-0.parquet"
    rows = pq.read_table(part).to_pylist()
    schema = pq.read_schema(part)
    for row in rows:
        row["outcomes"] = [names or ["click"] for names in row["outcomes"]]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    with pytest.raises(ValueError, match="no ignored impressions"):
        ResponseModel.fit(folder, catalogue)
    told = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**told, "split": {"kind": "leave_one_out"}}))
    with pytest.raises(ValueError, match="leave-one-out"):
        ResponseModel.fit(folder, catalogue)
