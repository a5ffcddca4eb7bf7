"""`pinrec index --tune`: recall against time over search settings, and the smallest setting that reaches a recall."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.data.output import replaced
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import generate_requests
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.users import UserFiles

QUERIES, K = 500, 100
SATURATED = 0.999  # of the recall: a larger setting only takes longer
Frontier = list[dict[str, Any]]


def real_queries(model: PinRecModel, tokenizer: PinRecTokenizer, data: str | os.PathLike[str]) -> np.ndarray:
    """Query embeddings float32 `(about 500, d)` of the last requests of users in a dataset's validation split.

    Raises:
        FileNotFoundError: no such split.
    """
    files = UserFiles(Path(data) / "validation", tokenizer)
    requests = []
    for request in files.requests(next(files.batches(QUERIES))):
        columns = {name: values for name, values in request["history"].items() if values is not None}
        last = {name: columns[name][-1] for name in ("surface", "timestamp")}
        requests.append({"history": {name: values[:-1] for name, values in columns.items()}, **last})
    generated = generate_requests(model, tokenizer, requests, num_steps=1)
    return np.concatenate([by.embeddings for by in generated])[:QUERIES]


def measure_point(
    index: ItemIndex, queries: np.ndarray, k: int = K, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """The index's search setting, its `recall` of the exact k best, `recall_of_half` where a random half of the items
    passes a filter, and `p50_ms` and `p90_ms` of one query at a time without a filter.

    Args:
        queries: float32 `(m, dimension)`. clock: in seconds.
    """
    return _point(index, queries, _exact(index, queries, k), clock)


def measure_frontier(
    index: ItemIndex, queries: np.ndarray, k: int = K, clock: Callable[[], float] = time.perf_counter
) -> Frontier:
    """[`measure_point`] of each search setting, by rising setting, up to the first that finds next to all; the index's
    own setting is as before."""
    exact = _exact(index, queries, k)
    before = index.neighbours.setting
    frontier = []
    for setting in index.neighbours.settings() or [before]:
        index.neighbours.setting = setting
        frontier.append(_point(index, queries, exact, clock))
        if _least_recall(frontier[-1]) >= SATURATED:
            break
    index.neighbours.setting = before
    return frontier


def _exact(index: ItemIndex, queries: np.ndarray, k: int) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """Filters, none and a random half, each with int64 `(m, k)` catalogue rows of the k best that pass it; fewer where
    fewer pass."""
    half = np.random.default_rng(0).random(int(index.rows.max()) + 1) < 0.5
    exact: list[tuple[np.ndarray | None, np.ndarray]] = []
    for allowed in (None, half):
        places = index.live.places if allowed is None else np.flatnonzero(index.live.mask & allowed[index.rows])
        best = index.vectors.nearest(queries, places, min(k, len(places)))[1]
        exact.append((allowed, index.rows[best]))
    return exact


def _point(
    index: ItemIndex,
    queries: np.ndarray,
    exact: list[tuple[np.ndarray | None, np.ndarray]],
    clock: Callable[[], float],
) -> dict[str, Any]:
    seconds: list[float] = []
    recalls = []
    for allowed, best in exact:
        hits = []
        for query, rows in zip(queries, best, strict=True):
            start = clock()
            found = index.search(query[None], max(1, len(rows)), allowed=allowed)[1]
            if allowed is None:
                seconds.append(clock() - start)
            hits.append(np.isin(rows, found).mean() if len(rows) else 1.0)
        recalls.append(float(np.mean(hits)))
    p50, p90 = 1000 * np.percentile(seconds, [50, 90])
    return {
        "setting": index.neighbours.setting, "recall": recalls[0], "recall_of_half": recalls[1],
        "p50_ms": float(p50), "p90_ms": float(p90),
    }  # fmt: skip


def _least_recall(point: dict[str, Any]) -> float:
    return min(point["recall"], point["recall_of_half"])


def tune(
    index: ItemIndex, queries: np.ndarray, recall: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Any], Frontier]:
    """Give the index the smallest setting that reaches `recall` with and without a filter, or the best there is.

    A random half stands for filters: the search goes as much further as fewer items pass, and where that was measured,
    fewer than half cost less recall.

    Returns:
        The point that was chosen, and the frontier.

    Raises:
        ValueError: a recall outside (0, 1].
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; ask for more than 0 and at most 1")
    frontier = measure_frontier(index, queries, clock=clock)
    reaching = [point for point in frontier if _least_recall(point) >= recall]
    chosen = reaching[0] if reaching else max(frontier, key=_least_recall)
    index.neighbours.setting = chosen["setting"]
    return chosen, frontier


def write_frontier(folder: str | os.PathLike[str], kind: str, chosen: dict[str, Any], frontier: Frontier) -> None:
    """`index_frontier.json` and `index_frontier.png` (extra `report`)."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    json_path, picture_path = (Path(folder) / f"index_frontier.{end}" for end in ("json", "png"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point["recall"] for point in frontier], [point["p50_ms"] for point in frontier], marker="o")
    axes.plot(chosen["recall"], chosen["p50_ms"], "o", ms=11, mfc="none", label=f"chosen: {chosen['setting']}")
    axes.set(xlabel=f"recall@{K} of the exact search", ylabel="one query, median (ms)", yscale="log", title=kind)
    axes.legend()
    with replaced(json_path) as table, replaced(picture_path) as picture:
        table.write_text(json.dumps({"kind": kind, "k": K, "chosen": chosen, "frontier": frontier}, indent=2))
        figure.savefig(picture, format="png", dpi=120)
