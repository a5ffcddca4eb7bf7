"""The same row offline, in a call and from stored events: to the bit what the tokenizer makes, and what comes of it."""

import numpy as np
import pytest
import torch
from loopback import served

from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.retriever import PinRecRetriever


@pytest.fixture
def made(monkeypatch):
    """What was made last, by whichever retriever: the tokenizer's batch, and the embeddings."""
    made, call, generate = {}, PinRecTokenizer.__call__, PinRecRetriever.generate

    def tokenize(self, *args, **kwargs):
        made["batch"] = call(self, *args, **kwargs)
        return made["batch"]

    def written(self, requests):
        found = generate(self, requests)
        made["embeddings"] = np.concatenate([by.embeddings for by in found])
        return found

    monkeypatch.setattr(PinRecTokenizer, "__call__", tokenize)
    monkeypatch.setattr(PinRecRetriever, "generate", written)
    return made


def as_events(user, history):
    names = [name for name in history if name != "outcomes"]
    for row in zip(history["outcomes"], *(history[name] for name in names), strict=True):
        yield {"user_id": user, "outcomes": row[0], **dict(zip(names, row[1:], strict=True))}


def test_the_same_row_offline_and_through_the_server(make_app, retriever, requests_example, made):
    with served(make_app()) as client:
        for request in requests_example:
            (expected,) = retriever.candidates(retriever.search([request], 20))
            batch, embeddings = dict(made["batch"]), made["embeddings"]
            calls = [request]
            timed = request["history"].get("timestamp") or []
            if None not in timed and timed == sorted(timed):
                if request["history"]:
                    events = list(as_events(request["user_id"], request["history"]))
                    client.post("/v1/events", json={"events": events}).raise_for_status()
                calls.append({name: value for name, value in request.items() if name != "history"})
            for sent in calls:
                answer = client.post("/v1/recommend", json={**sent, "k": 20})
                answer.raise_for_status()
                assert batch.keys() == made["batch"].keys()
                for name, value in made["batch"].items():
                    assert torch.equal(value, batch[name]), name
                assert np.abs(made["embeddings"] - embeddings).max() <= 1e-6
                found = [(c["item_id"], c["outcome"], c["step"], c["score"]) for c in answer.json()["candidates"]]
                assert found == [(c.item_id, c.outcome, c.step, c.score) for c in expected]
    assert len(calls) == 2
