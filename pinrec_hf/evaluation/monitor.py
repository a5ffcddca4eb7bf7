"""What a served model did with a day's requests: figures to look at each morning, beside those of another day."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.evaluation.evaluate import evaluate
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.retrieval.merge import allocate_slots
from pinrec_hf.retrieval.request import readable
from pinrec_hf.retrieval.retriever import PinRecRetriever, Retrieved


class Day:
    """The requests of a day, ranked once by `evaluate`, and what there is to count of them meanwhile."""

    def __init__(self, retriever: PinRecRetriever) -> None:
        self.retriever = retriever
        self.items = self.unknown = 0
        self.ages: list[int] = []
        self.norms: list[float] = []
        self.asked: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()

    def rank(self, requests: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        """As `PinRecRetriever.rank`."""
        found = self.retriever.search(readable(requests, self.retriever.tokenizer), k)
        for request in requests:
            self._count_request(request, k)
        self._count_answers(found)
        return found.rows

    def _count_request(self, request: Mapping[str, Any], k: int) -> None:
        items = [item for item in request["history"].get("item_id") or () if item is not None]
        self.items += len(items)
        self.unknown += int((self.retriever.tokenizer.catalogue.rows(items) < 0).sum())
        times = [at for at in request["history"].get("timestamp") or () if at is not None]
        if times and request["timestamp"] is not None:
            self.ages.append(request["timestamp"] - times[-1])
        budget = self.retriever.model.resolve_budget(request["surface"])
        for outcome, slots in zip(budget, allocate_slots(np.array(list(budget.values())), k).tolist(), strict=True):
            self.asked[outcome or "any"] += slots

    def _count_answers(self, found: Retrieved) -> None:
        places, counts = np.unique(found.outcomes[found.outcomes >= 0], return_counts=True)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            self.delivered[found.names[place] or "any"] += count
        self.norms += found.norms.tolist()


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
        `catalogue_items`. `embedding_norm`: mean length of what was searched for; `embedding_norm_drift`: how much it
        is above that of the model's validation, as a share of it, None where the model has no record of that.
        `recall`: at k, `[value, low, high]`, 95 % over users.

    Raises:
        FileNotFoundError, ValueError: no dataset, no target in it.
    """
    catalogue, at_training = retriever.tokenizer.catalogue, retriever.model.config.embedding_norm
    requests = load_requests(Path(data), "test", catalogue, max_users=max_users)
    day = Day(retriever)
    result = evaluate(day, requests, catalogue, ks=[k], name="the day")
    recall, norm = result.metrics[f"recall@{k}"], float(np.mean(day.norms))
    return {
        "k": k,
        "requests": len(requests),
        "unknown_item_rate": day.unknown / max(1, day.items),
        "history_age_seconds": float(np.median(day.ages)) if day.ages else None,
        "index_age_seconds": time.time() - (Path(folder) / "index.json").stat().st_mtime,
        "slots_asked": dict(day.asked),
        "slots_delivered": dict(day.delivered),
        "distinct_items": result.coverage[f"coverage@{k}"],
        "catalogue_items": len(catalogue),
        "embedding_norm": norm,
        "embedding_norm_drift": None if at_training is None else norm / at_training - 1,
        "recall": [recall.value, recall.low, recall.high],
    }
