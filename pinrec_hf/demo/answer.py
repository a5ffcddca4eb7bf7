"""One request of the page and all that is shown of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever, Retrieved
from pinrec_hf.retrieval.trace import TracedEmbedding, trace

SECONDS_LATER = 60  # the request comes a minute after the history's last event, as does each event written by hand


@dataclass(frozen=True)
class Answer:
    """What one request gave.

    Attributes:
        request: of the request schema, with `num_steps` and `k`.
        shares: of the slots, asked for: `{outcome: share}` with a sum of 1, largest first; None = unspecified.
        candidates: the list. traced: the embeddings that brought it.
        compared: another model's list for the same request; None without one.
    """

    request: dict[str, Any]
    shares: dict[str | None, float]
    candidates: list[Candidate]
    traced: list[TracedEmbedding]
    compared: list[Candidate] | None


def answer(retriever: PinRecRetriever, request: Mapping[str, Any], compare: ModelRanker | None = None) -> Answer:
    """Candidates, path and, with `compare`, the other model's list for one request.

    Raises:
        ValueError: as `PinRecRetriever.recommend`.
    """
    asked = {name: value for name, value in request.items() if value is not None}
    columns = ["title"] if has_titles(retriever) else []
    retrieved = retriever.search([asked], min(asked["k"], len(retriever.index)))
    budget = retriever.model.resolve_budget(asked.get("surface"), asked.get("outcome_budget"))
    compared = None
    if compare is not None:
        rows, scores = compare.search([asked], asked["k"])
        any_outcome, first = np.zeros_like(rows), np.ones_like(rows)
        (compared,) = retriever.candidates(Retrieved(rows, scores, any_outcome, first, [None]), columns)
    return Answer(
        request=asked,
        shares={outcome: share / sum(budget.values()) for outcome, share in budget.items()},
        candidates=retriever.candidates(retrieved, columns)[0],
        traced=trace(retriever, asked, columns=columns),
        compared=compared,
    )


def has_titles(retriever: PinRecRetriever) -> bool:
    return retriever.items is not None and "title" in retriever.items.names


def name_of(candidate: Candidate) -> str:
    """Its title, or its id."""
    return str(candidate.title or candidate.item_id)


def add_event(history: Mapping[str, list[Any]], item_id: Any, outcome: str, surface: str | None) -> dict[str, list]:
    """The history with one event more, a minute after its last one (at an unknown time where that is unknown)."""
    count = len(history.get("item_id", ()))
    added = {"item_id": item_id, "surface": surface, "timestamp": time_after(history), "outcomes": [outcome]}
    return {name: [*history.get(name, [None] * count), added.get(name)] for name in {**history, **added}}


def time_after(history: Mapping[str, list[Any]]) -> int | None:
    """Seconds since epoch, UTC: when the next thing happens."""
    times = history.get("timestamp")
    return None if not times or times[-1] is None else times[-1] + SECONDS_LATER
