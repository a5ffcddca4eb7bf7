"""A returning user's embeddings are those of a whole recomputation, whatever happened since, and cost what is new."""

import copy

import numpy as np
import pytest
import torch

from pinrec_hf import PinRecRetriever
from pinrec_hf.retrieval import encode
from pinrec_hf.retrieval.encode import generate_requests, reading_fingerprint
from pinrec_hf.retrieval.history_cache import HistoryCache

NOW = 1_700_006_400 + 7 * 86_400


def history(events: int, seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    return {
        "item_id": [f"p{n}" for n in rng.integers(50, size=events)],
        "surface": [["homefeed", "search", "related"][n] for n in rng.integers(3, size=events)],
        "outcomes": [[["save"], ["click"], ["hide"]][n] for n in rng.integers(3, size=events)],
        "timestamp": (NOW - 10_000 + 60 * np.arange(events)).tolist(),
    }


def first(events: int, of: dict[str, list]) -> dict[str, list]:
    return {name: values[:events] for name, values in of.items()}


@pytest.fixture
def computed(monkeypatch, model):
    """Events that the backbone was given, a number a pass."""
    seen, backbone = [], type(model).backbone

    def count(self, events, *args, **kwargs):
        seen.append(events.shape[1])
        return backbone(self, events, *args, **kwargs)

    monkeypatch.setattr(type(model), "backbone", count)
    return seen


def agree(model, tokenizer, cache, requests, steps=1, items=None):
    """`generate_requests` with the cache gives what it gives without; what the cache run computed is left last."""
    how = {"num_steps": steps, "item_embeddings": items}
    whole = generate_requests(model, tokenizer, requests, **how)
    found = generate_requests(model, tokenizer, requests, histories=cache, fingerprint="f", **how)
    for a, b in zip(found, whole, strict=True):
        assert np.allclose(a.embeddings, b.embeddings, atol=1e-5, rtol=0)
        assert (a.outcomes == b.outcomes).all()
        assert (a.fed_rows == b.fed_rows).all()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_new_events_alone_are_computed(make_model, tokenizer, computed, pooled, steps):
    model, cache, whole = make_model(pooled_history=pooled), HistoryCache(1 << 24), history(40)
    items = None if steps == 1 else torch.randn(60, model.config.embedding_size)
    for events in (30, 31, 31, 40):
        request = {"user_id": "u", "history": first(events, whole), "surface": "homefeed", "timestamp": NOW}
        computed.clear()
        agree(model, tokenizer, cache, [request], steps, items)
        new = computed[steps]  # the whole computation comes first
        assert new == {30: 31, 31: 1, 40: 9}[events]
        computed.clear()
    assert len(cache) == 1


def test_what_differs_is_computed_again(model, tokenizer, computed):
    cache, events = HistoryCache(1 << 24), history(30)
    request = {"user_id": 7, "history": events, "surface": "search", "query": "lamp", "timestamp": NOW}
    agree(model, tokenizer, cache, [request])
    changed = copy.deepcopy(events)
    changed["outcomes"][20] = ["click", "save"]
    later = {name: [*values, values[0]] for name, values in events.items()} | {"timestamp": [*events["timestamp"], NOW]}
    cases = {
        "another query comes last": ({**request, "query": "rug"}, 1),
        "another time of request": ({**request, "query": "rug", "timestamp": NOW + 5}, 1),
        "no query": ({**request, "query": None}, 1),
        "an event where the query was": ({**request, "query": None, "history": later}, 1),
        "an event that changed": ({**request, "query": None, "history": changed}, 10),
        "another user": ({**request, "user_id": "8"}, 32),
        "no name": ({**request, "user_id": None}, 32),
    }
    for name, (asked, new) in cases.items():
        computed.clear()
        agree(model, tokenizer, cache, [asked])
        assert computed[1] == new, name


def test_a_query_vector_of_a_request_is_no_ones_past(model, tokenizer, computed):
    cache = HistoryCache(1 << 24)
    request = {"user_id": "u", "history": history(10), "surface": "search", "query": "lamp", "timestamp": NOW}
    for vector in (np.ones(6), -np.ones(6)):
        agree(model, tokenizer, cache, [{**request, "query_embedding": vector}])
    assert computed[-1] == 1
    # the same query, now an event of the past: its vector is the one that the log's queries have, not the request's
    past = {**first(10, history(12)), "query": [None] * 10}
    event = {"item_id": None, "surface": "search", "outcomes": [], "timestamp": NOW, "query": "lamp"}
    later = {name: [*values, event[name], after] for (name, values), after in
             zip(past.items(), ("p3", "search", ["save"], NOW + 9, None), strict=True)}  # fmt: skip
    agree(model, tokenizer, cache, [{"user_id": "u", "history": later, "surface": "search", "timestamp": NOW + 60}])


def test_a_window_that_slides_is_computed_again(model, tokenizer, computed):
    cache, whole = HistoryCache(1 << 24), history(70)
    for events in (62, 63, 64, 70):
        computed.clear()
        agree(model, tokenizer, cache, [{"user_id": "u", "history": first(events, whole), "timestamp": NOW}])
        assert computed[1] == {62: 63, 63: 1, 64: 63, 70: 63}[events]  # 64 positions, of which the start keeps its own


def test_users_of_one_batch_share_passes_by_what_is_new(model, tokenizer, computed, monkeypatch):
    monkeypatch.setattr(encode, "EVENTS_IN_CACHE", 100)
    cache, histories = HistoryCache(1 << 24), [history(20 + 3 * user, user) for user in range(6)]
    requests = [{"user_id": str(i), "history": h, "surface": "related", "timestamp": NOW}
                for i, h in enumerate(histories)]  # fmt: skip
    before = [{**r, "history": first(len(r["history"]["item_id"]) - 2, r["history"])} for r in requests[:4]]
    agree(model, tokenizer, cache, [*before, {**requests[5], "user_id": None}])
    computed.clear()
    agree(model, tokenizer, cache, requests)
    assert computed[3:] == [2, 36]  # four returning users together, and the two whole histories; before, without cache
    agree(model, tokenizer, cache, [*reversed(requests), {"user_id": "new", "history": {}}])


def test_least_recent_users_make_room(model, tokenizer):
    def ask(user, events=20):
        agree(model, tokenizer, cache, [{"user_id": user, "history": history(events), "timestamp": NOW}])

    cache = HistoryCache(1 << 24)
    ask("a")
    one = cache.bytes
    assert one == 21 * (7 * 8 + 2 * 2 * 32 * 4)
    cache = HistoryCache(int(2.5 * one))
    for user in "abac":
        ask(user)
    assert cache.bytes == 2 * one
    assert [cache.length(("f", "", user)) for user in "abc"] == [21, 0, 21]
    ask("d", 60)  # larger than all that may be kept
    assert len(cache) == 2
    cache.forget("a")
    assert (len(cache), cache.bytes) == (1, one)


def test_models_share_a_cache_but_no_entry(saved_model, tokenizer, requests_example):
    cache = HistoryCache(1 << 24)
    retriever = PinRecRetriever.from_pretrained(saved_model, histories=cache)
    plain = PinRecRetriever.from_pretrained(saved_model)
    for _ in range(2):
        for found, whole in zip(retriever.generate(requests_example), plain.generate(requests_example), strict=True):
            assert np.allclose(found.embeddings, whole.embeddings, atol=1e-5, rtol=0)
    assert len(cache) == len(requests_example)
    other = copy.deepcopy(retriever.model)
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert reading_fingerprint(other, tokenizer) != reading_fingerprint(retriever.model, tokenizer)
    another = PinRecRetriever.build(other, tokenizer)
    sharing = PinRecRetriever(other, tokenizer, another.index, histories=cache)
    for found, whole in zip(sharing.generate(requests_example), another.generate(requests_example), strict=True):
        assert np.allclose(found.embeddings, whole.embeddings, atol=1e-5, rtol=0)
    assert len(cache) == 2 * len(requests_example)
