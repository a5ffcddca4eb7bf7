"""A model as a ranker: the best inner products, what was seen removed or kept."""

import numpy as np
import pytest

from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.retrieval.eligible import seen_rows


def test_a_log_may_know_more_names_than_the_model(tiny_data, tokenizer, make_config):
    ranker = ModelRanker(PinRecModel(make_config()).eval(), tokenizer)
    requests = list(load_requests(tiny_data, "test", tokenizer.catalogue).requests)[:20]

    def renamed(request, surface, outcome):
        history = request["history"]
        where = [surface if name == "search" else name for name in history["surface"]]
        what = [names and [outcome if n == "hide" else n for n in names] for names in history["outcomes"]]
        asked = surface if request["surface"] == "search" else request["surface"]
        return {**request, "surface": asked, "history": {**history, "surface": where, "outcomes": what}}

    new, unknown = ([renamed(r, *names) for r in requests] for names in (("shop", "share"), (None, None)))
    assert new != unknown
    history = {"item_id": ["p1", "p2"], "surface": np.array(["home", "shop"]), "outcomes": [np.array(["save"]), None]}
    assert ranker.rank([{"history": history, "surface": None, "timestamp": None}], 3).shape == (1, 3)
    with pytest.raises(ValueError, match="outcomes"):
        ranker.rank([{"history": history | {"outcomes": ["save", "click"]}, "surface": None, "timestamp": None}], 3)
    np.testing.assert_array_equal(ranker.rank(new, 10), ranker.rank(unknown, 10))


def test_seen_items_are_removed_or_kept(tiny_data, tokenizer, make_config):
    model = PinRecModel(make_config()).eval()
    requests = list(load_requests(tiny_data, "test", tokenizer.catalogue).requests)
    size = len(tokenizer.catalogue)
    removed, kept = (ModelRanker(model, tokenizer, remove_seen=seen).rank(requests, size) for seen in (True, False))
    seen = [seen_rows(request, tokenizer.catalogue) for request in requests]
    assert sum(map(len, seen)) > 0
    for without, everything, rows in zip(removed, kept, seen, strict=True):
        left = everything[~np.isin(everything, rows)]
        np.testing.assert_array_equal(without[: len(left)], left)
        assert (without[len(left) :] == -1).all()
