"""Feed views become targets: all of a view from its request, against what was ignored beside them, and nothing else."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinrec_hf.data.collator import IGNORED_LABEL, FinetuningCollator
from pinrec_hf.data.views import TARGET_COLUMNS, ViewDataset, encode_views, view_windows
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, QUERY_EVENT, SUBJECT_EVENT, PinRecConfig
from pinrec_hf.modeling.events_pinrec import EVENT_COLUMNS
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

IDS = list("abcdefgh")
SAVE, CLICK, HIDE = 0b010, 0b100, 0b1000
TOKENIZER = PinRecTokenizer(
    catalogue=Catalogue.build(IDS),
    surfaces=["home", "search"],
    outcomes=["save", "click", "hide"],
    negative_outcomes=["hide"],
    keep_ignored=True,
    model_max_length=16,
)


def windows_of(*histories, surface=None, window=15) -> list[dict]:
    rows = TOKENIZER.encode(histories)
    columns = {
        name: pa.array([row[name] for row in rows], pa.list_(pa.from_numpy_dtype(kind)))
        for name, kind in EVENT_COLUMNS.items()
    }
    table = pa.table({name: pa.chunked_array([column]) for name, column in columns.items()})
    made = view_windows(table, window, TOKENIZER.positive_mask, surface)
    assert set(made.column_names) == {*EVENT_COLUMNS, *TARGET_COLUMNS, "hard_items"}
    return made.to_pylist()


def names(codes) -> str:
    return "".join(IDS[code - FIRST_ITEM] if code >= FIRST_ITEM else "?" for code in codes)


def found(window: dict) -> list[tuple[str, int, str]]:
    """(item, events before its request, its hard negatives) of each target."""
    ends = np.cumsum(window["hard_counts"]).tolist()
    hard = [names(window["hard_items"][start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return list(zip(names(window["target_items"]), window["target_events"], hard, strict=True))


def history(text: str, **columns) -> dict:
    """`"a+ b. | c!"`: saved, ignored, a new view, hidden; `*` clicked, `?` an outcome that nobody knows."""
    outcomes = {"+": ["save"], "*": ["click"], ".": [], "!": ["hide"], "?": ["poke"]}
    views = [view.split() for view in text.split("|")]
    events = [(event, number) for number, view in enumerate(views) for event in view]
    made = {
        "item_id": [event[0] for event, _ in events],
        "outcomes": [outcomes[event[1]] for event, _ in events],
        "request_id": [number for _, number in events],
        "timestamp": [100 * number + place for place, (_, number) in enumerate(events)],
        "surface": ["home"] * len(events),
    }
    return made | columns


def test_what_an_ignored_view_was_about_is_in_no_history():
    queries = ["sofa", None, None]
    (window,) = windows_of(history("a. | b+ | c+", query=queries))
    assert QUERY_EVENT not in window["types"]
    (window,) = windows_of(history("a+ | b+ | c+", query=queries))
    assert window["types"].count(QUERY_EVENT) == 1


def test_what_a_view_was_about_enters_no_history_before_its_first_reaction():
    """The item of a view about g is saved late, when two other views have begun: they saw nothing of it."""
    late = history("a. | b+ | c+", context_item_id=["g", None, None])
    late["item_id"] += ["a", "d"]
    late["outcomes"] += [["save"], ["save"]]
    late["request_id"] += [0, 3]
    late["surface"] += ["home"] * 2
    late["timestamp"] += [900, 950]
    late["context_item_id"] += ["g", None]
    after, before = windows_of(late)
    assert found(after) == [("b", 0, ""), ("c", 1, ""), ("d", 4, "")]
    assert names(after["items"]) == "bcga"  # as in the history of a request that comes after the save
    assert (names(before["items"]), before["types"], found(before)) == ("g", [SUBJECT_EVENT], [("a", 1, "")])
    (encoded,) = TOKENIZER.encode([{name: values[:-1] for name, values in late.items()}])
    assert names(encoded["items"]) == "gabcga"  # the ignored impression is kept here, with what it was about


def test_what_a_view_was_about_stands_once_where_only_ignored_ones_come_between():
    asked = history("a+ | b. | c+ | d+", context_item_id=["g", "h", "g", None])
    asked["request_id"] = [0, 1, 0, 2]
    (window,) = windows_of(asked)
    assert names(window["items"]) == "gac"


# -- targets -----------------------------------------------------------------------------------------------------


def test_all_targets_of_a_view_are_predicted_from_its_request():
    (window,) = windows_of(history("a+ b. | c. d+ e* f! | g* | h."))
    assert found(window) == [("a", 0, "b"), ("d", 1, "c"), ("e", 1, "c"), ("g", 4, "")]
    # history ends where the last view with a target begins, and holds nothing that was ignored
    assert names(window["items"]) == "adef"
    assert window["target_outcomes"] == [SAVE, SAVE, CLICK, CLICK]
    assert window["target_timestamps"] == [0, 102, 102, 206]  # of the view, not of the item
    assert window["target_offsets"] == [0, 1, 2, 0]  # the view began with c, at 102
    assert window["target_surfaces"] == [1] * 4


def test_items_acted_on_before_the_view_are_no_targets():
    (window,) = windows_of(history("a! b. | a+ b+ c? | c* | b*"))
    assert found(window) == [("b", 1, "")]  # nor after an outcome that nobody knows, see `seen_rows`


def test_outcomes_of_one_item_in_a_view_are_one_target():
    """A late save is an event of its own in its view; other views lie between."""
    late = history("a. b* | c+ | d+")
    late["item_id"] += ["a", "b"]
    late["outcomes"] += [["save"], ["save"]]
    late["request_id"] += [0, 0]
    late["surface"] += ["home"] * 2
    late["timestamp"] += [900, 900]
    (window,) = windows_of(late)
    assert found(window) == [("a", 0, ""), ("b", 0, ""), ("c", 1, ""), ("d", 2, "")]
    assert window["target_outcomes"] == [SAVE, SAVE | CLICK, SAVE, SAVE]


def test_a_views_query_or_subject_is_its_position():
    asked = history("a+ | b. c+ | d. e. | f+", query=[None, "sofa", "sofa", None, None, None])
    asked["context_item_id"] = [None, None, None, "h", "h", "g"]
    (window,) = windows_of(asked)
    assert found(window) == [("a", 0, ""), ("c", 2, "b"), ("f", 4, "")]
    # the subject of a view in which nothing was acted on is no event, as in a request's history
    assert window["types"] == [1, QUERY_EVENT, 1, SUBJECT_EVENT]


def test_a_query_event_of_the_log_is_its_views_position():
    asked = history("q. b+ c+", query=["sofa"] * 3)
    asked["item_id"][0] = None
    (window,) = windows_of(asked)
    assert found(window) == [("b", 1, ""), ("c", 1, "")]
    assert window["types"] == [QUERY_EVENT]
    assert window["target_timestamps"] == [0, 0]


def test_only_windows_with_a_target_on_the_surface_are_rows():
    mixed = history("a+ | b+ c. | d+", surface=["home", "search", "search", "home"])
    windows = windows_of(mixed, history("e+"), history("f. g!"), surface=TOKENIZER.surface_code("search"))
    assert [found(window) for window in windows] == [[("b", 1, "c")]]
    assert names(windows[0]["items"]) == "a"
    assert windows_of(history("a. b!")) == windows_of() == []


def test_windows_end_where_a_view_begins():
    windows = windows_of(history("a+ | b+ | c+ | d+ | e+ f+ | g."), window=2)
    assert [(names(window["items"]), found(window)) for window in windows] == [
        ("cd", [("d", 1, ""), ("e", 2, ""), ("f", 2, "")]),
        ("ab", [("b", 1, ""), ("c", 2, "")]),
        ("", [("a", 0, "")]),
    ]


def test_unknown_views_are_alone():
    lone = history("a+ b+ c.", request_id=[None] * 3)
    assert found(windows_of(lone)[0]) == [("a", 0, ""), ("b", 1, "")]


# -- hard negatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "hard"),
    [([0, 1, 2, 3], "ac"), ([2, 3, 0, 9], "ac"), ([5, 1, 2, 3], "c"), ([None] * 4, "acd"), ([None, 1, None, 9], "ac")],
)
def test_only_impressions_above_the_last_one_acted_on(positions, hard):
    shown = history("a. b+ c. d.", position=positions)
    if positions[1] == 1 and positions[2] == 2:
        shown["outcomes"][2] = ["hide"]  # the last one acted on, either way
        hard = hard.replace("c", "")
    assert found(windows_of(shown)[0]) == [("b", 0, hard)]


def test_what_was_acted_on_in_the_view_is_no_hard_negative():
    (window,) = windows_of(history("a. b+ a! c. c. d? gone.".replace("gone", "z")))
    assert found(window) == [("b", 0, "c")]


# -- against a reference -----------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.sampled_from("abcdez"), st.sampled_from("+*.!?"), st.integers(0, 3), st.sampled_from(["home", "search"])
    ),
    max_size=14,
)


def row_of(events) -> dict:
    return {
        "item_id": [item for item, *_ in events],
        "outcomes": history(" ".join(item + sign for item, sign, *_ in events))["outcomes"],
        "request_id": [view for *_, view, _ in events],
        "surface": [surface for *_, surface in events],
        "timestamp": list(range(len(events))),
    }


def reference(events, surface) -> set:
    """The definition, in loops: {(view, item, outcomes, history, hard negatives)}."""
    targets = set()
    for view in range(4):
        inside = [i for i, event in enumerate(events) if event[2] == view]
        if not inside:
            continue
        before = [event for event in events[: inside[0]] if event[1] != "."]
        acted = {event[0] for event in before if event[1] in "+*!?"}
        reacted = {events[i][0] for i in inside if events[i][1] != "."}
        hard = "".join(sorted({events[i][0] for i in inside} - reacted - {"z"}))
        for item in set("abcde") - acted:
            signs = {events[i][1] for i in inside if events[i][0] == item and events[i][3] == surface} & set("+*")
            if signs:
                past = "".join(event[0] for event in before).replace("z", "?")
                targets.add((item, "".join(sorted(signs)), past, hard))
    return targets


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=3))
def test_targets_and_hard_negatives_are_those_of_the_definition(users):
    windows = windows_of(*map(row_of, users), surface=2)
    made = set()
    for window in windows:
        for (item, before, hard), outcomes in zip(found(window), window["target_outcomes"], strict=True):
            signs = "".join(sign for sign, bit in (("*", CLICK), ("+", SAVE)) if outcomes & bit)
            made.add((item, signs, names(window["items"][:before]), hard))
    assert made == set().union(*(reference(events, "search") for events in users))


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 3))
def test_short_windows_hold_the_same_targets(events, window):
    whole, cut = windows_of(row_of(events)), windows_of(row_of(events), window=window)
    assert sorted(t for w in cut for t in w["target_items"]) == sorted(t for w in whole for t in w["target_items"])
    past = {(item, names(whole[0]["items"][:before])) for w in whole for item, before, _ in found(w)}
    for part in cut:
        assert len(part["items"]) <= window
        for item, before, _ in found(part):
            assert before > 0 or (item, "") in past
            assert any(item == i and p.endswith(names(part["items"][:before])) for i, p in past)


# -- rows of a view never see each other -------------------------------------------------------------------------


def collate(windows: list[dict], **kwargs):
    kinds = {**EVENT_COLUMNS, **TARGET_COLUMNS, "hard_items": np.int64}
    rows = [{name: np.asarray(values, kinds[name]) for name, values in window.items()} for window in windows]
    for i, row in enumerate(rows):
        row["key"] = np.array([0, i])
    quiet = {"condition_dropout": 1.0, "time_dropout": 0.0, "uniform_negatives": 4}
    return FinetuningCollator(TOKENIZER, np.arange(10) / 45, **{**quiet, **kwargs})(rows)


@torch.no_grad()
def predictions(model, text: str, **columns) -> dict[str, torch.Tensor]:
    (window,) = windows_of(history(text, **columns))
    batch = collate([window])
    embeddings = model(**batch).embeddings[0]
    return {names([item]): embedding for item, embedding in zip(window["target_items"], embeddings, strict=True)}


@pytest.mark.parametrize(
    "changed", ["a+ | c. d* b+ e. | g+", "a+ | b+ | g+", "a+ | b+ d* c. f. | g+", "a+ | b+ c! d* e. | g+"]
)
def test_permuting_and_deleting_rows_of_a_view_changes_no_other_prediction(changed):
    torch.manual_seed(0)
    config = PinRecConfig.from_preset(
        "tiny", surfaces=TOKENIZER.surfaces, outcomes=TOKENIZER.outcomes, num_items=8, initializer_range=0.3
    )
    model = PinRecModel(config).eval()

    def times(text):  # those of a view stay with it, however many rows it has
        views = [len(view.split()) for view in text.split("|")]
        return [1000 * number for number, count in enumerate(views) for _ in range(count)]

    base = "a+ | b+ c. d* e. | g+"
    before = predictions(model, base, timestamp=times(base))
    after = predictions(model, changed, timestamp=times(changed))
    for item in set("abd") & set(after):
        assert torch.allclose(before[item], after[item], atol=1e-5), item
    assert not torch.allclose(before["a"], before["b"], atol=0.1)
    # what was acted on in a view is in later views' history; what was ignored is not
    acted = [event for event in changed.replace("|", "").split() if event[1] != "."]
    assert torch.allclose(before["g"], after["g"], atol=1e-5) == (acted == ["a+", "b+", "d*", "g+"])


# -- batches -----------------------------------------------------------------------------------------------------


def test_a_batch():
    batch = collate(windows_of(history("a+ | b. c+ d."), history("e+ f.")), uniform_negatives=0)
    ids = batch["item_ids"]
    labels = [[names([ids[i]]) for i in row if i != IGNORED_LABEL] for row in batch["labels"].tolist()]
    assert labels == [["a", "c"], ["e"]]
    assert batch["target_positions"].tolist() == [[0, 1], [1, 0]]  # padded on the left
    hard = [[names(ids[rows]) for rows in row] for row in batch["hard_negatives"]]
    assert hard == [["aa", "bd"], ["fe", "??"]]  # padded with the label; the last is no target
    assert not batch["negative_counts"].any()  # nobody drew them
    assert names(ids[FIRST_ITEM:]) == "abcdef"
    for without in ({"impression_negatives": False}, {"full_softmax": True}):
        assert "hard_negatives" not in collate(windows_of(history("a+ b.")), **without)
    assert collate(windows_of(history("a+ | c+")))["hard_negatives"].shape == (1, 2, 0)


def test_negatives_are_items_that_the_model_has_rows_for():
    """Of a catalogue that has grown since, by which the model's correction would count them twice."""
    windows = windows_of(history("a+ | b+ c. | d+"))
    drawn = collate(windows, uniform_negatives=500, drawn_from=3)
    assert set(drawn["item_ids"][drawn["negative_counts"] > 0].tolist()) == {2, 3, 4}
    assert len(set(collate(windows, uniform_negatives=500)["item_ids"].tolist())) == 10


def test_choices_are_keyed_by_seed_epoch_and_window():
    windows = windows_of(*[history("a+ b. | c* d*")] * 3)
    noisy = {"condition_dropout": 0.3, "time_dropout": 0.3, "uniform_negatives": 3}
    first, again = collate(windows, **noisy), collate(windows, **noisy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = collate(windows, **noisy, seed=1)
    assert any(not torch.equal(first[n], other[n]) for n in ("target_outcomes", "target_timestamps", "negative_counts"))


# -- a dataset ---------------------------------------------------------------------------------------------------


def test_the_train_split(tiny_data, tokenizer):
    dataset = ViewDataset(encode_views(tiny_data, tokenizer, "search"))
    assert not tokenizer.keep_ignored
    assert len(dataset) > 10
    code = tokenizer.surface_code("search")
    counts = dataset.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue))
    rows = [dataset[i] for i in range(len(dataset))]
    assert counts.tolist() == np.bincount(np.concatenate([row["target_items"] for row in rows]), minlength=62).tolist()
    assert all((row["target_surfaces"] == code).all() and len(row["target_items"]) for row in rows)
    assert dataset.num_hard_negatives == sum(row["hard_counts"].sum() for row in rows) > 0
    assert dataset.lengths.tolist() == [len(row["items"]) for row in rows]
    dataset.set_epoch(3)
    assert dataset[4]["key"].tolist() == [3, 4]
    everywhere = ViewDataset(encode_views(tiny_data, tokenizer))
    assert everywhere.target_counts(0, 60).sum() > counts.sum()
    # positions of the log decide: the first of a view, acted on, has nothing above it
    assert {0} < set(np.concatenate([row["hard_counts"] for row in rows]).tolist())


def test_a_surface_that_the_tokenizer_does_not_know(tiny_data, tokenizer):
    with pytest.raises(ValueError, match="surface 'serach' is not among"):
        encode_views(tiny_data, tokenizer, "serach")
