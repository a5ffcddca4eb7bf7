"""What a served model did with a day's requests: figures to look at each morning, beside those of another day."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.retrieval.encode import encode_requests
from pinrec_hf.retrieval.merge import allocate_slots
from pinrec_hf.retrieval.retriever import PinRecRetriever


def daily_figures(
    retriever: PinRecRetriever,
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    k: int = 10,
    max_users: int | None = None,
) -> dict[str, Any]:
    """Figures of the test days of `data`, which `pinrec prepare` made of a log that ends with them.

    Args:
        retriever, folder: the model and where it lies. k: slots a request. max_users: a sample of this many.

    Returns:
        `unknown_item_rate`: of the items in histories, those that the catalogue lacks. `history_age_seconds`: median
        time from a history's last event to its request, None where no time is known. `index_age_seconds`: since the
        index was written. `slots_asked`, `slots_delivered`: by outcome (`any`: unspecified). `distinct_items`, of
        `catalogue_items`. `embedding_norm`: mean length of user embeddings, outcome unspecified. `recall`: at k,
        `[value, low, high]`, 95 % over users.

    Raises:
        FileNotFoundError, ValueError: no dataset, no target in it.
    """
    catalogue, config = retriever.tokenizer.catalogue, retriever.model.config
    loaded = load_requests(Path(data), "test", catalogue, max_users=max_users)
    unread = {} if retriever.tokenizer.request_features else {"request_features": None}
    requests = [{**request, **unread} for request in loaded.requests]
    items, ages = [], []
    asked: dict[str, int] = {}
    delivered: dict[str, int] = {}
    for request in requests:
        items += [item for item in request["history"].get("item_id") or () if item is not None]
        times = [at for at in request["history"].get("timestamp") or () if at is not None]
        if times and request["timestamp"] is not None:
            ages.append(request["timestamp"] - times[-1])
        budget = retriever.model.resolve_budget(request["surface"])
        for outcome, slots in zip(budget, allocate_slots(np.array(list(budget.values())), k).tolist(), strict=True):
            asked[outcome or "any"] = asked.get(outcome or "any", 0) + slots
    found = retriever.search(requests, k)
    for place in found.outcomes[found.outcomes >= 0].tolist():
        name = found.names[place] or "any"
        delivered[name] = delivered.get(name, 0) + 1
    # without the constant that a dot product's embedding ends in
    vectors = encode_requests(retriever.model, retriever.tokenizer, requests)[:, 0, : config.hidden_size]
    recall = evaluate(retriever, loaded, catalogue, ks=[k]).metrics[f"recall@{k}"]
    return {
        "k": k,
        "requests": len(requests),
        "unknown_item_rate": float((catalogue.rows(items) < 0).mean()) if items else 0.0,
        "history_age_seconds": float(np.median(ages)) if ages else None,
        "index_age_seconds": time.time() - (Path(folder) / "index.json").stat().st_mtime,
        "slots_asked": asked,
        "slots_delivered": delivered,
        "distinct_items": len(np.unique(found.rows[found.rows >= 0])),
        "catalogue_items": len(catalogue),
        "embedding_norm": float(np.linalg.norm(vectors, axis=1).mean()),
        "recall": [recall.value, recall.low, recall.high],
    }
