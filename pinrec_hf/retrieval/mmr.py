"""Maximal marginal relevance: a list made diverse after retrieval. A baseline for what several embeddings do.

Source: Carbonell and Goldstein, SIGIR 1998.
"""

from __future__ import annotations

import numpy as np


def maximal_marginal_relevance(scores: np.ndarray, vectors: np.ndarray, k: int, trade_off: float) -> np.ndarray:
    """Pick k of each list's candidates, one at a time, relevant and unlike those picked before.

        next = argmax over the candidates left of
               trade_off * relevance - (1 - trade_off) * max over those picked of cosine

    Relevance is the score scaled to 0..1 within the list, so that it weighs against a cosine whatever the model's
    scale; the first pick is the most relevant.

    Args:
        scores: float `(requests, candidates)`; -inf = no candidate there.
        vectors: float `(requests, candidates, d)`, of any length.
        k: places to fill.
        trade_off: lambda, from 1 (the order of the scores) to 0 (diversity alone after the first pick).

    Returns:
        Places in the candidate lists, int64 `(requests, k)`, in the order picked; -1 where none is left.

    Raises:
        ValueError: shapes that differ, k below 1, a trade-off outside 0..1, NaN or +inf scores.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or np.ndim(vectors) != 3 or np.shape(vectors)[:2] != scores.shape:
        raise ValueError(f"scores {scores.shape} and vectors {np.shape(vectors)} differ; give (n, m) and (n, m, d)")
    if k < 1 or not 0 <= trade_off <= 1:
        raise ValueError(f"k is {k} and trade_off {trade_off}; give at least 1 item and a trade-off from 0 to 1")
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise ValueError("a score is NaN or +inf; give finite scores, and -inf where there is no candidate")
    n, m = scores.shape
    free, request = scores > -np.inf, np.arange(n)
    picked = np.full((n, k), -1, np.int64)
    if not m:
        return picked
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    low = np.where(free, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(free, scores, -np.inf).max(axis=1, keepdims=True)
    spread = np.subtract(high, low, out=np.zeros((n, 1)), where=high > low)
    relevance = np.divide(scores - low, spread, out=np.ones((n, m)), where=free & (spread > 0))
    value, nearest = relevance, np.full((n, m), -np.inf)
    for place in range(min(k, m)):
        best = np.where(free, value, -np.inf).argmax(axis=1)
        left = free[request, best]
        picked[left, place] = best[left]
        free[request, best] = False
        nearest = np.maximum(nearest, np.einsum("nmd,nd->nm", directions, directions[request, best]))
        value = trade_off * relevance - (1 - trade_off) * nearest
    return picked
