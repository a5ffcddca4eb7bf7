"""Requests see what came strictly before, targets are counted once, and nothing later leaks in."""

import copy

import numpy as np
import pyarrow as pa
import pytest

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.evaluation.protocol import Requests, load_requests, only_surfaces, only_targets, requests_from_rows
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.eligible import seen_rows


def event(item, time, *outcomes, **more):
    return {"item_id": item, "timestamp": time, "outcomes": list(outcomes), **more}


def history_items(request):
    return request["history"]["item_id"]


def test_history_is_strictly_earlier_and_unknown_times_come_first(table, catalogue):
    rows = table(
        [("u", 3, [event("i0", None, "click"), event("i1", 10, "click"), event("i2", 20),
                   event("i3", 30, "click"), event("i4", 30, "save"), event("i5", 40, "save", "click")])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue)
    assert [history_items(request) for request in found.requests] == [
        ["i0", "i1", "i2"],
        ["i0", "i1", "i2", "i3", "i4"],
    ]
    assert [request["timestamp"] for request in found.requests] == [30, 40]
    assert found.request_index.tolist() == [0, 0, 1]  # targets of one time share a request
    assert found.item_row.tolist() == [3, 4, 5]
    assert found.outcomes == [["click"], ["save"], ["save", "click"]]
    assert found.history_length.tolist() == [2, 2, 4]  # the ignored i2 does not count
    first = found.requests[0]
    assert first["user_id"] == "u"
    assert first["surface"] == "feed"
    assert first["history"]["timestamp"] == [None, 10, 20]
    assert first["history"]["outcomes"] == [["click"], ["click"], []]


def test_surfaces_and_queries_part_requests(table, catalogue):
    rows = table(
        [("u", 0, [event("i1", 30, "click"), event("i2", 30, "click", surface="search", query="sofa"),
                   event("i3", 30, "click", surface="search", query="lamp"),
                   event("i4", 30, "click", surface=None)])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue)
    asked = {
        int(row): (found.requests[i]["surface"], found.requests[i].get("query"))
        for i, row in zip(found.request_index, found.item_row, strict=True)
    }
    assert asked == {1: ("feed", None), 2: ("search", "sofa"), 3: ("search", "lamp"), 4: (None, None)}


def test_a_query_event_gives_its_view_the_query(table, catalogue):
    rows = table(
        [("u", 0, [event(None, 10, query="old", request_id=0), event(None, 20, query="sofa", request_id=1),
                   event("i1", 20, "click", request_id=1), event("i2", 25, "click", request_id=1),
                   event(None, 26, query="later", request_id=1), event("i3", 30, "click", request_id=2)])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue)
    assert [request.get("query") for request in found.requests] == ["sofa", "sofa", None]
    # the query event of the same moment is no history, the earlier one stays in
    assert found.requests[0]["history"]["query"] == ["old"]
    assert history_items(found.requests[1]) == [None, None, "i1"]
    assert found.history_length.tolist() == [1, 3, 5]


def test_targets_that_drop_out_are_counted_by_reason(table, catalogue):
    rows = table(
        [("u", 2, [event("i1", 10, "click"), event("i2", 10, "hide"),
                   event("i1", 20, "save"),            # seen: clicked before
                   event("i2", 20, "click"),           # seen: hidden before
                   event("elsewhere", 20, "click"),    # not in the catalogue
                   event("i3", 20),                    # ignored: no target, and not seen
                   event("i4", 20, "hide"),            # negative: no target
                   event("i3", 30, "click"), event("i3", 30, "save"),  # twice at once
                   event("i3", 40, "save")])]          # seen: a target before
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue, negative_outcomes=["hide"])
    assert found.item_row.tolist() == [3]
    assert found.outcomes == [["click"]]
    assert found.dropped == {"unknown_item": 1, "seen_before": 3, "repeated": 1}


def test_a_negative_outcome_beside_a_positive_one_is_no_label(table, catalogue):
    rows = table([("u", 0, [event("i1", 10, "hide", "click")])])
    assert requests_from_rows(rows, catalogue, negative_outcomes=["hide"]).outcomes == [["click"]]


def test_lag_hides_what_is_new_and_keeps_the_targets(table, catalogue):
    rows = table(
        [("u", 3, [event("i0", None, "click"), event("i1", 10, "click"), event("i2", 90, "click"),
                   event("i3", 100, "click"), event("i2", 110, "save")])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue, history_lag=10)
    assert history_items(found.requests[0]) == ["i0", "i1", "i2"]
    assert history_items(requests_from_rows(rows, catalogue, history_lag=11).requests[0]) == ["i0", "i1"]
    assert found.item_row.tolist() == [3]
    assert found.dropped["seen_before"] == 1  # also where the lag hides it


def test_leave_one_out_goes_by_order_not_time(table, catalogue):
    rows = table(
        [("u", 2, [event("i1", 10, "click"), event("i2", 20, "click"), event("i3", 20, "click")]),
         ("v", 1, [event("i1", None, "click"), event("i2", None, "click")]),
         ("w", 1, [event("i1", 5, "click"), event("i1", 5, "save")])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue, leave_one_out=True)
    assert [history_items(request) for request in found.requests] == [["i1", "i2"], ["i1"]]
    assert [request["timestamp"] for request in found.requests] == [20, None]
    assert found.dropped["seen_before"] == 1


def test_leave_one_out_asks_once_for_all_of_a_users_targets(table, catalogue):
    rows = table(
        [("u", 1, [event("i1", 10, "click"), event("i2", 20, "click", surface="feed"),
                   event("i3", 90, "save", surface="search"), event("i2", 95, "save")]),
         ("v", 2, [event("i1", 10, "click"), event("i2", 12, "click"), event("i4", 20, "click")])]
    )  # fmt: skip
    found = requests_from_rows(rows, catalogue, leave_one_out=True)
    assert [(r["user_id"], r["timestamp"], r["surface"]) for r in found.requests] == [
        ("u", 20, "feed"),
        ("v", 20, "feed"),
    ]
    assert [history_items(request) for request in found.requests] == [["i1"], ["i1", "i2"]]
    assert found.request_index.tolist() == [0, 0, 1]
    assert found.item_row.tolist() == [2, 3, 4]
    assert found.surface == ["feed", "search", "feed"]
    assert found.dropped["seen_before"] == 1
    lagging = requests_from_rows(rows, catalogue, leave_one_out=True, history_lag=9)
    assert [history_items(request) for request in lagging.requests] == [["i1"], ["i1"]]


def test_integer_ids_and_a_last_user_without_events(table):
    rows = table([("u", 1, [event("1", 1, "click"), event("2", 2, "click")]), ("v", 0, [])])
    ids = pa.chunked_array([[[1, 2], []]], type=pa.list_(pa.int64()))
    rows = rows.set_column(rows.column_names.index("item_id"), "item_id", ids)
    found = requests_from_rows(rows, Catalogue.build([2, 1]))
    assert found.item_row.tolist() == [0]
    assert history_items(found.requests[0]) == [1]


def test_a_target_of_unknown_time_sees_what_comes_before_it(table, catalogue):
    rows = table([("u", 0, [event("i1", None, "click"), event("i2", None, "click")])])
    found = requests_from_rows(rows, catalogue)
    assert [history_items(request) for request in found.requests] == [[], ["i1"]]


def test_no_rows_no_requests(table, catalogue):
    found = requests_from_rows(table([("u", 1, [event("i1", 1, "click")])]), catalogue)
    assert len(found) == 0
    assert list(found.requests) == []


def test_seen_is_acted_on_either_way(catalogue):
    history = {"item_id": ["i5", "i1", None, "i2", "gone", "i5"],
               "outcomes": [["hide"], ["click"], [], [], ["click"], ["save"]]}  # fmt: skip
    assert seen_rows({"history": history}, catalogue).tolist() == [1, 5]
    assert seen_rows({"history": {"item_id": [], "outcomes": []}}, catalogue).dtype == np.int64


def test_load_requests_reads_a_dataset(write_dataset, random_users, catalogue):
    folder = write_dataset(random_users)
    found = load_requests(folder, "test", catalogue)
    assert len(found) > 50
    assert found.split == "test"
    train = [e for events in random_users.values() for e in events if e["timestamp"] < 1000]
    positives = [e["item_id"] for e in train if set(e["outcomes"]) & {"click", "save"}]
    assert found.item_counts[3] == positives.count("i3") > 0
    assert found.item_counts.sum() == len(positives)
    for request, row in zip(found.request_index, found.item_row, strict=True):
        asked = found.requests[int(request)]
        assert 2000 <= asked["timestamp"] < 3000
        assert row not in seen_rows(asked, catalogue)
        assert max(asked["history"]["timestamp"], default=0) < asked["timestamp"]
    some = load_requests(folder, "test", catalogue, max_users=5, seed=1)
    assert len(set(some.user)) <= 5
    whole = {(r["user_id"], r["timestamp"], r["surface"]): r for r in found.requests}
    assert [whole[r["user_id"], r["timestamp"], r["surface"]] for r in some.requests] == list(some.requests)


def test_names_that_train_lacks_are_unknown_to_requests(write_dataset, catalogue):
    users = {"u": [event("i1", 10, "click"), event("i2", 2100, "click", "gift", surface="new"),
                   event("i3", 2200, "gift", surface="new"), event("i4", 2300, "click")]}  # fmt: skip
    found = load_requests(write_dataset(users), "test", catalogue)
    assert [request["surface"] for request in found.requests] == [None, None, "feed"]
    assert found.surface == ["new", "new", "feed"]
    assert found.outcomes == [["click", "gift"], ["gift"], ["click"]]
    assert found.requests[2]["history"]["surface"] == ["feed", None, None]
    assert found.requests[2]["history"]["outcomes"] == [["click"], ["click", None], [None]]


def test_errors_teach(write_dataset, table, catalogue, tmp_path):
    folder = write_dataset({"u": [event("i1", 10, "click"), event("i2", 20, "click")]})
    with pytest.raises(ValueError, match=r"'holdout' has no parquet files.*train"):
        load_requests(folder, "holdout", catalogue)
    with pytest.raises(ValueError, match=r"'test'.*has no targets"):
        load_requests(folder, "test", catalogue)
    with pytest.raises(ValueError, match="history_lag is -1"):
        load_requests(folder, "test", catalogue, history_lag=-1)
    rows = table([("u", 0, [event("i1", 10, "click"), event("i2", 20, "click")])])
    with pytest.raises(ValueError, match=r"row 0.*not in the order"):
        requests_from_rows(table([("u", 0, [event("i1", 20, "click"), event("i2", 10, "click")])]), catalogue)
    shorter = rows.set_column(2, "surface", pa.array([["feed"]]))
    with pytest.raises(ValueError, match="'surface' holds 1 entries and 'item_id' 2"):
        requests_from_rows(shorter, catalogue)


@pytest.mark.parametrize("lag", [0, 7])
def test_canary_nothing_at_or_after_a_target_changes_its_request(table, catalogue, lag):
    """Poison everything from a target's time on: the request must stay as it was, to the last value."""
    rng = np.random.default_rng(lag)
    checked = 0
    for _ in range(60):
        size = int(rng.integers(3, 12))
        times = [None, None, *np.sort(rng.integers(0, 30, size=size - 2)).tolist()]
        events = []
        for time in times:
            is_query = rng.random() < 0.2
            events.append(
                event(
                    None if is_query else f"i{rng.integers(20)}",
                    time,
                    *([] if is_query or rng.random() < 0.3 else ["click"]),
                    surface=str(rng.choice(["feed", "search"])),
                    query=str(rng.choice(["sofa", "lamp"])) if is_query else None,
                    request_id=int(rng.integers(3)),
                )
            )
        before = requests_from_rows(table([("u", 2, events)]), catalogue, history_lag=lag)
        for index, row in zip(before.request_index.tolist(), before.item_row.tolist(), strict=True):
            request = before.requests[index]
            time, item = request["timestamp"], f"i{row}"
            target = next(e for e in events if (e["item_id"], e["timestamp"]) == (item, time) and e["outcomes"])
            poisoned = copy.deepcopy(events)
            for old, new in zip(events, poisoned, strict=True):
                asks = old["item_id"] is None and old["timestamp"] is not None and old["timestamp"] <= time
                late = old["timestamp"] is not None and old["timestamp"] > time - max(1, lag)
                if late and old is not target and not asks:  # what was asked for is the request's own
                    new.update(item_id="i19" if row != 19 else "i18", outcomes=["save"], surface="search")
            poisoned += [
                event("i0", 31, "click"),
                event(None, 32, query="poison", request_id=target["request_id"]),
            ]
            after = requests_from_rows(table([("u", 2, poisoned)]), catalogue, history_lag=lag)
            again = after.request_index[(after.item_row == row)].tolist()
            assert request in [after.requests[i] for i in again]
            checked += 1
    assert checked > 100


def test_requests_of_a_prepared_log(tiny_data):
    found = load_requests(tiny_data, "test", build_catalogue(tiny_data))
    assert found.dropped["unknown_item"] > 0
    assert {request["surface"] for request in found.requests} >= {"homefeed", "search", "related"}
    for request in found.requests:
        assert ("query" in request) == (request["surface"] == "search") or request["surface"] is None
        assert ("context_item_id" in request) == (request["surface"] == "related") or request["surface"] is None
        assert {name.split("=")[0] for name in request["request_features"]} == {"device", "day"}
        times = [time for time in request["history"]["timestamp"] if time is not None]
        assert times == sorted(times)
        assert max(times, default=0) < request["timestamp"]


def test_users_are_drawn_among_those_of_the_surface(tiny_data):
    catalogue = build_catalogue(tiny_data)
    whole = only_surfaces(load_requests(tiny_data, "test", catalogue), "search")
    assert list(load_requests(tiny_data, "test", catalogue, surface="search").requests) == list(whole.requests)
    some = load_requests(tiny_data, "test", catalogue, surface="search", max_users=4, seed=3)
    assert 1 <= len(set(some.user)) <= 4
    assert {r["surface"] for r in some.requests} == {"search"}
    assert all(request in list(whole.requests) for request in some.requests)
    with pytest.raises(ValueError, match="has no targets on surface 'shop'"):
        load_requests(tiny_data, "test", catalogue, surface="shop")


def test_some_targets_keep_their_requests_and_columns():
    history = {"item_id": ["a"], "outcomes": [["save"]], "surface": ["home"], "timestamp": [1]}
    requests = Requests(
        requests=[{"history": history, "user_id": name} for name in "pqr"],
        request_index=np.array([0, 0, 1, 2]), item_row=np.array([4, 5, 6, 7]), user=np.array([0, 0, 1, 2]),
        surface=["home", "home", "search", "home"], outcomes=[["save"], ["click"], ["save"], ["hide"]],
        history_length=np.array([1, 2, 3, 4]), item_counts=np.zeros(8, np.int64), dropped={}, split="test",
    )  # fmt: skip
    some = only_targets(requests, np.array([False, True, False, True]))
    assert [request["user_id"] for request in some.requests] == ["p", "r"]
    assert some.request_index.tolist() == [0, 1]
    assert some.item_row.tolist() == [5, 7]
    assert (some.surface, some.outcomes) == (["home", "home"], [["click"], ["hide"]])
    assert some.history_length.tolist() == [2, 4]
