"""Decayed popularity against counting by hand, and its figures on KuaiRand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.data.public import prepare_public
from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.popularity import DecayedPopularity, PositiveLog, best_popularity
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.eligible import seen_rows


def count_by_hand(users, request, *, upto, half_life, scope):
    """Score of every item for one request, one event at a time."""
    scores = np.zeros(20)
    for events in users.values():
        for event in events:
            if event["timestamp"] > upto or not set(event["outcomes"]) & {"click", "save"}:
                continue
            weight = 2.0 ** (-(upto - event["timestamp"]) / half_life)
            same = scope == "global" or event["surface"] == request["surface"]
            scores[int(event["item_id"][1:])] += weight * (1 if same else 1e-6) + (weight * 1e-6 if same else 0)
    return scores


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("scope", ["global", "surface"])
@pytest.mark.parametrize("half_life", [150.0, math.inf])
def test_counts_as_by_hand(write_dataset, random_users, catalogue, scope, rolling, half_life):
    folder = write_dataset(random_users)
    requests = load_requests(folder, "test", catalogue)
    ranker = DecayedPopularity.fit(folder, catalogue, scope=scope, half_life=half_life, rolling=rolling)
    ranked = np.concatenate([ranker.rank(list(requests.requests[i : i + 16]), 20) for i in range(0, len(requests), 16)])
    for request, rows in zip(requests.requests, ranked, strict=True):
        upto = request["timestamp"] - 1 if rolling else 1999
        scores = count_by_hand(random_users, request, upto=upto, half_life=half_life, scope=scope)
        scores[seen_rows(request, catalogue)] = 0
        kept = rows[rows >= 0]
        assert len(kept) == np.count_nonzero(scores)
        np.testing.assert_allclose(scores[kept], np.sort(scores)[::-1][: len(kept)], rtol=1e-9)


def test_rolling_counts_lag_behind(write_dataset, catalogue):
    events = [{"item_id": "i1", "timestamp": 2100, "outcomes": ["click"], "surface": "feed"}]
    start = [{"item_id": "i9", "timestamp": time, "outcomes": ["click"], "surface": "feed"} for time in (5, 1500)]
    folder = write_dataset({"u": events, "v": start})
    request = {"history": {"item_id": [], "outcomes": []}, "surface": "feed", "timestamp": 2150}
    fit = {"scope": "global", "half_life": 10.0, "rolling": True}
    assert DecayedPopularity.fit(folder, catalogue, **fit).rank([request], 3).tolist() == [[1, 9, -1]]
    on_time = DecayedPopularity.fit(folder, catalogue, history_lag=50, **fit)
    assert on_time.rank([request], 3).tolist() == [[1, 9, -1]]
    late = DecayedPopularity.fit(folder, catalogue, history_lag=51, **fit)
    assert late.rank([request], 3).tolist() == [[9, -1, -1]]
    at_once = {**request, "timestamp": 2100}
    assert DecayedPopularity.fit(folder, catalogue, **fit).rank([at_once], 1).tolist() == [[9]]


def test_outcomes_share_the_list_by_budget(write_dataset, catalogue):
    def many(item, outcome, count):
        return [{"item_id": item, "timestamp": 5, "outcomes": [outcome], "surface": "feed"}] * count

    events = [e for n in range(6) for e in many(f"i{n}", "click", 90 - n)]
    events += [e for n in range(6, 12) for e in many(f"i{n}", "save", 20 - n)] + many("i0", "save", 3)
    late = [{"item_id": "i1", "timestamp": time, "outcomes": ["click"], "surface": "feed"} for time in (1500, 2500)]
    folder = write_dataset({"u": events, "v": late})
    ranker = DecayedPopularity.fit(folder, catalogue, scope="surface_outcome", half_life=math.inf)
    request = {"history": {"item_id": [], "outcomes": []}, "surface": "feed", "timestamp": 2600}
    (rows,) = ranker.rank([request], 8)  # half and half, as in train
    assert sorted(rows) == [0, 1, 2, 3, 6, 7, 8, 9]
    (rows,) = ranker.rank([{**request, "outcome_budget": {"save": 0.25, "click": 0.75}}], 8)
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6, 7]
    (rows,) = ranker.rank([{**request, "outcome_budget": {"save": 1.0}}], 3)
    assert rows.tolist() == [6, 7, 8]
    (unknown,) = ranker.rank([{**request, "surface": None}], 2)
    assert unknown.tolist() == [0, 1]  # all surfaces together: 93 and 91 events


def test_items_out_of_their_time_are_left_out(write_dataset, random_users):
    limits = [None] * 20
    limits[0] = limits[5] = 2200
    catalogue = Catalogue.build([f"i{n}" for n in range(20)], available_until=limits)
    ranker = DecayedPopularity.fit(write_dataset(random_users), catalogue, scope="global")
    request = {"history": {"item_id": [], "outcomes": []}, "surface": "feed"}
    early, late, timeless = ranker.rank([{**request, "timestamp": t} for t in (2100, 2200, None)], 3)
    assert {0, 5} <= set(early)
    assert not {0, 5} & set(late)
    assert (late >= 0).all()
    assert timeless.tolist() == early.tolist()


def test_best_is_chosen_on_validation(write_dataset, random_users, catalogue):
    folder = write_dataset(random_users)
    best = best_popularity(folder, catalogue, k=3, ks=(1, 3), half_lives=(100.0, math.inf), progress=False)
    assert len(best.trials) == 12
    top = max(best.trials, key=lambda trial: trial["recall@3"])
    assert (best.ranker.scope, best.ranker.half_life, best.ranker.rolling) == (
        top["scope"], top["half_life"], top["rolling"])  # fmt: skip
    ranker = DecayedPopularity.fit(
        folder, catalogue, "validation", **{k: top[k] for k in ("scope", "half_life", "rolling")}
    )
    again = evaluate(ranker, load_requests(folder, "validation", catalogue), catalogue, ks=(3,), progress=False)
    assert again.metrics["recall@3"].value == pytest.approx(top["recall@3"])
    assert best.evaluation.split == "test"


def test_frozen_counts_ignore_the_test_days(write_dataset, random_users, catalogue, tmp_path):
    """Poison every event of the test window: what was counted before it stays as it was."""
    log = PositiveLog.read(write_dataset(random_users), catalogue)
    poisoned = {
        user: [e if e["timestamp"] < 2000 else {**e, "item_id": "i19", "outcomes": ["save"]} for e in events]
        for user, events in random_users.items()
    }
    (tmp_path / "data").rename(tmp_path / "clean")
    other = PositiveLog.read(write_dataset(poisoned), catalogue)
    scores = [DecayedPopularity(found, catalogue)._scores for found in (log, other)]
    np.testing.assert_array_equal(*scores)
    assert log.num_before == other.num_before < len(log.time)


def test_leave_one_out_counts_what_comes_before(write_dataset, random_users, catalogue):
    folder = write_dataset(random_users, split={"kind": "leave_one_out"})
    log = PositiveLog.read(folder, catalogue)
    assert log.num_before == len(log.time)
    with pytest.raises(ValueError, match="no common clock"):
        DecayedPopularity(log, catalogue, rolling=True)


def test_bad_settings_are_refused(write_dataset, random_users, catalogue):
    log = PositiveLog.read(write_dataset(random_users), catalogue)
    for wrong, message in (
        ({"scope": "planet"}, "choose one of"),
        ({"half_life": 0.0}, "positive number of seconds"),
        ({"half_life": math.nan}, "positive number of seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            DecayedPopularity(log, catalogue, **wrong)
    request = {"history": {"item_id": [], "outcomes": []}, "surface": "feed", "timestamp": None}
    with pytest.raises(ValueError, match="request 0 has no 'timestamp'"):
        DecayedPopularity(log, catalogue, rolling=True).rank([request], 3)
    with pytest.raises(ValueError, match="split is 'train'"):
        PositiveLog.read("nowhere", catalogue, "train")


def test_figures_on_kuairand(public_data, tmp_path):
    """Known (R@10 / R@50): per surface of the last day .064 / .169, of all time .041 / .138."""
    prepare_public("kuairand", public_data / "kuairand_pure", tmp_path / "kuairand")
    catalogue = build_catalogue(tmp_path / "kuairand")
    requests = load_requests(tmp_path / "kuairand", "test", catalogue)
    log = PositiveLog.read(tmp_path / "kuairand", catalogue)
    last_day = (log.time >= log.start - 86400) & (np.arange(len(log.time)) < log.num_before)
    columns = ("item_row", "surface", "outcome", "time", "first")
    recent = replace(log, num_before=int(last_day.sum()), **{n: getattr(log, n)[last_day] for n in columns})

    def measure(log, **settings):
        ranker = DecayedPopularity(log, catalogue, **settings)
        metrics = evaluate(ranker, requests, catalogue, resamples=2, progress=False).metrics
        return metrics["recall@10"].value, metrics["recall@50"].value

    assert measure(recent, half_life=math.inf) == pytest.approx((0.064, 0.169), abs=0.005)
    assert measure(log, half_life=math.inf, scope="global") == pytest.approx((0.041, 0.138), abs=0.005)
    assert measure(log) == pytest.approx((0.0625, 0.1766), abs=0.001)  # half-life of a day, frozen
    assert measure(log, rolling=True) == pytest.approx((0.0682, 0.1910), abs=0.001)
