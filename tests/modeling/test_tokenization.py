"""Rows and requests become the tensors they should, whatever is in them, or an error that says what is wrong."""

import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pinrec_hf.modeling.catalogue_pinrec import Catalogue, stable_hash
from pinrec_hf.modeling.configuration_pinrec import (
    FIRST_ITEM,
    ITEM_EVENT,
    NO_ITEM,
    QUERY_EVENT,
    START_EVENT,
    SUBJECT_EVENT,
    UNKNOWN_ITEM,
)
from pinrec_hf.modeling.events_pinrec import EVENT_COLUMNS
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

IDS = ["a", "b", "with space", 'quo"te', "new\nline", "emoji 🛋️", "日本", ""]
NOW = 1_700_000_000
UNKNOWN_OUTCOME, SAVE, CLICK, HIDE = (1 << i for i in range(4))


def make_tokenizer(ids=IDS, **kwargs) -> PinRecTokenizer:
    vectors = np.arange(1, 2 * len(ids) + 1, dtype=np.float32).reshape(len(ids), 2)
    return PinRecTokenizer(
        catalogue=Catalogue.build(ids, vectors=vectors, features=[["x", "y"], ["x"], *[[]] * (len(ids) - 2)]),
        **{
            "queries": Catalogue.build(["sofa", "chair"], vectors=np.array([[1.0, 2, 3], [4, 5, 6]])),
            "surfaces": ["home", "search"],
            "outcomes": ["save", "click", "hide"],
            "negative_outcomes": ["hide"],
            "model_max_length": 16,
            **kwargs,
        },
    )


@pytest.fixture(scope="module")
def tok() -> PinRecTokenizer:
    return make_tokenizer()


def code(item: str) -> int:
    return IDS.index(item) + FIRST_ITEM


# -- encode ------------------------------------------------------------------------------------------------------


def test_encode_gives_codes(tok):
    (row,) = tok.encode(
        [
            {
                "item_id": ["a", "gone", "new\nline", "b", "a"],
                "surface": ["home", None, "search", "moved", "home"],
                "timestamp": [None, NOW, NOW + 5, NOW + 5, NOW + 9],
                "outcomes": [["save"], ["save", "click"], None, ["hide", "renamed"], []],
                "weight": [1, 2, None, 0.5, 1],
                "request_id": [0, 1, 1, 2, 2],
            }
        ]
    )
    assert list(row) == list(EVENT_COLUMNS)
    assert {name: values.dtype for name, values in row.items()} == EVENT_COLUMNS
    # the ignored impression is gone, the event whose outcome is unknown is not
    assert row["items"].tolist() == [code("a"), UNKNOWN_ITEM, code("new\nline"), code("b")]
    assert row["types"].tolist() == [ITEM_EVENT] * 4
    assert row["surfaces"].tolist() == [1, 0, 2, 0]
    assert row["timestamps"].tolist() == [-1, NOW, NOW + 5, NOW + 5]
    assert row["outcomes"].tolist() == [SAVE, SAVE | CLICK, UNKNOWN_OUTCOME, HIDE | UNKNOWN_OUTCOME]
    assert row["weights"].tolist() == [1, 2, 1, 0.5]
    assert row["requests"].tolist() == [0, 1, 1, 2]


def test_request_ids_may_be_text():
    """What counts is which are equal."""
    history = {"item_id": ["a", "b", "a", "b"], "outcomes": [["save"]] * 4, "request_id": ["r1", None, "r1", "r2"]}
    (row,) = make_tokenizer().encode([history])
    assert row["requests"].tolist() == [0, -1, 0, 1]


def test_ignored_impressions_stay_if_asked():
    history = {"item_id": ["a", "b"], "outcomes": [[], ["save"]]}
    assert len(make_tokenizer().encode([history])[0]["items"]) == 1
    (row,) = make_tokenizer(keep_ignored=True).encode([history])
    assert row["outcomes"].tolist() == [0, SAVE]


def test_a_views_context_stands_before_its_first_event(tok):
    hashes = dict(zip(["sofa", "lamp"], stable_hash(["sofa", "lamp"]).tolist(), strict=True))
    (row,) = tok.encode(
        [
            {
                # a query that has its own event; one that only the items carry; a subject item; another view of it
                "item_id": [None, "a", "b", "a", "b", "a", "b"],
                "query": ["sofa", "sofa", "sofa", "lamp", None, None, None],
                "context_item_id": [None, None, None, None, "日本", "日本", "gone"],
                "surface": ["search", "search", "search", "search", "home", "home", "home"],
                "timestamp": [1, 2, 3, 14, 25, 26, 37],
                "outcomes": [[], ["save"], ["click"], ["save"], ["save"], ["click"], ["save"]],
                "request_id": [0, 0, 0, 1, 2, 2, 3],
            }
        ]
    )
    q, i, s = QUERY_EVENT, ITEM_EVENT, SUBJECT_EVENT
    assert row["types"].tolist() == [q, i, i, q, i, s, i, i, s, i]
    assert row["queries"].tolist() == [hashes["sofa"], 0, 0, hashes["lamp"], *[0] * 6]
    a, b, subject = code("a"), code("b"), code("日本")
    assert row["items"].tolist() == [NO_ITEM, a, b, NO_ITEM, a, subject, b, a, UNKNOWN_ITEM, b]
    assert row["timestamps"].tolist() == [1, 2, 3, 14, 14, 25, 25, 26, 37, 37]
    # what is context has no outcome
    assert (row["outcomes"][row["types"] != ITEM_EVENT] == 0).all()
    assert (row["outcomes"][row["types"] == ITEM_EVENT] != 0).all()


def test_one_positive_outcome_needs_no_column():
    tok = make_tokenizer(outcomes=["interaction", "hide"])
    together = tok.encode([{"item_id": ["a", "b"]}, {"item_id": ["a"], "outcomes": [["hide"]]}])
    assert together[0]["outcomes"].tolist() == [2, 2]
    assert together[1]["outcomes"].tolist() == [4]
    with pytest.raises(ValueError, match="history 1 needs `outcomes`"):
        make_tokenizer().encode([{"item_id": ["a"], "outcomes": [["save"]]}, {"item_id": ["a"]}])


def test_columns_may_be_arrays():
    (row,) = make_tokenizer().encode(
        [
            {
                "item_id": np.array(["a", "b"], object),
                "outcomes": np.array([np.array(["save", "click"], object), None], object),
                "timestamp": np.array([5, 6]),
                "surface": ("home", None),
            }
        ]
    )
    assert row["outcomes"].tolist() == [SAVE | CLICK, UNKNOWN_OUTCOME]
    assert row["timestamps"].tolist() == [5, 6]


# -- requests ----------------------------------------------------------------------------------------------------


def test_request_context_is_the_last_event(tok):
    history = {"item_id": ["a", "b"], "outcomes": [["save"], ["click"]], "timestamp": [NOW - 100, NOW - 40]}
    batch = tok(
        [history, history, {}, {"item_id": ["gone"], "outcomes": [["save"]]}],
        surface=["search", "home", None, "home"],
        query=["sofa", None, None, None],
        context_item_id=[None, "日本", None, None],
        timestamp=[NOW, NOW, NOW, None],
    )
    assert batch["event_types"].tolist() == [
        [START_EVENT, ITEM_EVENT, ITEM_EVENT, QUERY_EVENT],
        [START_EVENT, ITEM_EVENT, ITEM_EVENT, SUBJECT_EVENT],
        [START_EVENT] * 4,
        [START_EVENT, START_EVENT, START_EVENT, ITEM_EVENT],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    items = batch["item_ids"][batch["event_items"]]
    assert items.tolist() == [
        [NO_ITEM, code("a"), code("b"), NO_ITEM],
        [NO_ITEM, code("a"), code("b"), code("日本")],
        [NO_ITEM] * 4,
        [NO_ITEM, NO_ITEM, NO_ITEM, UNKNOWN_ITEM],
    ]
    assert batch["timestamps"][0].tolist() == [-1, NOW - 100, NOW - 40, NOW]
    assert batch["time_gaps"][0].tolist() == [-1, -1, 60, 40]
    assert batch["surface_ids"][:2, -1].tolist() == [2, 1]
    assert batch["query_hashes"][batch["event_queries"]][0].tolist() == [0, 0, 0, int(stable_hash(["sofa"])[0])]
    assert batch["query_vectors"][batch["event_queries"]][0, -1].tolist() == [1, 2, 3]
    assert batch["target_positions"].tolist() == [[3]] * 4
    assert batch["target_surfaces"].tolist() == [[2], [1], [0], [1]]
    assert batch["target_timestamps"].tolist() == [[NOW], [NOW], [NOW], [-1]]
    assert batch["target_outcomes"].tolist() == [[0]] * 4
    assert "target_features" not in batch


def test_a_query_that_ends_the_history_is_not_put_there_again(tok):
    """As in training, where a view's query stands in the log once."""
    search = {"item_id": ["a", None], "outcomes": [["save"], []], "query": [None, "sofa"], "timestamp": [10, 20]}
    search["surface"] = ["home", "search"]
    same, *others = {"query": "sofa"}, {"query": "lamp"}, {"surface": "home"}, {"timestamp": 20 + 1_801}
    asked = tok(
        [search] * 4,
        query=[about.get("query", "sofa") for about in (same, *others)],
        surface=[about.get("surface", "search") for about in (same, *others)],
        timestamp=[about.get("timestamp", 30) for about in (same, *others)],
    )
    once = [START_EVENT, START_EVENT, ITEM_EVENT, QUERY_EVENT]
    again = [START_EVENT, ITEM_EVENT, QUERY_EVENT, QUERY_EVENT]
    assert asked["event_types"].tolist() == [once, again, again, again]
    assert asked["timestamps"][:, -1].tolist() == [20, 30, 30, 1_821]
    own = tok([search], query="sofa", surface="search", query_embedding=[7.0, 8, 9])
    assert own["query_vectors"][own["event_queries"]][0, -1].tolist() == [7, 8, 9]


def test_one_value_serves_all_requests(tok):
    histories = [{"item_id": ["a"], "outcomes": [["save"]]}] * 2
    one = tok(histories, surface="search", query="sofa", timestamp=NOW, query_embedding=[1.0, 0, 0])
    each = tok(
        histories, surface=["search"] * 2, query=["sofa"] * 2, timestamp=[NOW] * 2, query_embedding=[[1.0, 0, 0]] * 2
    )
    assert one.keys() == each.keys()
    assert all(torch.equal(one[name], each[name]) for name in one)
    assert torch.equal(
        tok(histories[0], surface="search")["event_items"], tok(histories[:1], surface="search")["event_items"]
    )


def test_the_item_table(tok):
    batch = tok([{"item_id": ["b", "gone", "a", "b"], "outcomes": [["save"]] * 4}])
    assert batch["item_ids"].tolist() == [NO_ITEM, UNKNOWN_ITEM, code("a"), code("b")]
    assert batch["item_vectors"].tolist() == [[0, 0], [0, 0], [1, 2], [3, 4]]
    assert batch["item_hashes"].tolist() == [0, 0, *stable_hash(["a", "b"]).tolist()]
    x, y = stable_hash(["x", "y"]).tolist()
    assert batch["item_features"].tolist() == [[0, 0], [0, 0], [x, y], [x, 0]]


def test_a_query_vector_of_a_request_is_its_own(tok):
    batch = tok(
        [{}, {}, {}, {}], query=["sofa", "sofa", "lamp", None], query_embedding=[None, [7, 8, 9], None, [1, 1, 1]]
    )
    vectors = batch["query_vectors"][batch["event_queries"]][:, -1]
    assert vectors.tolist() == [[1, 2, 3], [7, 8, 9], [0, 0, 0], [1, 1, 1]]
    hashes = batch["query_hashes"][batch["event_queries"]][:, -1].tolist()
    assert hashes == stable_hash(["sofa", "sofa", "lamp", ""]).tolist()


def test_right_padding():
    left, right = make_tokenizer(), make_tokenizer(padding_side="right")
    histories = [{"item_id": ["a", "b"], "outcomes": [["save"]] * 2, "timestamp": [5, 9]}, {}]
    a, b = (tok(histories, query="sofa", timestamp=20) for tok in (left, right))
    assert b["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert b["target_positions"].tolist() == [[3], [1]]
    for name in (
        "event_items",
        "event_types",
        "event_queries",
        "timestamps",
        "time_gaps",
        "surface_ids",
        "outcome_sets",
    ):
        for row in range(2):
            real = [batch[name][row][batch["attention_mask"][row] == 1].tolist() for batch in (a, b)]
            assert real[0] == real[1], name


def test_a_long_history_keeps_its_newest_events_and_the_context(tok):
    history = {"item_id": ["a"] * 30 + ["b"], "outcomes": [["save"]] * 31, "timestamp": list(range(31))}
    batch = tok([history], query="sofa", timestamp=40)
    assert batch["attention_mask"].shape == (1, 16)
    assert batch["timestamps"][0].tolist() == [-1, *range(17, 31), 40]
    assert batch["event_types"][0, -1] == QUERY_EVENT
    # the first that is left has a gap of its own: nobody knows what came before
    assert batch["time_gaps"][0, :3].tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"item_id": ["a", "b"], "outcomes": [["save"]]}, "history 1 differ in length: .*'item_id': 2.*'outcomes': 1"),
        ({"outcomes": [["save"]]}, "history 1 has no `item_id` column"),
        ({"item_id": ["a"], "outcomes": ["save"]}, r"`outcomes` of history 1 holds 'save' .*write \[\"save\"\]"),
        ({"item_id": ["a"], "outcomes": [3]}, "`outcomes` of history 1 holds 3 where a list"),
        (
            {"item_id": ["a"], "outcomes": [["buy"]]},
            r"\['buy'\] are not among this model's outcomes \['save', 'click', 'hide'\]",
        ),
        (
            {"item_id": ["a"], "outcomes": [["save"]], "surface": ["hmoe"]},
            r"'hmoe' is not among .*\['home', 'search'\]",
        ),
        ({"item_id": ["a"]}, "history 1 needs `outcomes`"),
        ({"item_id": ["a"], "outcome": [["save"]]}, r"history 1 has columns \['outcome'\]; the known ones are"),
        ({"item_id": "a", "outcomes": [["save"]]}, "'item_id' of history 1 is 'a'; it must be a list"),
        (
            {"item_id": ["a"], "outcomes": [["save"]], "timestamp": 5},
            "'timestamp' of history 1 is 5; it must be a list",
        ),
        ({"item_id": [7], "outcomes": [["save"]]}, "string ids, but id 7|row 1: id 7 is int"),
        ({"item_id": [None], "outcomes": [["save"]]}, "history 1 has an event with neither an item_id nor a query"),
        ({"item_id": ["a"], "outcomes": [["save"]], "timestamp": [float("nan")]}, "history 1 has the timestamp nan"),
        ({"item_id": ["a"], "outcomes": [["save"]], "timestamp": [-5]}, "history 1 has the timestamp -5"),
        ({"item_id": ["a"], "outcomes": [["save"]], "timestamp": [NOW * 1000]}, "no number of seconds since epoch"),
        ({"item_id": ["a"], "outcomes": [["save"]], "timestamp": ["2024-01-01"]}, "timestamp '2024-01-01'"),
        (["a", "b"], "history 1 is .*give a dict of columns"),
    ],
)
def test_bad_histories(tok, history, message):
    with pytest.raises(ValueError, match=message):
        tok([{"item_id": ["a"], "outcomes": [["save"]]}, history])


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"surface": "hmoe"}, r"surface 'hmoe' is not among this model's surfaces \['home', 'search'\]"),
        ({"surface": ["home"]}, "surface has 1 entries for 2 histories"),
        ({"timestamp": NOW * 1000}, "request 0 has the timestamp 1700000000000"),
        ({"timestamp": [None, float("nan")]}, "request 1 has the timestamp nan"),
        ({"timestamp": "yesterday"}, "request 0 has the timestamp 'yesterday'"),
        ({"query": "sofa", "context_item_id": "a"}, "request 0 has both a query and a context_item_id"),
        ({"query_embedding": [1, 2, 3], "context_item_id": "a"}, "request 0 has both"),
        ({"query": 7}, "the query of request 0 is 7; it must be a string"),
        ({"context_item_id": 7}, "string ids"),
        ({"query_embedding": [1, 2]}, r"shape \(2,\); it must be \(3,\)"),
        ({"query_embedding": [1, float("inf"), 2]}, "zero, or holds NaN or infinity"),
        ({"query_embedding": [0, 0, 0]}, "zero, or holds NaN"),
        ({"request_features": ["device=ios"]}, "does not read request_features.*request_feature_buckets"),
        ({"return_tensors": "np"}, "PyTorch tensors, 'pt'"),
    ],
)
def test_bad_requests(tok, request_fields, message):
    with pytest.raises(ValueError, match=message):
        tok([{}, {}], **request_fields)


def test_no_history_and_no_query_vectors():
    with pytest.raises(ValueError, match="at least one"):
        make_tokenizer()([])
    with pytest.raises(ValueError, match="trained without query vectors"):
        make_tokenizer(queries=None)([{}], query_embedding=[1, 2, 3])
    with pytest.raises(ValueError, match="needs a catalogue"):
        PinRecTokenizer()
    with pytest.raises(ValueError, match="at least 2"):
        make_tokenizer(model_max_length=1)


def test_outcome_codes(tok):
    assert [tok.outcome_code(name) for name in (None, "save", "click")] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"'buy' is not among this model's outcomes \['save', 'click'\]"):
        tok.outcome_code("buy")
    with pytest.raises(ValueError, match="'hide' is negative and cannot be asked for"):
        tok.outcome_code("hide")
    assert tok.positive_mask == SAVE | CLICK


def test_request_features():
    tok = make_tokenizer(request_features=True)
    lists = [["device=ios", "country=de"], ["country=de", "device=ios", "country=de"], ["device=web"], [], None]
    codes = tok([{}] * 5, request_features=lists)["target_features"]
    assert codes.shape == (5, 1)
    assert codes[0] == codes[1] > 0
    assert codes[2] not in (0, codes[0])
    assert codes[3:].tolist() == [[0], [0]]
    # the same codes in a log, where they are of the request that an event answers
    (row,) = tok.encode([{"item_id": ["a"] * 5, "outcomes": [["save"]] * 5, "request_features": lists}])
    assert row["features"].tolist() == codes[:, 0].tolist()
    (row,) = make_tokenizer().encode([{"item_id": ["a"], "outcomes": [["save"]], "request_features": [["device=ios"]]}])
    assert row["features"].tolist() == [0]
    with pytest.raises(ValueError, match=r"6 request_features, of which 5 fit.*join"):
        tok([{}], request_features=list("abcdef"))
    for bad in (["a", 3], [["a"], "device=ios"]):
        with pytest.raises(ValueError, match="no list of strings"):
            tok([{}] * 2, request_features=[["a"], bad] if 3 in bad else bad)


def test_integer_ids():
    tok = make_tokenizer(ids=[10, 2**40, -3])
    batch = tok([{"item_id": [2**40, 99], "outcomes": [["save"]] * 2}], context_item_id=-3)
    assert batch["item_ids"][batch["event_items"]].tolist() == [[0, 3, 1, 4]]
    assert tok.decode([3, 1, 4]) == [2**40, None, -3]
    with pytest.raises(ValueError, match="integer ids, but id '10' was asked for"):
        tok([{"item_id": ["10"], "outcomes": [["save"]]}])


def test_a_user_with_one_event_and_a_catalogue_of_one_item():
    tok = PinRecTokenizer(catalogue=Catalogue.build(["only"]), outcomes=["save"])
    batch = tok([{"item_id": ["only"]}])
    assert batch["item_ids"].tolist() == [0, 1, 2]
    assert batch["attention_mask"].tolist() == [[1, 1]]


def test_a_long_history(tok):
    n = 200_000
    history = {
        "item_id": IDS[:4] * (n // 4),
        "outcomes": [["save"], [], ["click", "save"], ["hide"]] * (n // 4),
        "timestamp": list(range(n)),
        "surface": ["home", "search"] * (n // 2),
    }
    start = time.process_time()
    batch = tok([history])
    assert time.process_time() - start < 10  # some 0.6 s
    assert batch["timestamps"][0, -1] == n - 1
    assert batch["attention_mask"].shape == (1, 16)


# -- a tokenizer of transformers ---------------------------------------------------------------------------------


def test_save_load_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(PinRecTokenizer, "_auto_class", None)  # a training in this process wants the code saved too
    tok = make_tokenizer(keep_ignored=True, padding_side="right", request_features=True)
    tok.save_pretrained(tmp_path)
    request = {
        "histories": [{"item_id": ["emoji 🛋️", "a"], "outcomes": [["save"], []], "timestamp": [1, 2]}, {}],
        "query": "sofa",
        "surface": "search",
        "request_features": ["device=ios"],
    }
    expected = tok(**request)
    loaded = PinRecTokenizer.from_pretrained(tmp_path)
    for other in (
        loaded,
        pickle.loads(pickle.dumps(tok)),
        pickle.loads(pickle.dumps(loaded)),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert isinstance(other, PinRecTokenizer)
        assert repr(other) == repr(tok)
        assert other.catalogue.fingerprint == tok.catalogue.fingerprint
        batch = other(**request)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "catalogue.safetensors", "queries.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    loaded.save_pretrained(tmp_path)  # over the file that it has open
    assert loaded(**request)["item_ids"].tolist() == expected["item_ids"].tolist()


def test_without_query_vectors_no_file_of_them(tmp_path):
    make_tokenizer(queries=None).save_pretrained(tmp_path)
    assert not (tmp_path / "queries.safetensors").exists()
    assert PinRecTokenizer.from_pretrained(tmp_path).query_size == 0


def test_vocabulary(tok):
    assert len(tok) == tok.vocab_size == len(IDS) + 2
    assert tok.get_vocab()["emoji 🛋️"] == code("emoji 🛋️")
    assert tok.decode(torch.tensor([code("日本"), NO_ITEM, UNKNOWN_ITEM, code("")])) == ["日本", None, None, ""]


# -- anything ----------------------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "item_id": st.sampled_from([*IDS, "gone", "\x00"]),
            "surface": st.sampled_from(["home", "search", None]),
            "timestamp": st.none() | st.integers(0, 2**34),
            "outcomes": st.none() | st.lists(st.sampled_from(["save", "click", "hide"]), max_size=3),
            "query": st.none() | st.sampled_from(["sofa", "chair", "line\nbreak", ""]),
            "context_item_id": st.none() | st.sampled_from(["a", "gone"]),
            "request_id": st.integers(0, 3),
        }
    ),
    max_size=24,
)
COLUMNS = ("item_id", "surface", "timestamp", "outcomes", "query", "context_item_id", "request_id")


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=5), st.booleans(), st.booleans())
def test_any_histories(users, keep_ignored, pad_left):
    tok = make_tokenizer(keep_ignored=keep_ignored, padding_side="left" if pad_left else "right")
    histories = [{column: [event[column] for event in events] for column in COLUMNS} for events in users]
    rows = tok.encode(histories, strict=True)
    assert len(rows) == len(histories)
    for history, row in zip(histories, rows, strict=True):
        (alone,) = tok.encode([history])
        assert all(np.array_equal(alone[name], row[name]) for name in EVENT_COLUMNS)
        assert len({len(values) for values in row.values()}) == 1
        kept = [i for i, names in enumerate(history["outcomes"]) if keep_ignored or names is None or names]
        is_item = row["types"] == ITEM_EVENT
        ids = [history["item_id"][i] if history["item_id"][i] in IDS else None for i in kept]
        assert tok.decode(row["items"][is_item]) == ids
        # context comes before an event of its view, never last
        assert not len(row["types"]) or is_item[-1]

    batch = tok.pad(rows)
    mask = batch["attention_mask"].numpy().astype(bool)
    lengths = [min(len(row["items"]), tok.model_max_length - 1) + 1 for row in rows]
    assert mask.shape == (len(rows), max(lengths))
    assert mask.sum(1).tolist() == lengths
    items = batch["item_ids"][batch["event_items"]].numpy()
    for i, row in enumerate(rows):
        edge = slice(mask.shape[1] - lengths[i], None) if pad_left else slice(0, lengths[i])
        assert mask[i, edge].all()
        newest = row["items"][-(tok.model_max_length - 1) :]
        assert items[i, mask[i]].tolist() == [NO_ITEM, *newest]
        assert not items[i, ~mask[i]].any()
    assert (np.diff(batch["item_ids"].numpy()) > 0).all()
    assert batch["item_ids"][:2].tolist() == [NO_ITEM, UNKNOWN_ITEM]
    assert (batch["time_gaps"] >= -1).all()
    assert (batch["timestamps"] >= -1).all()


def test_without_contexts_only_items_are_events(tiny_data):
    from pinrec_hf.data.dataset_folder import build_tokenizer

    tokenizer = build_tokenizer(tiny_data, contexts=False)
    history = {
        "item_id": [None, "p1", "p2"],
        "query": ["lamp", "lamp", None],
        "context_item_id": [None, None, "p3"],
        "outcomes": [[], ["save"], ["click"]],
    }
    (row,) = tokenizer.encode([history])
    assert tokenizer.decode(row["items"]) == ["p1", "p2"]
    with_query = tokenizer([history], surface="search", query="lamp")
    assert with_query["attention_mask"].sum() == 3  # the start and two items
