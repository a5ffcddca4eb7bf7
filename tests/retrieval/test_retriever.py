"""Recommendations are the nearest eligible items, their slots divided by budget; what does not belong is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pinrec_hf import PinRecRetriever
from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import Generated, encode_items, encode_requests
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.item_table import ItemTable, write_item_table

FIRST_TIME, DAY = 1_700_006_400, 86_400
NOW = FIRST_TIME + 7 * DAY
HISTORY = {
    "item_id": ["p0", "p5", "with space", "p7"],
    "surface": ["homefeed"] * 4,
    "timestamp": [NOW - 4 * DAY, NOW - 3 * DAY, NOW - 2 * DAY, NOW - DAY],
    "outcomes": [["save"], [], ["click", "save"], ["hide"]],
}
SEEN = {"p0", "with space", "p7"}


@pytest.fixture(scope="session")
def items(tiny_data, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    write_item_table(tiny_data / "items.parquet", path, tokenizer.catalogue)
    return ItemTable(path, tokenizer.catalogue)


@pytest.fixture(scope="session")
def retriever(model, tokenizer, items):
    return PinRecRetriever.build(model, tokenizer, items)


@pytest.fixture(scope="session")
def divided(make_model, tokenizer):
    """A retriever whose outcomes ask for different items: an untrained head hardly tells them apart."""
    model = make_model(outcome_budgets={"search": {"click": 0.75, "save": 0.25}})
    with torch.no_grad():
        model.outcome_head.outcomes.weight *= 50
    return PinRecRetriever.build(model, tokenizer)


def ids(candidates):
    return [candidate.item_id for candidate in candidates]


def by_outcome(candidates):
    names = [candidate.outcome for candidate in candidates]
    return {name: names.count(name) for name in names}


# -- what comes back -------------------------------------------------------------------------------------------------


def test_candidates_are_the_nearest_unseen_live_items(retriever, model, tokenizer):
    (candidates,) = retriever.recommend([HISTORY], surface="homefeed", timestamp=NOW, outcome_budget={"save": 1}, k=20)
    user = encode_requests(model, tokenizer, [{"history": HISTORY, "surface": "homefeed", "timestamp": NOW}], ["save"])[
        0, 0
    ]
    scores = encode_items(model, tokenizer) @ user
    lives = tokenizer.catalogue.availability(np.arange(60))
    scores[
        (lives[:, 0] > NOW) | (lives[:, 1] <= NOW) | np.isin(tokenizer.catalogue.ids(np.arange(60)), list(SEEN))
    ] = -9e9
    best = np.argsort(-scores)[:20]
    assert [candidate.row for candidate in candidates] == best.tolist()
    np.testing.assert_allclose([candidate.score for candidate in candidates], scores[best], rtol=1e-4)
    assert ids(candidates) == tokenizer.catalogue.ids(best)
    assert {(candidate.outcome, candidate.step) for candidate in candidates} == {("save", 1)}


def test_all_that_may_come_comes_once(retriever):
    """Acted on either way is seen; an ignored impression (p5) is not. Three items have expired."""
    (candidates,) = retriever.recommend([HISTORY], surface="homefeed", timestamp=NOW, k=10**6)
    found = ids(candidates)
    assert len(found) == len(set(found)) == 60 - len(SEEN | {'quo"te', "new\nline", "emoji 🛋️"})
    assert not SEEN & set(found)
    assert "p5" in found


def test_ids_with_newlines_quotes_and_emoji_come_back_whole(retriever):
    found = ids(retriever.recommend([{}], surface="homefeed", timestamp=FIRST_TIME + 3 * DAY, k=60)[0])
    assert {"with space", 'quo"te', "new\nline", "emoji 🛋️"} <= set(found)


def test_a_batch_gives_what_each_request_alone_gives(retriever, requests_example):
    fields = ["surface", "timestamp", "query", "context_item_id"]
    together = retriever.recommend(
        [request["history"] for request in requests_example],
        **{name: [request.get(name) for request in requests_example] for name in fields},
        k=15,
    )
    for request, candidates in zip(requests_example, together, strict=True):
        one = {name: request.get(name) for name in fields}
        (alone,) = retriever.recommend([request["history"]], **one, k=15)
        assert ids(alone) == ids(candidates)
        assert len(alone) == 15


def test_a_cold_user_is_answered_by_surface_and_time(retriever):
    feed, search = retriever.recommend([{}, {}], surface=["homefeed", "search"], timestamp=NOW, k=10)
    assert len(feed) == 10
    assert ids(feed) != ids(search)


def test_a_history_of_unknown_items_only(retriever):
    (candidates,) = retriever.recommend({"item_id": ["x", "y"], "outcomes": [["save"], ["hide"]]}, k=10)
    assert len(candidates) == 10


def test_no_requests_give_no_lists(retriever):
    assert retriever.recommend([]) == []


def test_titles_on_demand(retriever):
    (candidates,) = retriever.recommend([{}], timestamp=FIRST_TIME, k=60, columns=["title", "market"])
    assert all(candidate.title == f"Title of {candidate.item_id}" for candidate in candidates)
    assert {candidate.columns["market"] for candidate in candidates} == {"de", "us"}
    assert retriever.recommend([{}], k=1)[0][0].title is None
    with pytest.raises(ValueError, match=r"'price'.*title"):
        retriever.recommend([{}], k=1, columns=["price"])


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_slots_are_divided_by_budget_and_outcomes_take_turns(divided):
    (candidates,) = divided.recommend([{}], surface="search", outcome_budget={"save": 0.7, "click": 0.3}, k=10)
    assert by_outcome(candidates) == {"save": 7, "click": 3}
    assert "".join((candidate.outcome or "")[0] for candidate in candidates) == "scssscsscs"


def test_shares_need_not_sum_to_one_and_zero_gets_nothing(divided):
    (candidates,) = divided.recommend([{}], outcome_budget={"save": 0, "click": 30}, k=10)
    assert by_outcome(candidates) == {"click": 10}


def test_default_budget_is_the_surfaces_own_else_unspecified(divided):
    search, feed = divided.recommend([{}, {}], surface=["search", "homefeed"], k=8)
    assert by_outcome(search) == {"click": 6, "save": 2}
    assert by_outcome(feed) == {None: 8}


def test_the_order_of_a_budget_changes_nothing(divided):
    """A config in JSON comes back with its keys sorted."""
    one, other = divided.recommend([{}, {}], outcome_budget=[{"save": 0.5, "click": 0.5}, {"click": 0.5, "save": 0.5}])
    assert [(c.item_id, c.outcome) for c in one] == [(c.item_id, c.outcome) for c in other]


def test_a_budget_of_each_request(divided):
    lists = divided.recommend([{}, {}], outcome_budget=[{"save": 1}, None], surface="search", k=4)
    assert [by_outcome(candidates) for candidates in lists] == [{"save": 4}, {"click": 3, "save": 1}]


def test_similar_embeddings_of_an_outcome_are_one_query(make_model, tokenizer):
    """Where nothing moves from step to step, the first step takes all slots; outcomes keep their shares."""
    retriever = PinRecRetriever.build(make_model(), tokenizer)
    retriever.num_steps = 3
    several = retriever.search([request_of({"save": 1, "click": 1})], 10)
    assert set(several.steps[0]) == {1, 2, 3}
    retriever.similar = -1.0  # all are similar
    merged = retriever.search([request_of({"save": 1, "click": 1})], 10)
    assert set(merged.steps[0]) == {1}
    assert np.bincount(merged.outcomes[0])[[1, 2]].tolist() == [5, 5]


def request_of(budget, **fields):
    return {"history": {}, "surface": "homefeed", "outcome_budget": budget, **fields}


def test_steps_share_the_slots(retriever):
    found = retriever.search([request_of({"save": 0.5, "click": 0.5}, num_steps=2), request_of({"save": 1})], 8)
    pairs = list(zip(found.outcomes[0].tolist(), found.steps[0].tolist(), strict=True))
    assert sorted(pairs) == sorted([(o, s) for o in (1, 2) for s in (1, 2)] * 2)  # none was merged
    assert found.steps[1].tolist() == [1] * 8
    assert len(set(found.rows[0])) == 8
    (alone,) = retriever.recommend(
        [{}], surface="homefeed", outcome_budget={"save": 0.5, "click": 0.5}, num_steps=2, k=8
    )
    assert [candidate.row for candidate in alone] == found.rows[0].tolist()
    assert [candidate.step for candidate in alone] == found.steps[0].tolist()


def test_what_is_fed_back_might_have_come(model, tokenizer, items):
    """Whatever the request excludes, filters or is about, and what the index no longer holds."""
    retriever = PinRecRetriever.build(model, tokenizer, items)
    retriever.index.remove(np.array([20, 21]))
    request = request_of({"save": 1}, num_steps=8, timestamp=NOW, history=HISTORY, surface="related")
    for more in (
        {"context_item_id": "p2"},
        {"exclude": [f"p{i}" for i in range(2, 40)]},
        {"filters": {"market": "de"}},
        {"context_item_id": "p2", "exclude": ["p3"], "filters": {"market": ["de", "fr"]}},
    ):
        asked = {**request, **more}
        (by,) = retriever.generate([asked])
        assert len(set(by.fed_rows)) == 7
        assert set(by.fed_rows) <= set(retriever.search([asked], 60).rows[0])


def test_the_subject_of_an_earlier_view_may_come_and_be_fed_back(retriever, tokenizer):
    history = {"item_id": ["p0"], "outcomes": [["save"]], "context_item_id": ["p7"], "surface": ["related"]}
    others = [item for item in tokenizer.catalogue.ids(np.arange(60)) if item not in ("p0", "p7", "p9")]
    asked = request_of({"save": 1}, num_steps=4, history=history, exclude=others)
    found = {row for row in retriever.search([asked], 60).rows[0] if row >= 0}
    assert found == set(tokenizer.catalogue.rows(["p7", "p9"]))
    (by,) = retriever.generate([asked])
    assert set(by.fed_rows[:2]) == found
    assert by.fed_rows[2] in found  # none is left: again the nearest of those that may come


def test_an_index_of_some_items_feeds_back_those_alone(model, tokenizer):
    vectors, some = encode_items(model, tokenizer), np.arange(10, 40)
    index = PinRecRetriever.build(model, tokenizer).index
    belongs = {name: getattr(index, name) for name in ("encoder_fingerprint", "catalogue_fingerprint")}
    retriever = PinRecRetriever(model, tokenizer, ItemIndex.build(vectors[some], rows=some, **belongs))
    (by,) = retriever.generate([request_of({"save": 1}, num_steps=9)])
    assert set(by.fed_rows) <= set(some)
    retriever.index.add(vectors[50:52], np.array([50, 51]))
    others = [item for row, item in enumerate(tokenizer.catalogue.ids(np.arange(60))) if row not in (50, 51)]
    (by,) = retriever.generate([request_of({"save": 1}, num_steps=3, exclude=others)])
    assert set(by.fed_rows) == {50, 51}


def test_embeddings_above_a_cosine_of_nine_tenths_are_one(retriever, monkeypatch):
    """Of what they say of the user: the constants that a dot product's end in would make all alike."""
    config = retriever.model.config
    cosines = np.array([1, 0.91, 0.89])
    embeddings = np.full((3, config.embedding_size), 10, np.float32)
    embeddings[:, : config.hidden_size] = 0
    embeddings[:, 0], embeddings[[1, 2], [1, 2]] = cosines, np.sqrt(1 - cosines[1:] ** 2)
    same = np.ones(3, np.int64)
    written = Generated(embeddings, same, np.arange(1, 4), 0 * same, np.full(3, 1 / 3), np.empty(0, np.int64))
    monkeypatch.setattr(retriever, "generate", lambda requests: [written] * len(requests))
    found = retriever.search([request_of({"save": 1})], 12)
    assert np.bincount(found.steps[0]).tolist() == [0, 8, 0, 4]
    assert (retriever.rank_each([request_of({"save": 1})], 5)[0, :3] >= 0).all()  # each on its own


def test_time_offsets_are_embeddings_of_their_own(make_model, tokenizer):
    retriever = PinRecRetriever.build(make_model(time_offsets=[0, 30, 60]), tokenizer)
    (by,) = retriever.generate([request_of({"save": 1}, num_steps=2)])
    assert by.offsets.tolist() == [0, 30, 60] * 2
    assert len(np.unique(by.embeddings, axis=0)) == 6


@pytest.mark.parametrize("steps", ["3", [3], 0, 1.5, True])
def test_a_number_of_steps_is_whole(retriever, steps):
    with pytest.raises(ValueError, match="num_steps is"):
        retriever.search([request_of({"save": 1}, num_steps=steps)], 5)


def test_a_number_of_steps_may_be_numpys(retriever):
    assert retriever.recommend([{}], num_steps=np.int64(2), k=5)


@pytest.mark.parametrize("steps", [1, 6, 16])
def test_steps_leave_an_outcome_its_share(retriever, steps):
    for k, saves in ((5, 4), (10, 7), (40, 28)):  # 3.5 of 5: the tie goes to the larger share
        found = retriever.search([request_of({"save": 0.7, "click": 0.3}, num_steps=steps)], k)
        assert (found.outcomes[0] == 1).sum() == saves


def test_shares_of_any_size_divide(retriever):
    for budget in ({"save": 1e39, "click": 1e39}, {"save": 1e-50}, {"save": 10**300, "click": 1}):
        assert len(retriever.recommend([{}], surface="homefeed", outcome_budget=budget, k=5)[0]) == 5


def test_search_and_recommend_divide_alike_beyond_the_catalogue(retriever):
    budget = {"save": 0.7, "click": 0.3}
    found = retriever.search([request_of(budget)], 1000)
    (candidates,) = retriever.recommend([{}], surface="homefeed", outcome_budget=budget, k=1000)
    assert found.rows[0, :60].tolist() == [candidate.row for candidate in candidates]
    assert (found.rows[0, 60:] == -1).all()
    assert (found.outcomes[0] == 1).sum() == 42


def test_a_request_that_asks_for_more_embeddings_than_others(retriever):
    lists = retriever.rank_each([request_of({"save": 1, "click": 1, None: 1}, num_steps=2), request_of({"save": 1})], 5)
    assert lists.shape == (2, 6, 5)
    assert (lists[1, 1:] == -1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": "p1"}, "exclude is 'p1'; give a list"),
        ({"filters": "market=de"}, "filters are 'market=de'; give a dict"),
        ({"filter": {"market": "de"}}, r"request 0 has fields \['filter'\]"),
        ({"history": None}, "history 0 is None"),
    ],
)
def test_requests_that_make_no_sense_are_refused(retriever, fields, message):
    with pytest.raises(ValueError, match=message):
        retriever.search([{**request_of({"save": 1}), **fields}], 5)


def test_an_event_of_unknown_outcome_was_acted_on(retriever):
    for outcomes in ([None], [[None]]):
        found = retriever.search([request_of({"save": 1}) | {"history": {"item_id": ["p1"], "outcomes": outcomes}}], 60)
        assert retriever.tokenizer.catalogue.rows(["p1"])[0] not in found.rows[0]


def test_more_slots_than_the_lists_could_give_are_refilled(retriever):
    (candidates,) = retriever.recommend([{}], surface="homefeed", num_steps=4, k=1000)
    assert len(candidates) == len({candidate.row for candidate in candidates}) == 60


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"purchase": 1}, "'purchase' is not among"),
        ({"hide": 1}, "'hide' is negative"),
        ({"save": -0.1, "click": 1}, "'save' the share -0.1"),
        ({"save": float("nan")}, "'save' the share nan"),
        ({"save": float("inf")}, "'save' the share inf"),
        ({"save": "much"}, "'save' the share 'much'"),
        ({"save": 10**400}, "'save' the share 1000"),
        ({"save": 0, "click": 0.0}, "divides nothing"),
        ({}, "divides nothing"),
        ("save", "give a dict"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(retriever, budget, message):
    with pytest.raises(ValueError, match=message):
        retriever.recommend([HISTORY], outcome_budget=budget, k=5)


# -- who may not come ------------------------------------------------------------------------------------------------

LATE, GONE = {"p54", "p55", "with space"}, {'quo"te', "new\nline", "emoji 🛋️"}  # from day 2 on, until day 5


@pytest.mark.parametrize(
    ("timestamp", "last_event", "absent"),
    [
        (FIRST_TIME + DAY, None, LATE),
        (FIRST_TIME + 2 * DAY, None, set()),
        (FIRST_TIME + 5 * DAY - 1, None, set()),
        (FIRST_TIME + 5 * DAY, None, GONE),
        (None, None, set()),
        (None, FIRST_TIME + 4 * DAY, set()),
        (None, FIRST_TIME + 6 * DAY, GONE),  # whenever it is, it is later than that
    ],
)
def test_life_times(retriever, timestamp, last_event, absent):
    history = {"item_id": ["x", "x"], "timestamp": [last_event, None], "outcomes": [["save"], ["save"]]}
    (candidates,) = retriever.recommend([history], timestamp=timestamp, k=60)
    assert {id for id in LATE | GONE if id not in ids(candidates)} == absent


def test_excluded_and_subject_items_do_not_come(retriever):
    first, second = retriever.recommend([{}, {}], exclude=["p1", "p2", "never heard of"], k=60, timestamp=NOW)
    assert not {"p1", "p2"} & {*ids(first), *ids(second)}
    first, second = retriever.recommend([{}, {}], exclude=[["p1"], None], k=60, context_item_id=[None, "p4"])
    assert ("p1" in ids(first), "p4" in ids(first)) == (False, True)
    assert ("p1" in ids(second), "p4" in ids(second)) == (True, False)


def test_filters(retriever):
    german = ids(retriever.recommend([{}], filters={"market": "de"}, timestamp=FIRST_TIME + 3 * DAY, k=60)[0])
    assert len(german) == 30
    assert "p2" in german
    assert "p3" not in german
    both, one = retriever.recommend(
        [{}, {}], filters=[{"market": ["de", "us"]}, {"market": "us", "title": ["Title of p3", "Title of p2"]}], k=60
    )
    assert len(both) == 60
    assert ids(one) == ["p3"]
    assert retriever.recommend([{}], filters={"market": "fr"}) == [[]]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"price": 1}, r"no column 'price'; they have \['title', 'market'\]"),
        ({"market": 3}, r"market=\[3\]: the column holds string"),
        ({"market": {"a": 1}}, "the column holds string"),
        ({"market": "\ud800"}, "the column holds string"),
    ],
)
def test_filters_that_cannot_be_are_refused(retriever, filters, message):
    with pytest.raises(ValueError, match=message):
        retriever.recommend([{}], filters=filters)


def test_a_null_passes_where_none_is_wanted(tmp_path):
    table = pa.table({"item_id": ["a", "b", "c"], "tags": [["x"], None, ["y", None]], "at": [{"n": 1}, None, None]})
    pq.write_table(table, tmp_path / "items")
    catalogue = Catalogue.build(["a", "b", "c"])
    write_item_table(tmp_path / "items", tmp_path / "items.parquet", catalogue)
    items = ItemTable(tmp_path / "items.parquet", catalogue)
    assert items.mask({"tags": [None]}).tolist() == [False, True, True]
    assert items.mask({"tags": ["x", None]}).tolist() == [True, True, True]
    assert items.mask({"tags": "y"}).tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"filter at=.*the column holds struct"):
        items.mask({"at": None})


def test_filters_need_the_items_columns(divided):
    with pytest.raises(ValueError, match=r"items\.parquet"):
        divided.recommend([{}], filters={"market": "de"})


def test_list_columns_and_nulls_in_filters(tmp_path):
    catalogue = Catalogue.build([1, 2, 3])
    table = pa.table({"item_id": [1, 2, 3], "tags": [["a", "b"], [], ["b"]], "year": [2020, None, 2022]})
    pq.write_table(table, tmp_path / "given.parquet")
    write_item_table(tmp_path / "given.parquet", tmp_path / "items.parquet", catalogue)
    items = ItemTable(tmp_path / "items.parquet", catalogue)
    assert items.mask({"tags": "b"}).tolist() == [True, False, True]
    assert items.mask({"tags": ["a"], "year": 2020}).tolist() == [True, False, False]
    assert items.mask({"year": [None, 2022]}).tolist() == [False, True, True]
    assert items.parse("year", "2020") == 2020
    with pytest.raises(ValueError, match="year='x': the column holds int64"):
        items.parse("year", "x")
    for beyond in (2**70, -(2**70)):
        with pytest.raises(ValueError, match="the column holds int64"):
            items.mask({"year": beyond})
    with pytest.raises(ValueError, match="items of the catalogue"):
        ItemTable(tmp_path / "items.parquet", Catalogue.build([1, 2, 4]))
    with pytest.raises(ValueError, match="of the catalogue unknown"):
        ItemTable(tmp_path / "given.parquet", catalogue)


# -- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 2.5, "10", True, None])
def test_k_is_a_whole_number_from_one(retriever, k):
    with pytest.raises(ValueError, match="k is"):
        retriever.recommend([{}], k=k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surface": "serach"}, r"'serach' is not among.*homefeed"),
        ({"surface": ["homefeed", "search"]}, "surface has 2 entries for 1"),
        ({"outcome_budget": [None, None]}, "outcome_budget has 2 entries for 1"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 64}, "num_steps=64"),
        ({"exclude": "p1"}, "give a list"),
        ({"exclude": [17]}, "string ids"),
        ({"context_item_id": 17}, "string ids"),
        ({"query_embedding": [1.0, 2.0]}, r"shape \(2,\)"),
        ({"timestamp": -5}, "timestamp -5"),
        ({"request_features": ["device=ios"]}, "request_features"),
        ({"request_features": "device=ios"}, "give a list"),
    ],
)
def test_bad_arguments_are_named(retriever, arguments, message):
    with pytest.raises(ValueError, match=message):
        retriever.recommend([HISTORY], **arguments)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (None, "history 0 is None"),
        ({"item_id": [17], "outcomes": [["save"]]}, "string ids"),
        ({"item_id": ["p1"], "outcomes": [["saved"]]}, "saved"),
        ({"item_id": ["p1"], "outcomes": [["save"]], "surface": ["hoem"]}, "hoem"),
        ({"item_id": ["p1", "p2"], "outcomes": [["save"]]}, "differ in length"),
    ],
)
def test_bad_histories_are_named(retriever, history, message):
    with pytest.raises(ValueError, match=message):
        retriever.recommend([history])


# -- other catalogues ------------------------------------------------------------------------------------------------


def small(ids, **fields):
    catalogue = Catalogue.build(ids)
    names = {"surfaces": ["feed"], "outcomes": ["like"]}
    tokenizer = PinRecTokenizer(catalogue=catalogue, **names)
    torch.manual_seed(0)
    config = PinRecConfig.from_preset(
        "tiny", num_items=len(catalogue), catalogue_fingerprint=catalogue.fingerprint, **names, **fields
    )
    return PinRecModel(config), tokenizer


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivfpq"])
@pytest.mark.parametrize("ids_", [["only"], [7]])
def test_a_catalogue_of_one_item(ids_, kind):
    retriever = PinRecRetriever.build(*small(ids_), kind=kind)
    assert ids(retriever.recommend([{}], surface="feed", k=5)[0]) == ids_
    assert retriever.recommend([{"item_id": ids_, "outcomes": [["like"]]}], k=5) == [[]]


def test_integer_ids(requests_example):
    retriever = PinRecRetriever.build(*small(list(range(100, 150)), similarity="cosine"))
    (candidates,) = retriever.recommend([{"item_id": [100, 101], "outcomes": [["like"], []]}], k=100)
    assert sorted(ids(candidates)) == list(range(101, 150))
    with pytest.raises(ValueError, match="convert the ids to int"):
        retriever.recommend([{"item_id": ["100"], "outcomes": [["like"]]}])


# -- what does not belong together -----------------------------------------------------------------------------------


def test_model_tokenizer_and_index_must_belong_together(retriever, model, tokenizer, make_model):
    other_model, other_tokenizer = small([1, 2, 3])
    with pytest.raises(ValueError, match="do not belong together: surfaces"):
        PinRecRetriever.build(model, other_tokenizer)
    changed = make_model()
    with torch.no_grad():
        changed.item_encoder.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        PinRecRetriever(changed, tokenizer, retriever.index)
    moved = PinRecTokenizer(catalogue=Catalogue.build([1, 2, 4]), surfaces=["feed"], outcomes=["like"])
    with pytest.raises(ValueError, match="do not belong together: catalogue"):
        PinRecRetriever.build(other_model, moved)


def test_a_retriever_is_a_ranker_under_evaluation(retriever, divided, tiny_data, tokenizer):
    requests = load_requests(tiny_data, "test", tokenizer.catalogue)
    result = evaluate(divided, requests, tokenizer.catalogue, progress=False, resamples=10)
    assert result.embeddings == 2
    assert {"recall@10", "unordered_recall@10"} <= result.metrics.keys()
    lists = divided.rank_each([{"history": {}, "surface": "search"}], 5)
    for place, outcome in enumerate(["click", "save"]):
        (own,) = divided.recommend([{}], surface="search", outcome_budget={outcome: 1}, k=5)
        assert lists[0, place].tolist() == [candidate.row for candidate in own]
    assert (divided.rank_each([{"history": {}, "surface": "homefeed"}], 5)[0, 1] == -1).all()
