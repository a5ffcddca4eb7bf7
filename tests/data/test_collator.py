"""Which event predicts which, under which condition, against which negatives; the same ones however a run is cut."""

import numpy as np
import pytest
import torch

from pinrec_hf.data.collator import IGNORED_LABEL, PretrainingCollator, _one_of
from pinrec_hf.modeling.catalogue_pinrec import ALWAYS, Catalogue
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT, QUERY_EVENT, SUBJECT_EVENT
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

IDS = list("abcdefgh")
SAVE, CLICK = 1, 2
QUIET = {"condition_dropout": 0.0, "time_dropout": 0.0}


def make_tokenizer(**kwargs) -> PinRecTokenizer:
    limits = {"available_from": [100, *[None] * 7], "available_until": [None, 300, *[None] * 6]}
    return PinRecTokenizer(
        catalogue=Catalogue.build(IDS, **limits),
        surfaces=["home", "search"],
        outcomes=["save", "click", "hide"],
        negative_outcomes=["hide"],
        **{"model_max_length": 16, **kwargs},
    )


def collate(histories, tokenizer=None, epoch=0, keys=None, **kwargs):
    tokenizer = tokenizer or make_tokenizer()
    windows = tokenizer.encode(histories)
    for i, window in enumerate(windows):
        window["key"] = np.array([epoch, i if keys is None else keys[i]])
    frequencies = np.arange(len(IDS) + FIRST_ITEM) / 45
    return PretrainingCollator(tokenizer, frequencies, **kwargs)(windows)


def targets(batch, row: int = 0) -> list[tuple[str, int]]:
    """(item, event that it is asked for after) of a row; events count from the start event, which is 0."""
    first = int(batch["attention_mask"][row].argmax())
    found = []
    for label, position in zip(batch["labels"][row].tolist(), batch["target_positions"][row].tolist(), strict=True):
        if label != IGNORED_LABEL:
            found.append((IDS[batch["item_ids"][label] - FIRST_ITEM], position - first))
    return found


HISTORY = {
    "item_id": ["a", "b", "c", "gone", "a", "d", "c"],
    "surface": ["home", "search", None, "home", "home", "home", "home"],
    "timestamp": [None, 200, 210, 220, 230, 240, 250],
    "outcomes": [["save"], ["click", "save"], ["hide"], ["save"], ["click"], ["click"], ["save"]],
    "weight": [1, 2, 1, 1, 1, 3, 1],
}


# -- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_event_predicts_the_positive_event_after_it(side):
    short = {"item_id": ["h"], "outcomes": [["click"]]}
    batch = collate([HISTORY, short], make_tokenizer(padding_side=side), **QUIET)
    # c was hidden, then saved: acted on before, so no target; gone is unknown; the second a is not the first
    assert targets(batch, 0) == [("a", 0), ("b", 1), ("d", 5)]
    assert targets(batch, 1) == [("h", 0)]
    assert batch["target_surfaces"].tolist() == [[1, 2, 1], [0, 0, 0]]
    assert batch["target_timestamps"].tolist() == [[-1, 200, 240], [-1, -1, -1]]
    assert batch["label_timestamps"].tolist() == [[-1, 200, 240], [-1, -1, -1]]
    assert batch["label_weights"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["target_outcomes"][0, 0] == SAVE
    assert batch["target_outcomes"][0, 1] in (SAVE, CLICK)
    assert batch["target_outcomes"][0, 2] == CLICK


def test_a_views_query_or_subject_is_asked_with():
    history = {
        "item_id": ["a", "b", "c"],
        "outcomes": [["save"]] * 3,
        "query": [None, "sofa", None],
        "context_item_id": [None, None, "h"],
        "request_id": [0, 1, 2],
    }
    batch = collate([history])
    assert targets(batch) == [("a", 0), ("b", 2), ("c", 4)]
    assert batch["event_types"][0, batch["target_positions"][0]].tolist() == [0, QUERY_EVENT, SUBJECT_EVENT]


LONG = {
    "item_id": list("abcdefgh"),
    "surface": ["home", "home", "search", "search", "search", "home", None, "home"],
    "timestamp": [100, 110, 200, 230, 290, 400, 500, None],
    "outcomes": [["save"], ["save"], ["click"], ["save"], ["click"], ["hide"], ["save"], ["save"]],
    "request_id": [0, 0, 1, 1, 1, 2, 2, 3],
}


def test_a_window_predicts_one_of_the_next_positives():
    found: dict[str, set[str]] = {}
    for epoch in range(60):
        batch = collate([LONG], epoch=epoch, target="window", target_window=3, **QUIET)
        events = [0, 1, 2, 3, 4, 6, 7]  # after which a positive event comes next: f was hidden
        assert [place for _, place in targets(batch)] == events
        for item, place in targets(batch):
            found.setdefault("abcdefgh"[place], set()).add(item)
    # by the item that comes next
    assert found == {
        "a": {"a", "b", "c"}, "b": {"b", "c", "d"}, "c": {"c", "d", "e"}, "d": {"d", "e", "g"}, "e": {"e", "g", "h"},
        "g": {"g", "h"}, "h": {"h"},
    }  # fmt: skip


def test_a_window_asks_at_the_next_request_for_what_comes_after_it():
    for epoch in range(20):
        batch = collate([LONG], epoch=epoch, target="window", target_window=3, **QUIET)
        for column, (item, place) in enumerate(targets(batch)):
            asked, wanted = LONG["timestamp"][place], LONG["timestamp"]["abcdefgh".index(item)]
            assert batch["target_timestamps"][0, column] == (-1 if asked is None else asked)
            known = asked is not None and wanted is not None
            assert batch["target_offsets"][0, column] == (wanted - asked if known else -1)
            assert batch["target_surfaces"][0, column] == [1, 1, 2, 2, 2, 1, 0, 1]["abcdefgh".index(item)]


def test_a_session_offers_all_of_the_feed_view():
    batch = collate([LONG], target="session", target_window=8, condition_dropout=1.0, time_dropout=0.0)
    assert targets(batch) == [
        ("a", 0), ("b", 0), ("b", 1), ("c", 2), ("d", 2), ("e", 2), ("d", 3), ("e", 3), ("e", 4), ("g", 6), ("h", 7),
    ]  # fmt: skip
    assert batch["label_groups"][0].tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 6]
    two = collate([LONG], target="session", target_window=2, condition_dropout=1.0, time_dropout=0.0)
    assert targets(two)[2:6] == [("b", 1), ("c", 2), ("d", 2), ("d", 3)]


def test_what_competes_in_a_session_shares_its_condition():
    batch = collate([LONG], target="session", **QUIET | {"time_dropout": 0.5})
    names = ("target_positions", "target_outcomes", "target_timestamps", "target_offsets")
    shared: dict[int, set] = {}
    for group, *condition in zip(*(batch[name][0].tolist() for name in ("label_groups", *names)), strict=True):
        shared.setdefault(group, set()).add(tuple(condition))
    assert max(len([c for c in batch["label_groups"][0].tolist() if c == group]) for group in shared) > 1
    assert all(len(conditions) == 1 for conditions in shared.values())


def test_an_item_ignored_and_later_clicked_is_a_target():
    history = {"item_id": ["a", "b", "a"], "outcomes": [[], ["save"], ["click"]]}
    assert targets(collate([history])) == [("b", 0), ("a", 1)]
    assert targets(collate([history], make_tokenizer(keep_ignored=True))) == [("b", 1), ("a", 2)]
    # it was acted on, if nobody knows how, and so is offered to nobody again
    history["outcomes"][0] = None
    assert targets(collate([history])) == [("b", 1)]


def test_a_user_without_targets():
    batch = collate([{"item_id": ["a", "gone"], "outcomes": [["hide"], ["save"]]}, HISTORY])
    assert targets(batch, 0) == []
    assert (batch["labels"][0] == IGNORED_LABEL).all()
    alone = collate([{"item_id": ["a"], "outcomes": [["hide"]]}])
    assert alone["labels"].shape == (1, 0)


def test_a_long_window_is_cut_as_the_batch_is():
    ids = ["a", "b", "c", "d", "e", "f", "g", "h"]
    batch = collate([{"item_id": ids, "outcomes": [["save"]] * 8}], make_tokenizer(model_max_length=5))
    assert targets(batch) == [("e", 0), ("f", 1), ("g", 2), ("h", 3)]
    items = batch["item_ids"][batch["event_items"]][0]
    assert items.tolist() == [0, *(ids.index(i) + FIRST_ITEM for i in "efgh")]


@torch.no_grad()
def test_a_target_is_not_seen_by_its_prediction(model, tokenizer):
    """Changing a target changes no embedding that is asked for it, only later ones."""
    history = {
        "item_id": ["p1", "p2", "p3", "p4"],
        "outcomes": [["save"], ["click"], ["save"], ["click", "save"]],
        "timestamp": [1_700_000_000 + 60 * i for i in range(4)],
        "surface": ["homefeed", "search", "related", "homefeed"],
        "query": [None, "rug", None, None],
    }
    other = history | {"item_id": ["p1", "p2", "p9", "p4"]}
    embeddings = []
    for h in (history, other):
        (window,) = tokenizer.encode([h])
        window["key"] = np.array([0, 0])
        batch = PretrainingCollator(tokenizer, np.ones(62) / 60)([window])
        embeddings.append(model(**batch).embeddings[0])
    same = torch.isclose(*embeddings, atol=1e-6).all(-1)
    assert same.tolist() == [True, True, True, False]


# -- conditions --------------------------------------------------------------------------------------------------


def many(**kwargs):
    """400 users who saved and clicked one item."""
    return collate([{"item_id": ["a"], "outcomes": [["save", "click"]], "timestamp": [150]}] * 400, **kwargs)


def test_conditions_are_the_targets_own_outcomes_and_sometimes_none():
    shares = np.bincount(many(condition_dropout=0.2)["target_outcomes"].flatten(), minlength=4) / 400
    assert shares == pytest.approx([0.2, 0.4, 0.4, 0], abs=0.08)
    assert not many(condition_dropout=1.0)["target_outcomes"].any()


def test_request_times_are_sometimes_hidden_from_the_model_but_not_from_the_pool():
    batch = many(time_dropout=0.25)
    hidden = batch["target_timestamps"] == -1
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert (batch["target_timestamps"][~hidden] == 150).all()
    assert (batch["label_timestamps"] == 150).all()
    assert (many(time_dropout=1.0)["target_timestamps"] == -1).all()


def test_one_of():
    draws = np.array([0.0, 0.49, 0.5, 0.999, 0.0, 0.999])
    sets = np.array([0b0110, 0b0110, 0b0110, 0b0110, 0b1000, 1 << 62])
    assert _one_of(sets, draws).tolist() == [1, 1, 2, 2, 3, 62]


def test_recency():
    batch = collate([HISTORY], recency_half_life=20.0, first_time=200, last_time=260)
    # of unknown time (as the oldest, weight 1), 60 s old (weight 2), 20 s old (weight 3)
    assert batch["label_weights"][0].tolist() == pytest.approx([0.5**3, 2 * 0.5**3, 3 * 0.5])


def test_request_features():
    history = HISTORY | {"request_features": [["device=ios"], ["device=web"], *[[]] * 5]}
    reads = make_tokenizer(request_features=True)
    codes = collate([history], reads)["target_features"]
    asked = reads([{}, {}], request_features=[["device=ios"], ["device=web"]])["target_features"]
    assert codes.tolist() == [[*asked[:, 0].tolist(), 0]]
    assert "target_features" not in collate([history])


# -- negatives ---------------------------------------------------------------------------------------------------


def test_uniform_negatives():
    batch = collate([HISTORY] * 50, uniform_negatives=40)
    counts = batch["negative_counts"]
    assert counts.sum() == 50 * 40
    assert not counts[:FIRST_ITEM].any()
    assert batch["item_ids"].tolist() == list(range(len(IDS) + FIRST_ITEM))
    assert counts[FIRST_ITEM:].numpy() == pytest.approx(np.full(8, 250), abs=60)


def test_without_uniform_negatives_the_pool_is_the_batch():
    batch = collate([{"item_id": ["a", "gone"], "outcomes": [["save"]] * 2}], uniform_negatives=0)
    assert batch["item_ids"].tolist() == [0, 1, 2]
    assert not batch["negative_counts"].any()


def test_the_full_softmax_holds_the_catalogue():
    batch = collate([{"item_id": ["a"], "outcomes": [["save"]]}], full_softmax=True)
    assert batch["item_ids"].tolist() == list(range(len(IDS) + FIRST_ITEM))
    assert "negative_counts" not in batch


def test_facts_of_the_item_table():
    batch = collate([{"item_id": ["b", "a", "gone"], "outcomes": [["save"]] * 3}], uniform_negatives=0)
    assert batch["item_ids"].tolist() == [0, 1, 2, 3]
    assert batch["item_frequencies"].tolist() == pytest.approx([0, 1 / 45, 2 / 45, 3 / 45])
    assert batch["item_availability"].tolist() == [list(ALWAYS), list(ALWAYS), [100, ALWAYS[1]], [ALWAYS[0], 300]]
    endless = PinRecTokenizer(catalogue=Catalogue.build(IDS), outcomes=["save"])
    assert "item_availability" not in collate([{"item_id": ["a"]}], endless)


def test_choices_are_keyed_by_seed_epoch_and_window():
    """A resumed run, or one on more processes, draws the same: nothing comes from a global generator."""
    together = collate([HISTORY] * 3)
    np.random.seed(5)
    torch.manual_seed(5)
    again = collate([HISTORY] * 3)
    assert all(torch.equal(together[name], again[name]) for name in together)
    alone = [collate([HISTORY], keys=[i]) for i in range(3)]
    for name in ("target_outcomes", "target_timestamps"):
        assert torch.equal(torch.cat([batch[name] for batch in alone]), together[name]), name
    drawn = torch.zeros(len(IDS) + FIRST_ITEM)
    for batch in alone:
        drawn[batch["item_ids"]] += batch["negative_counts"]
    assert torch.equal(drawn[together["item_ids"]], together["negative_counts"])
    for other in ({"epoch": 1}, {"seed": 1}):
        changed = collate([HISTORY] * 3, **other)
        assert changed["negative_counts"].tolist() != together["negative_counts"].tolist()


def test_dtypes_and_what_the_events_are():
    batch = collate([HISTORY])
    floats = {"label_weights", "item_frequencies", "negative_counts"}
    assert {name for name, value in batch.items() if value.dtype == torch.float32} == floats
    assert all(value.dtype == torch.int64 for name, value in batch.items() if name not in floats)
    assert batch["event_types"][0].tolist() == [0, *[ITEM_EVENT] * 7]
