"""Retrieval metrics in plain numpy.

Everything starts from `ranked`, an int64 array of catalogue rows of shape (requests, k), best first, -1 where
a list has fewer than k items, and from the targets: `request_index` and `item_row`, int64 arrays of shape
(targets,). A target's rank is its place in its request's list, counted from 0, or -1 where the list lacks it.
Functions that describe a list return one float64 per request, so that the caller can average and resample
them by user.
"""

from __future__ import annotations

import numpy as np


def target_ranks(ranked: np.ndarray, request_index: np.ndarray, item_row: np.ndarray) -> np.ndarray:
    """Place of every target in its request's list: int32 of shape (targets,), from 0, -1 = not in the list.

    >>> target_ranks(np.array([[4, 7, 2], [5, -1, -1]]), np.array([0, 0, 1]), np.array([2, 9, 5])).tolist()
    [2, -1, 0]
    """
    hit = ranked[request_index] == item_row[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), -1).astype(np.int32)


def is_hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """Whether each target is among its list's first k: bool of the shape of `ranks`.

    >>> is_hit(np.array([0, 2, -1]), 2).tolist()
    [True, False, False]
    """
    return (ranks >= 0) & (ranks < k)


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """Share of targets that are in their list's first k; every target counts the same, whatever its request.

        recall@k = |{targets with rank < k}| / |targets|

    With one target a request this is hit rate@k, and recall@k of ranx. Source: PinRec (arXiv 2504.10507),
    offline evaluation.

    >>> recall_at_k(np.array([0, 2, -1, 5]), 3)
    0.5
    """
    return float(is_hit(ranks, k).mean()) if len(ranks) else float("nan")


def unordered_recall_at_k(ranked: np.ndarray, request_index: np.ndarray, item_row: np.ndarray, k: int) -> float:
    """Share of targets that any of a request's embeddings ranks in its own first k.

        unordered recall@k = |{targets with min over embeddings of rank < k}| / |targets|

    `ranked` has shape (requests, embeddings, at least k). It looks at embeddings x k slots, so it grows with
    their number: report it with that number. Source: PinRec (arXiv 2504.10507), unordered recall.

    >>> lists = np.array([[[1, 2], [3, 4]]])
    >>> unordered_recall_at_k(lists, np.array([0, 0]), np.array([3, 2]), 1)
    0.5
    """
    return recall_at_k(unordered_ranks(ranked, request_index, item_row), k)


def unordered_ranks(ranked: np.ndarray, request_index: np.ndarray, item_row: np.ndarray) -> np.ndarray:
    """Best place of every target over its request's embeddings; `ranked` has shape (requests, embeddings, k).

    >>> unordered_ranks(np.array([[[1, 2], [2, 4]]]), np.array([0, 0, 0]), np.array([2, 4, 5])).tolist()
    [0, 1, -1]
    """
    hit = (ranked[request_index] == item_row[:, None, None]).any(axis=1)
    return np.where(hit.any(axis=1), hit.argmax(axis=1), -1).astype(np.int32)


def ndcg_at_k(ranks: np.ndarray, request_index: np.ndarray, k: int, num_requests: int) -> np.ndarray:
    """Normalised discounted cumulative gain with binary relevance: float64 of shape (requests,).

        DCG@k  = sum over a request's targets with rank < k of 1 / log2(rank + 2)
        NDCG@k = DCG@k / sum over j < min(k, number of targets) of 1 / log2(j + 2)

    Source: Jarvelin and Kekalainen, TOIS 2002; as `ranx` computes it. NaN for a request without targets.

    >>> ndcg_at_k(np.array([0, 2]), np.array([0, 0]), 3, 1).round(4).tolist()
    [0.9197]
    """
    gain = np.where(is_hit(ranks, k), 1.0 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)
    gained = np.bincount(request_index, gain, minlength=num_requests)
    ideal = np.concatenate([[np.nan], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
    return gained / ideal[np.minimum(np.bincount(request_index, minlength=num_requests), k)]


def mrr_at_k(ranks: np.ndarray, request_index: np.ndarray, k: int, num_requests: int) -> np.ndarray:
    """Reciprocal rank of a request's first target within k, 0 without one: float64 of shape (requests,).

        RR@k = 1 / (1 + min rank), over targets with rank < k

    MRR is its mean. Source: Voorhees, TREC-8 1999; as `ranx` computes it.

    >>> mrr_at_k(np.array([3, 1, -1]), np.array([0, 0, 1]), 10, 2).tolist()
    [0.5, 0.0]
    """
    reciprocal = np.zeros(num_requests)
    np.maximum.at(reciprocal, request_index, np.where(is_hit(ranks, k), 1.0 / (ranks + 1.0 + (ranks < 0)), 0))
    return reciprocal


def coverage(ranked: np.ndarray) -> int:
    """Number of distinct items in all lists together (aggregate diversity, Adomavicius and Kwon, TKDE 2012).

    >>> coverage(np.array([[1, 2], [2, -1]]))
    2
    """
    return int(np.count_nonzero(np.unique(ranked) >= 0))


def intra_list_diversity(ranked: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """How unlike each other a list's items are: float64 of shape (requests,), NaN for fewer than two items.

        ILD = 1 - mean over pairs i != j of cos(v_i, v_j)

    `vectors` (items, d): any item vectors; a zero vector is unlike everything. Source: Ziegler et al., WWW
    2005, with cosine similarity.

    >>> intra_list_diversity(np.array([[0, 1], [0, 2]]), np.array([[1.0, 0], [0, 1], [2, 0]])).tolist()
    [1.0, 0.0]
    """
    valid = ranked >= 0
    taken = vectors[np.where(valid, ranked, 0)].astype(np.float64)
    length = np.linalg.norm(taken, axis=-1, keepdims=True)
    unit = np.where(valid[..., None], taken / np.where(length > 0, length, 1.0), 0.0)
    size = valid.sum(axis=1)
    # the pairs' cosines are what |sum of unit vectors|^2 holds beside each vector with itself: no k x k
    # matrix needed
    pairs = np.square(unit.sum(axis=1)).sum(axis=-1) - np.square(unit).sum(axis=(1, 2))
    return np.where(size > 1, 1.0 - pairs / np.maximum(size * (size - 1), 1), np.nan)


def head_items(item_counts: np.ndarray, share: float = 0.8) -> np.ndarray:
    """The most popular items that together hold `share` of the interactions: bool of shape (items,).

    The smallest such set; equal counts go by row.

    >>> head_items(np.array([1, 6, 3, 0])).tolist()
    [False, True, True, False]
    """
    order = np.argsort(-item_counts, kind="stable")
    before = np.cumsum(item_counts[order]) - item_counts[order]
    head = np.zeros(len(item_counts), dtype=bool)
    head[order] = (before < share * item_counts.sum()) & (item_counts[order] > 0)
    return head


def tail_share(ranked: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Share of a list's items outside the popular ones: float64 of shape (requests,), NaN for empty lists.

        tail share = |{items of the list outside head}| / |list|

    `head` (items,) comes from `head_items`: the items that hold 80 % of train interactions. Source: average
    percentage of long-tail items, Abdollahpouri et al., FLAIRS 2019.

    >>> tail_share(np.array([[0, 1], [2, -1]]), np.array([True, False, False])).tolist()
    [0.5, 1.0]
    """
    valid = ranked >= 0
    tail = (valid & ~head[np.where(valid, ranked, 0)]).sum(axis=1)
    size = valid.sum(axis=1)
    return np.where(size > 0, tail / np.maximum(size, 1), np.nan)


def category_entropy(ranked: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Shannon entropy, in bits, of a list's categories: float64 of shape (requests,), NaN for empty lists.

        H = - sum over categories c of p_c log2 p_c,  p_c = share of the list's items in c

    `categories` (items,): an integer code per item. Source: Shannon 1948.

    >>> category_entropy(np.array([[0, 1], [0, 2]]), np.array([5, 6, 5])).tolist()
    [1.0, 0.0]
    """
    valid = ranked >= 0
    codes = np.unique(categories, return_inverse=True)[1]
    request = np.nonzero(valid)[0]
    cells, count = np.unique(np.stack([request, codes[ranked[valid]]]), axis=1, return_counts=True)
    size = valid.sum(axis=1)
    share = count / size[cells[0]]
    entropy = np.bincount(cells[0], -share * np.log2(share), minlength=len(ranked)) + 0.0
    return np.where(size > 0, entropy, np.nan)
