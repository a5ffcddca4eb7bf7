"""What recall costs in diversity: systems with a knob, each measured at every setting of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pinrec_hf.evaluation.bootstrap import Interval
from pinrec_hf.evaluation.evaluate import Ranker, evaluate
from pinrec_hf.evaluation.protocol import Requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.mmr import maximal_marginal_relevance


class MMRRanker:
    """One embedding a request, its best candidates picked by maximal marginal relevance.

    Args:
        ranker: gives the candidates and their scores.
        trade_off: lambda of `maximal_marginal_relevance`.
        candidates: so many of the ranker's best are picked from.
        item_vectors: float (items, d), by which items are alike; the catalogue's content vectors by default (by which
            intra-list diversity is measured, too), or the model's own embeddings where it has none.
    """

    def __init__(
        self, ranker: ModelRanker, trade_off: float, candidates: int = 100, item_vectors: np.ndarray | None = None
    ) -> None:
        catalogue = ranker.tokenizer.catalogue
        if item_vectors is None and catalogue.content_size:
            item_vectors = catalogue.vectors(np.arange(len(catalogue)))
        if item_vectors is None:  # without a dot product's last dimensions, the item's biases
            item_vectors = ranker.items[:, : ranker.model.config.hidden_size].numpy()
        self.ranker, self.trade_off, self.candidates, self.item_vectors = ranker, trade_off, candidates, item_vectors

    def rank(self, requests: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        """int64 `(requests, k)` catalogue rows in the order picked, -1 where fewer than k are left."""
        rows, scores = self.ranker.search(requests, max(k, self.candidates))
        ranked = np.full((len(rows), k), -1, np.int64)
        for start in range(0, len(rows), 256):
            part = slice(start, start + 256)
            place = maximal_marginal_relevance(scores[part], self.item_vectors[rows[part]], k, self.trade_off)
            ranked[part] = np.where(place >= 0, np.take_along_axis(rows[part], np.maximum(place, 0), axis=1), -1)
        return ranked


@dataclass(frozen=True)
class FrontierPoint:
    """One setting of a system's knob: recall and diversity of its lists' first k, with intervals over users."""

    system: str
    knob: float
    k: int
    recall: Interval
    diversity: Interval
    coverage: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def measure_frontier(
    systems: Mapping[str, tuple[Callable[[float], Ranker], Sequence[float]]],
    requests: Requests,
    catalogue: Catalogue,
    *,
    k: int = 10,
    item_vectors: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> list[FrontierPoint]:
    """Recall@k against intra-list diversity@k of every system at every setting.

    Args:
        systems: `{name: (make, settings)}`; `make(setting)` gives the ranker, for example
            `{"two-tower + MMR": (lambda trade_off: MMRRanker(two_tower, trade_off), (1, .8, .6, .4))}`.
        requests, catalogue, item_vectors, resamples, seed, progress: as in `evaluate`.

    Raises:
        ValueError: nothing to measure, no vectors to measure diversity by, or what `evaluate` refuses.
    """
    if not systems or not all(len(settings) for _, settings in systems.values()):
        raise ValueError("a frontier needs at least one system, each with at least one setting of its knob")
    if item_vectors is None and not catalogue.content_size:
        raise ValueError("the catalogue has no content vectors to measure diversity by; give item_vectors")
    points = []
    options: dict[str, Any] = {"item_vectors": item_vectors, "resamples": resamples, "seed": seed}
    for name, (make, settings) in systems.items():
        for knob in settings:
            found = evaluate(
                make(knob), requests, catalogue, ks=(k,), name=f"{name} at {knob:g}", progress=progress, **options
            )
            recall, diversity = found.metrics[f"recall@{k}"], found.metrics[f"intra_list_diversity@{k}"]
            points.append(FrontierPoint(name, float(knob), k, recall, diversity, found.coverage[f"coverage@{k}"]))
    return points
