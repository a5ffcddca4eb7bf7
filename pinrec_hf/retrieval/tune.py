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
    """The index's search setting, its `recall` of the exact k best, and `p50_ms` and `p90_ms` of one query at a time.

    Args:
        queries: float32 `(m, dimension)`. clock: in seconds.
    """
    return _point(index, queries, exact_rows(index, queries, k), clock)


def measure_frontier(
    index: ItemIndex, queries: np.ndarray, k: int = K, clock: Callable[[], float] = time.perf_counter
) -> Frontier:
    """[`measure_point`] of each search setting, by rising setting, up to the first that finds next to all; the index's
    own setting is as before."""
    best = exact_rows(index, queries, k)
    before = index.neighbours.setting
    frontier = []
    for setting in index.neighbours.settings() or [before]:
        index.neighbours.setting = setting
        frontier.append(_point(index, queries, best, clock))
        if frontier[-1]["recall"] >= SATURATED:
            break
    index.neighbours.setting = before
    return frontier


def exact_rows(index: ItemIndex, queries: np.ndarray, k: int) -> np.ndarray:
    """int64 `(m, k)` catalogue rows of the k best, by an exact search; fewer where the index holds fewer."""
    return index.rows[index.vectors.nearest(queries, index.live.places, min(k, len(index)))[1]]


def _point(index: ItemIndex, queries: np.ndarray, best: np.ndarray, clock: Callable[[], float]) -> dict[str, Any]:
    seconds, hits = [], []
    for query, rows in zip(queries, best, strict=True):
        start = clock()
        found = index.search(query[None], len(rows))[1]
        seconds.append(clock() - start)
        hits.append(np.isin(rows, found).mean())
    p50, p90 = 1000 * np.percentile(seconds, [50, 90])
    recall = float(np.mean(hits))
    return {"setting": index.neighbours.setting, "recall": recall, "p50_ms": float(p50), "p90_ms": float(p90)}


def tune(
    index: ItemIndex, queries: np.ndarray, recall: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Any], Frontier]:
    """Give the index the smallest setting that reaches `recall`, or the best there is.

    Returns:
        The point that was chosen, and the frontier.

    Raises:
        ValueError: a recall outside (0, 1].
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; ask for more than 0 and at most 1")
    frontier = measure_frontier(index, queries, clock=clock)
    reaching = [point for point in frontier if point["recall"] >= recall]
    chosen = reaching[0] if reaching else max(frontier, key=lambda point: point["recall"])
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
