"""From several retrieval queries to k slots: shares to slots, similar queries to one, ranked lists to one.

One request gives many query embeddings (steps x outcomes x offsets). A global top-k over them would favour
one outcome (Multi-Embedding Retrieval, arXiv 2506.23060), so each embedding owns slots, and lists take turns.
"""

from __future__ import annotations

import numpy as np


def allocate_slots(weights: np.ndarray, k: int, kinds: np.ndarray | None = None) -> np.ndarray:
    """Divide k slots in proportion to weights, by largest remainder; ties go to the earlier query.

    Args:
        weights: float of shape `(q,)`, not negative, with a positive sum.
        kinds: int of shape `(q,)`, the outcome of each query: slots are divided over outcomes, then each one's over its
            queries. Without, what many queries of one outcome lose or gain by rounding would add up.

    Returns:
        int64 of shape `(q,)` that sums to k exactly.

    Raises:
        ValueError: k below 1; negative or non-finite weights, or none above 0.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if kinds is not None:
        names = list(dict.fromkeys(kinds.tolist()))
        own = [kinds == name for name in names]
        slots = np.zeros(len(weights), np.int64)
        for queries, share in zip(own, allocate_slots(np.array([weights[q].sum() for q in own]), k), strict=True):
            if share:
                slots[queries] = share if queries.sum() == 1 else allocate_slots(weights[queries], share)
        return slots
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 item")
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"weights are {weights.tolist()}; give finite shares >= 0, at least one above 0")
    quotas = weights / weights.max()  # first, or the sum of tiny or huge weights leaves the range of floats
    quotas *= k / quotas.sum()
    slots = np.floor(quotas + 1e-9).astype(np.int64)  # .7 of 10 slots are 7, whatever the floats say
    remainders = np.round(quotas - slots, 9)
    slots[np.argsort(-remainders, kind="stable")[: k - slots.sum()]] += 1
    return slots


def merge_similar(
    embeddings: np.ndarray, weights: np.ndarray, kinds: np.ndarray, threshold: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """Merge each query, in order, into the most similar kept one of its kind if their cosine is above the threshold.

    A kind is an outcome: the paper merges across outcomes too (v4, section 3.4), which would give the share of one
    that was asked for to another.

    Args:
        embeddings: float of shape `(q, d)`, in the order of generation.
        weights: float of shape `(q,)`; a merged query's weight is added to that of the one it joins.
        kinds: int of shape `(q,)`.

    Returns:
        Indexes of the kept queries, int64 `(kept,)` ascending, and their weights, float64 `(kept,)`.
    """
    embeddings, weights = np.asarray(embeddings, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if embeddings.ndim != 2 or not weights.shape == kinds.shape == embeddings.shape[:1]:
        raise ValueError(
            f"embeddings {embeddings.shape}, weights {weights.shape}, kinds {kinds.shape} differ: (q, d), (q,), (q,)"
        )
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.where(lengths == 0, 1, lengths)
    cosines = np.where(kinds[:, None] == kinds, directions @ directions.T, -np.inf)
    kept: list[int] = []
    total = weights.copy()
    for query in range(len(embeddings)):
        nearest = kept[int(cosines[query, kept].argmax())] if kept else query
        if nearest != query and cosines[query, nearest] > threshold:
            total[nearest] += weights[query]
        else:
            kept.append(query)
    return np.array(kept, dtype=np.int64), total[kept]


def round_robin(
    rows: np.ndarray, scores: np.ndarray, slots: np.ndarray, k: int, kinds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge ranked lists: queries take their best remaining item in turn, as often as they have slots.

    Turns come in proportion to slots (Webster's order), over kinds and then over the queries of a kind: the first items
    of a long list divide as the whole does, and so do those that a filter leaves.
    An item that an earlier turn took costs nothing: the query takes its next one. What the lists cannot fill
    of their own slots is then filled in turn from whatever any list has left.

    Args:
        rows: int64 of shape `(q, m)`, catalogue rows, best first, -1 = none.
        scores: float32 of shape `(q, m)`.
        slots: int64 of shape `(q,)`, as from `allocate_slots`.
        kinds: int of shape `(q,)`, the outcome of each query; by default each is of its own.

    Returns:
        Catalogue rows int64 `(k,)`, all different, in the order taken; their scores float32 `(k,)`; the query
        that brought each, int64 `(k,)`. Only if the lists hold fewer than k items, the rest is -1, -inf, -1.
    """
    rows, scores, slots = np.asarray(rows), np.asarray(scores), np.asarray(slots)
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 item")
    if rows.ndim != 2 or rows.shape != scores.shape or slots.shape != rows.shape[:1]:
        raise ValueError(
            f"rows {rows.shape}, scores {scores.shape}, slots {slots.shape} differ; give (q, m), (q, m), (q,)"
        )
    lists = [enumerate(ranked) for ranked in rows.tolist()]
    names = list(range(len(lists))) if kinds is None else kinds.tolist()
    taken: dict[int, tuple[int, int]] = {}  # row -> query, rank
    for budget in (slots.tolist(), [k] * len(lists)):
        if len(taken) == k:
            break
        for query in _turns(budget, names):
            # the iterator of a list goes on where its last turn ended
            new = next(((rank, row) for rank, row in lists[query] if row >= 0 and row not in taken), None)
            if new is not None:
                taken[new[1]] = (query, new[0])
                if len(taken) == k:
                    break
    merged = np.full(k, -1, dtype=np.int64)
    merged_scores = np.full(k, -np.inf, dtype=np.float32)
    source = np.full(k, -1, dtype=np.int64)
    if taken:
        queries, ranks = np.array(list(taken.values())).T
        merged[: len(taken)] = list(taken)
        merged_scores[: len(taken)] = scores[queries, ranks]
        source[: len(taken)] = queries
    return merged, merged_scores, source


def _turns(slots: list[int], kinds: list[int]) -> list[int]:
    """Whose turn it is, one after the other: Webster's order of the kinds, and of the queries within each."""
    of_kinds = []
    for place, kind in enumerate(dict.fromkeys(kinds)):
        own = [query for query, its in enumerate(kinds) if its == kind]
        queries = [q for _, q in sorted(((turn + 0.5) / slots[q], q) for q in own for turn in range(slots[q]))]
        of_kinds += [((turn + 0.5) / len(queries), place, turn, query) for turn, query in enumerate(queries)]
    return [query for *_, query in sorted(of_kinds)]
