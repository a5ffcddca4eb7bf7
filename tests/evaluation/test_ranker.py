"""A model as a ranker: the best inner products, what was seen removed or kept."""

import numpy as np

from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.retrieval.eligible import seen_rows


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
