"""Measure a retriever on requests: recall by group and the rest, with intervals; compare two retrievers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm.auto import tqdm

from pinrec_hf.evaluation.bootstrap import Difference, Interval, intervals, paired_differences
from pinrec_hf.evaluation.metrics import (
    category_entropy,
    coverage,
    head_items,
    intra_list_diversity,
    is_hit,
    mrr_at_k,
    ndcg_at_k,
    tail_share,
    target_ranks,
    unordered_ranks,
)
from pinrec_hf.evaluation.protocol import Requests
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

HISTORY_BUCKETS = (0, 1, 5, 10, 20, 50, 100)  # lower ends
COLD = "cold (not in train)"


class Ranker(Protocol):
    """Anything that ranks: catalogue rows (requests, k), best first, each once, -1 where fewer than k."""

    def rank(self, requests: list[dict[str, Any]], k: int) -> np.ndarray: ...


@runtime_checkable
class EmbeddingRanker(Ranker, Protocol):
    """A ranker whose embeddings, several a request, each have a list: int64 (requests, embeddings, k)."""

    def rank_each(self, requests: list[dict[str, Any]], k: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """What a ranker did on a split's requests; `to_dict` is what evaluation.json holds.

    Attributes:
        name: the system's name in tables and plots. split: the split. ks: depths of the lists.
        metrics: overall figures by name, such as `recall@10` (a mean over targets), `user_recall@10` (over users),
            `ndcg@10`, `mrr@10`, `tail_share@10`.
        groups: recall by kind of group (`surface`, `outcome`, `surface, outcome`, `history length`, `item
            popularity`), group and metric. A target with several outcomes counts in the group of each.
        coverage: number of distinct items in all lists of each depth.
        embeddings: embeddings per request. slots: places looked at per request at each depth: k for the
            merged list, and embeddings x k for unordered recall.
        requests: what was evaluated. rank_of_target: int32 (targets,), place in the merged list from 0, -1 =
            not in it.
        embedding_rank_of_target: int32 (targets,), best place over the embeddings' own lists; None with one
            embedding.
        per_request: float64 (requests,) arrays behind the list metrics, NaN where a list has none.
    """

    name: str
    split: str
    ks: tuple[int, ...]
    metrics: dict[str, Interval]
    groups: dict[str, dict[str, dict[str, Interval]]]
    coverage: dict[str, int]
    embeddings: int
    slots: dict[str, dict[str, int]]
    requests: Requests = field(repr=False)
    rank_of_target: np.ndarray = field(repr=False)
    embedding_rank_of_target: np.ndarray | None = field(repr=False, default=None)
    per_request: dict[str, np.ndarray] = field(repr=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, ready for JSON."""
        return {
            "name": self.name,
            "split": self.split,
            "ks": list(self.ks),
            "num_requests": len(self.requests),
            "num_targets": len(self.rank_of_target),
            "num_users": len(np.unique(self.requests.user)),
            "dropped_targets": self.requests.dropped,
            "catalogue_size": len(self.requests.item_counts),
            "embeddings_per_request": self.embeddings,
            "slots_per_request": self.slots,
            "coverage": self.coverage,
            "metrics": {name: asdict(figure) for name, figure in self.metrics.items()},
            "groups": {
                kind: {group: {name: asdict(f) for name, f in figures.items()} for group, figures in groups.items()}
                for kind, groups in self.groups.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """System a minus system b, paired by user and seed; `groups` as in `Evaluation`."""

    a: str
    b: str
    seeds: int
    metrics: dict[str, Difference]
    groups: dict[str, dict[str, dict[str, Difference]]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def evaluate(
    ranker: Ranker,
    requests: Requests,
    catalogue: Catalogue,
    *,
    ks: Sequence[int] = (10, 50),
    name: str | None = None,
    item_vectors: np.ndarray | None = None,
    categories: np.ndarray | None = None,
    batch_size: int = 256,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Rank every request once, to the largest k, and measure.

    Args:
        ranker: see `Ranker`; with `rank_each` as well, unordered recall is reported beside recall at equal
            total slots.
        requests: from `load_requests`.
        catalogue: the catalogue whose rows the ranker returns.
        ks: depths; one beyond the catalogue is a list of all of it. NDCG and MRR are at the smallest, which is also
            where diversity is measured.
        name: the system's name; None = the ranker's `name`, or its class's.
        item_vectors: float (items, d) for intra-list diversity; the catalogue's content vectors if None.
            Without either, diversity is left out.
        categories: int (items,), a code of each item's category, as from `item_categories`, for category
            entropy; None = it is left out.
        batch_size, progress: requests per call of `rank`; whether to show a progress bar.
        resamples, seed: of the bootstrap over users.

    Raises:
        ValueError: no k or one below 1, categories of another number of items, or a ranker that
            breaks its contract (shape, rows, doubles).
    """
    if categories is not None and np.shape(categories) != (len(catalogue),):
        raise ValueError(f"categories {np.shape(categories)}: give one code for each of {len(catalogue)} items")
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1:
        raise ValueError(f"ks is {ks}: give one k or more, each at least 1")
    depth = min(ks[-1], len(catalogue))
    name = str(name or getattr(ranker, "name", type(ranker).__name__))
    head = head_items(requests.item_counts)
    lists: list[np.ndarray] = []
    ranks: list[np.ndarray] = []
    embedding_ranks: list[np.ndarray] = []
    diversity: list[np.ndarray] = []
    embeddings = 1
    with tqdm(total=len(requests), desc=f"evaluating {name}", unit="request", disable=not progress) as bar:
        for batch, index, rows in _batches(requests, batch_size):
            ranked = checked_ranking(ranker.rank(batch, depth), (len(batch), depth), len(catalogue), name)
            lists.append(ranked)
            ranks.append(target_ranks(ranked, index, rows))
            diversity.append(_diversity(ranked[:, : ks[0]], catalogue, item_vectors))
            if isinstance(ranker, EmbeddingRanker):
                each = np.asarray(ranker.rank_each(batch, depth))
                embeddings = each.shape[1]
                embedding_ranks.append(unordered_ranks(each, index, rows))
            bar.update(len(batch))
    ranked = np.concatenate(lists)
    per_request = {f"tail_share@{k}": tail_share(ranked[:, :k], head) for k in ks}
    spread = np.concatenate(diversity)
    if not np.isnan(spread).all():
        per_request[f"intra_list_diversity@{ks[0]}"] = spread
    if categories is not None:
        per_request[f"category_entropy@{ks[0]}"] = category_entropy(ranked[:, : ks[0]], categories)
    result = Evaluation(
        name=name,
        split=requests.split,
        ks=ks,
        metrics={},
        groups={},
        coverage={f"coverage@{k}": coverage(ranked[:, :k]) for k in ks},
        embeddings=embeddings,
        slots={
            "merged": {f"@{k}": k for k in ks},
            **({"unordered": {f"@{k}": embeddings * k for k in ks}} if embedding_ranks else {}),
        },
        requests=requests,
        rank_of_target=np.concatenate(ranks),
        embedding_rank_of_target=np.concatenate(embedding_ranks) if embedding_ranks else None,
        per_request=per_request,
    )
    names, tops, bottoms = _user_sums(result)
    _place(names, intervals(tops, bottoms, resamples=resamples, seed=seed), result.metrics, result.groups)
    return result


def compare(
    a: Evaluation | Sequence[Evaluation],
    b: Evaluation | Sequence[Evaluation],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Differences a - b of all figures that both have, with intervals and the smallest detectable effect.

    Args:
        a, b: an evaluation, or one per training seed in the same order; all on the same requests. A system of
            one seed is paired with every seed of the other.

    Raises:
        ValueError: other requests, other depths, or seeds that do not pair.
    """
    systems = [[a] if isinstance(a, Evaluation) else list(a), [b] if isinstance(b, Evaluation) else list(b)]
    first = systems[0][0]
    for other in systems[0] + systems[1]:
        same = all(
            np.array_equal(getattr(first.requests, part), getattr(other.requests, part))
            for part in ("request_index", "item_row", "user")
        )
        if not same or first.ks != other.ks:
            raise ValueError(
                f"{first.name!r} and {other.name!r} were evaluated on other requests or depths and cannot be "
                "paired; evaluate both on the same `Requests` with the same ks"
            )
    sums = [[_user_sums(evaluation) for evaluation in system] for system in systems]
    shared = [key for key in sums[0][0][0] if all(key in names for system in sums for names, _, _ in system)]

    def stacked(system: list[_Sums]) -> tuple[np.ndarray, np.ndarray]:
        places = [[names.index(key) for key in shared] for names, _, _ in system]
        tops = [top[:, place] for (_, top, _), place in zip(system, places, strict=True)]
        bottoms = [bottom[:, place] for (_, _, bottom), place in zip(system, places, strict=True)]
        return np.stack(tops), np.stack(bottoms)

    differences = paired_differences(stacked(sums[0]), stacked(sums[1]), resamples=resamples, seed=seed)
    result = Comparison(first.name, systems[1][0].name, max(map(len, systems)), {}, {})
    _place(shared, differences, result.metrics, result.groups)
    return result


_Key = tuple[str, str, str]  # kind of group, group, metric; the overall figures have "" for the first two
_Sums = tuple[list[_Key], np.ndarray, np.ndarray]


def _user_sums(evaluation: Evaluation) -> _Sums:
    """All figures as sums a user, float64 (users, figures): names, numerators, denominators."""
    requests = evaluation.requests
    users, user = np.unique(requests.user, return_inverse=True)
    first = np.unique(requests.request_index, return_index=True)[1]
    request_user = user[first]
    names: list[_Key] = []
    tops: list[np.ndarray] = []
    bottoms: list[np.ndarray] = []

    def add(key: _Key, of: np.ndarray, value: np.ndarray) -> None:
        good = ~np.isnan(value)
        names.append(key)
        tops.append(np.bincount(of[good], value[good], minlength=len(users)))
        bottoms.append(np.bincount(of[good], minlength=len(users)).astype(np.float64))

    ranked = {"recall": evaluation.rank_of_target}
    if evaluation.embedding_rank_of_target is not None:
        ranked["unordered_recall"] = evaluation.embedding_rank_of_target
    everything = np.ones(len(user), dtype=bool)
    for kind, group, members in [("", "", everything), *_groups(requests)]:
        for k in evaluation.ks:
            for metric, ranks in ranked.items():
                hits = is_hit(ranks, k)[members].astype(np.float64)
                add((kind, group, f"{metric}@{k}"), user[members], hits)
    for k in evaluation.ks:  # every user the same, however many targets
        hits = is_hit(evaluation.rank_of_target, k)
        share = np.bincount(user, hits, minlength=len(users)) / np.bincount(user, minlength=len(users))
        add(("", "", f"user_recall@{k}"), np.arange(len(users)), share)
    k = evaluation.ks[0]
    for metric, function in (("ndcg", ndcg_at_k), ("mrr", mrr_at_k)):
        scores = function(evaluation.rank_of_target, requests.request_index, k, len(requests))
        add(("", "", f"{metric}@{k}"), request_user, scores)
    for metric, scores in evaluation.per_request.items():
        add(("", "", metric), request_user, scores)
    return names, np.stack(tops, axis=1), np.stack(bottoms, axis=1)


def _groups(requests: Requests) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, group, mask over targets) of every group that has targets, in the order of tables and plots."""
    surface = np.array(["unknown" if name is None else name for name in requests.surface], dtype=object)
    lengths = [len(names) for names in requests.outcomes]
    target = np.repeat(np.arange(len(lengths)), lengths)
    outcome = np.array([name for names in requests.outcomes for name in names], dtype=object)
    surfaces, outcomes = _frequent_first(surface), _frequent_first(outcome)
    for name in surfaces:
        yield "surface", name, surface == name
    having = {name: np.zeros(len(surface), dtype=bool) for name in outcomes}
    for name in outcomes:
        having[name][target[outcome == name]] = True
        yield "outcome", name, having[name]
    for name in surfaces:
        for other in outcomes:
            if (both := (surface == name) & having[other]).any():
                yield "surface, outcome", f"{name}, {other}", both
    buckets = np.digitize(requests.history_length, HISTORY_BUCKETS) - 1
    for bucket in np.unique(buckets):
        yield "history length", _bucket_name(bucket), buckets == bucket
    quartile = popularity_quartiles(requests.item_counts)[requests.item_row]
    for code, name in enumerate([COLD, "1 (least popular)", "2", "3", "4 (most popular)"]):
        if (members := quartile == code).any():
            yield "item popularity", name, members


def popularity_quartiles(item_counts: np.ndarray) -> np.ndarray:
    """Quartile of every item by its positive events in train: int64 (items,), 1 = fewest, 0 = none at all.

    Four groups of as many items each, of those that occur in train; equal counts go by row.

    >>> popularity_quartiles(np.array([0, 9, 1, 5, 3])).tolist()
    [0, 4, 1, 3, 2]
    """
    order = np.argsort(item_counts, kind="stable")
    warm = order[item_counts[order] > 0]
    quartile = np.zeros(len(item_counts), dtype=np.int64)
    quartile[warm] = 1 + 4 * np.arange(len(warm)) // max(len(warm), 1)
    return quartile


def _bucket_name(bucket: int) -> str:
    low = HISTORY_BUCKETS[bucket]
    if bucket + 1 == len(HISTORY_BUCKETS):
        return f"{low}+"
    high = HISTORY_BUCKETS[bucket + 1] - 1
    return str(low) if low == high else f"{low}-{high}"


def _frequent_first(names: np.ndarray) -> list[str]:
    distinct, counts = np.unique(names.astype(str), return_counts=True)
    return [str(name) for name in distinct[np.argsort(-counts, kind="stable")]]


def _batches(requests: Requests, size: int) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, np.ndarray]]:
    """Batches of requests with their targets: index within the batch, and catalogue row."""
    for start in range(0, len(requests), size):
        batch = list(requests.requests[start : start + size])
        low, high = np.searchsorted(requests.request_index, [start, start + len(batch)])
        yield batch, requests.request_index[low:high] - start, requests.item_row[low:high]


def checked_ranking(ranked: np.ndarray, shape: tuple[int, int], num_items: int, name: str) -> np.ndarray:
    """A ranker's answer as int64, refused where it would give a wrong figure.

    Raises:
        ValueError: another shape or type, rows that the catalogue lacks, an item twice for one request.
    """
    ranked = np.asarray(ranked)
    if ranked.shape != shape or ranked.dtype.kind not in "iu":
        raise ValueError(f"{name}.rank gave {ranked.dtype} of shape {ranked.shape}; it must give int64 {shape}")
    if ranked.size and not -1 <= ranked.min() <= ranked.max() < num_items:
        raise ValueError(f"{name}.rank gave row {ranked.max()} (least {ranked.min()}) of {num_items} items")
    ordered = np.sort(ranked, axis=1)
    double = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if double.any():
        request, place = np.argwhere(double)[0]
        raise ValueError(f"{name}.rank gave row {ordered[request, place]} twice for one request; drop doubles")
    return ranked.astype(np.int64)


def _diversity(ranked: np.ndarray, catalogue: Catalogue, item_vectors: np.ndarray | None) -> np.ndarray:
    """Intra-list diversity of the lists, reading only their items' vectors; NaN without vectors."""
    rows, place = np.unique(ranked, return_inverse=True)
    place = place.reshape(ranked.shape) - np.count_nonzero(rows < 0)
    rows = rows[rows >= 0]
    read: Callable[[np.ndarray], np.ndarray] = catalogue.vectors if item_vectors is None else item_vectors.__getitem__
    if (item_vectors is None and not catalogue.content_size) or not len(rows):
        return np.full(len(ranked), np.nan)
    return intra_list_diversity(np.where(ranked < 0, -1, place), read(rows))


def _place(
    names: list[_Key],
    figures: Sequence[Any],
    metrics: dict[str, Any],
    groups: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """Sort figures into the overall ones and those of groups."""
    for (kind, group, metric), figure in zip(names, figures, strict=True):
        if kind:
            groups.setdefault(kind, {}).setdefault(group, {})[metric] = figure
        else:
            metrics[metric] = figure
