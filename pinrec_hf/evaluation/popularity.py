"""Decayed popularity: the baseline that whatever claims to be personal must beat.

An item's score is its positive events so far, each worth `2 ** (-age / half-life)`; over all surfaces, per
surface, or per surface and outcome (the list is then filled by the surface's outcome budget). `frozen` counts
stop where the split starts; `rolling` counts go on, up to each request's own time, with the events of all
users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pinrec_hf.data.dataset_folder import default_budgets, read_metadata
from pinrec_hf.evaluation.evaluate import Evaluation, evaluate
from pinrec_hf.evaluation.events import UNKNOWN_TIME, encode, flatten_events, iter_split
from pinrec_hf.evaluation.metrics import recall_at_k, target_ranks
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.eligible import seen_rows

SCOPES = ("global", "surface", "surface_outcome")
HOUR, DAY = 3600.0, 86400.0
HALF_LIVES = (6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 4 * DAY, 7 * DAY, 14 * DAY, 30 * DAY, math.inf)
BACKOFF = 1e-6  # a wider scope decides among items that the narrower one does not tell apart
EXPONENTS = (-900.0, 900.0)  # powers of two that stay far from under- and overflow, whatever the log's length


@dataclass(frozen=True)
class PositiveLog:
    """Positive events of all users on known items, oldest first, an entry an outcome; int64 arrays.

    `surface` and `outcome` are codes in `surfaces` and `outcomes` (-1 = a null surface); `time` is in
    seconds, unknown times standing as the oldest known one; `first` (bool) marks each event's first outcome,
    so that events can be counted once. The first `num_before` entries lie before the split, whose start is
    `start` (seconds).
    """

    item_row: np.ndarray
    surface: np.ndarray
    outcome: np.ndarray
    time: np.ndarray
    first: np.ndarray
    num_before: int
    start: int
    surfaces: list[str]
    outcomes: list[str]
    budgets: dict[str, dict[str, float]]
    leave_one_out: bool

    @classmethod
    def read(cls, data_dir: str | Path, catalogue: Catalogue, split: str = "test") -> PositiveLog:
        """Everything up to the split's end: train, the splits between, and the split's own events."""
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}; popularity is evaluated on 'validation' or 'test'")
        metadata = read_metadata(data_dir)
        leave_one_out = metadata["split"]["kind"] == "leave_one_out"
        parts, surfaces, outcomes = [], list(metadata["surfaces"]), list(metadata["outcomes"])
        splits = ("train", "validation", "test")[: 3 if split == "test" else 2]
        # users' leave-one-out splits overlap in time: only what comes before in each user's own order counts
        for name in splits[:-1] if leave_one_out else splits:
            for rows in iter_split(data_dir, name, ["item_id", "surface", "timestamp", "outcomes", "target_start"]):
                events = flatten_events(rows, catalogue, metadata["negative_outcomes"])
                pair = events.positive_event
                inside = (events.item_row[pair] >= 0) & (pair >= events.target_start[events.user[pair]])
                pair = pair[inside]
                outcomes += [outcome for outcome in events.outcome_names if outcome not in outcomes]
                parts.append(
                    (
                        events.item_row[pair],
                        _recode(*encode(events.columns["surface"]), surfaces)[pair],
                        _recode(events.positive_outcome[inside], events.outcome_names, outcomes),
                        events.time[pair],
                        np.diff(pair, prepend=-1) > 0,
                        np.full(len(pair), name != split),
                    )
                )
        row, surface, outcome, time, first, before = map(np.concatenate, zip(*parts, strict=True))
        known = time[time != UNKNOWN_TIME]
        time = np.where(time == UNKNOWN_TIME, known.min() if len(known) else 0, time)
        if leave_one_out:
            start = int(time.max(initial=0))
        else:
            start = int(metadata["split"]["train_end" if split == "validation" else "validation_end"])
        order = np.lexsort([time, ~before])
        return cls(
            item_row=row[order],
            surface=surface[order],
            outcome=outcome[order],
            time=time[order],
            first=first[order],
            num_before=int(before.sum()),
            start=start,
            surfaces=surfaces,
            outcomes=outcomes,
            budgets=default_budgets(metadata),
            leave_one_out=leave_one_out,
        )


class DecayedPopularity:
    """Ranks by decayed counts of positive events.

    Args:
        log: from `PositiveLog.read`, for the split to be ranked.
        catalogue: the items that are ranked; those not available at a request's time are left out.
        half_life: seconds in which an event's weight halves; `math.inf` = all-time popularity.
        scope: `"global"`, `"surface"` or `"surface_outcome"`.
        rolling: count up to each request's time instead of the split's start.
        history_lag: seconds that rolling counts lag behind a request's time.

    Raises:
        ValueError: an unknown scope, a half-life that is not positive, or rolling counts of a leave-one-out
            split, in which a user's targets lie earlier than other users' train events.
    """

    def __init__(
        self,
        log: PositiveLog,
        catalogue: Catalogue,
        *,
        half_life: float = DAY,
        scope: str = "surface",
        rolling: bool = False,
        history_lag: int = 0,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; choose one of {SCOPES}")
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life} s; give a positive number of seconds or math.inf")
        if rolling and log.leave_one_out:
            raise ValueError("a leave-one-out split has no common clock to roll on; use rolling=False")
        self.log, self.catalogue = log, catalogue
        self.half_life, self.scope, self.rolling, self.history_lag = half_life, scope, rolling, history_lag
        num_surfaces, num_outcomes = len(log.surfaces), len(log.outcomes)
        # one row of scores a cell: all surfaces together, then each surface, then each surface and outcome
        cells = {"global": 1, "surface": 1 + num_surfaces}.get(scope, 1 + num_surfaces * (1 + num_outcomes))
        self._scores = np.zeros((cells, len(catalogue)))
        self._add(self._scores, 0, log.num_before)
        self._available = None
        if catalogue.has_availability:
            self._available = catalogue.availability(np.arange(len(catalogue)))

    @classmethod
    def fit(cls, data_dir: str | Path, catalogue: Catalogue, split: str = "test", **settings: Any) -> DecayedPopularity:
        """Count what a sequences dataset holds before `split`; `settings` as for the class."""
        return cls(PositiveLog.read(data_dir, catalogue, split), catalogue, **settings)

    @property
    def name(self) -> str:
        """For tables: what was chosen."""
        half_life = "all time" if math.isinf(self.half_life) else f"{self.half_life / HOUR:g} h"
        scope = {"global": "global", "surface": "per surface", "surface_outcome": "per surface and outcome"}
        return f"popularity {scope[self.scope]}, {half_life}, {'rolling' if self.rolling else 'frozen'}"

    def rank(self, requests: Sequence[dict[str, Any]], k: int) -> np.ndarray:
        """Most popular unseen, available items: int64 (requests, k), -1 where fewer were ever acted on.

        Raises:
            ValueError: a request without a `timestamp`, with rolling counts.
        """
        return self.rank_unseen(requests, [seen_rows(request, self.catalogue) for request in requests], k)

    def rank_unseen(self, requests: Sequence[dict[str, Any]], seen: Sequence[np.ndarray], k: int) -> np.ndarray:
        """As `rank`, with the seen rows of every request given."""
        ranked = np.full((len(requests), k), -1, dtype=np.int64)
        times = [request.get("timestamp") for request in requests]
        scores, counted = self._scores, self.log.num_before
        turns = np.arange(len(requests))
        if self.rolling:
            if None in times:
                raise ValueError(
                    f"request {times.index(None)} has no 'timestamp', up to which rolling counts go; give it "
                    "one or use rolling=False"
                )
            scores = scores.copy()
            newest = np.array(times, dtype=np.int64) - max(1, self.history_lag)
            turns = np.argsort(newest, kind="stable")
            upto = counted + np.searchsorted(self.log.time[counted:], newest, side="right")
        orders: dict[Any, np.ndarray] = {}  # best rows of a surface, good until something is counted
        for turn in turns.tolist():
            if self.rolling and upto[turn] > counted:
                self._add(scores, counted, upto[turn])
                counted = upto[turn]
                orders.clear()
            request, depth = requests[turn], k + len(seen[turn])
            budget = request.get("outcome_budget") or {}
            key = request.get("surface"), tuple(sorted(budget.items()))
            while True:
                if key not in orders or (orders[key].size < depth and orders[key].size < len(self.catalogue)):
                    orders[key] = self._order(scores, request.get("surface"), budget, depth)
                rows = orders[key]
                free = ~np.isin(rows, seen[turn])
                if self._available is not None and times[turn] is not None:
                    free &= (self._available[rows, 0] <= times[turn]) & (times[turn] < self._available[rows, 1])
                best = rows[free][:k]
                best = best[best >= 0]
                if len(best) == k or rows.size >= len(self.catalogue) or rows[-1] < 0:
                    break
                depth = min(4 * rows.size + 16, len(self.catalogue))
            ranked[turn, : len(best)] = best
        return ranked

    def _add(self, scores: np.ndarray, start: int, end: int) -> None:
        """Count the log's entries start to end."""
        log, size = self.log, scores.shape[1]
        # weights grow with time instead of shrinking with age: the order of items is the same at every moment
        exponent = np.clip((log.time[start:end] - log.start) / self.half_life, *EXPONENTS)
        weight, row = np.exp2(exponent), log.item_row[start:end]
        surface, outcome, first = log.surface[start:end], log.outcome[start:end], log.first[start:end]
        once = np.where(first, weight, 0.0)
        flat = scores.reshape(-1)
        np.add.at(flat, row, once)
        if self.scope == "global":
            return
        known = surface >= 0
        np.add.at(flat, ((1 + surface) * size + row)[known], once[known])
        if self.scope == "surface_outcome":
            cell = 1 + len(log.surfaces) + surface * len(log.outcomes) + outcome
            np.add.at(flat, (cell * size + row)[known], weight[known])

    def _order(self, scores: np.ndarray, surface: str | None, budget: dict[str, float], depth: int) -> np.ndarray:
        """The best `depth` rows for a surface, best first; -1 from where nothing was ever counted."""
        log, depth = self.log, min(depth, scores.shape[1])
        if self.scope == "global" or surface not in log.surfaces:
            return _best(scores[0], depth)
        code = log.surfaces.index(surface)
        own = scores[1 + code] + BACKOFF * scores[0]
        budget = budget or log.budgets.get(surface, {})
        wanted = [name for name in log.outcomes if budget.get(name, 0) > 0]
        if self.scope == "surface" or not wanted:
            return _best(own, depth)
        cells = 1 + len(log.surfaces) + code * len(log.outcomes) + np.arange(len(log.outcomes))
        # the item at place r of an outcome's list is due at (r + 1/2) / share: at any depth, the slots taken
        # so far are divided by the budget (Webster's method); an item in several lists stands at its earliest
        # place
        due = np.full(scores.shape[1], np.inf)
        for name in wanted:
            rows = _best(scores[cells[log.outcomes.index(name)]] + BACKOFF * own, depth)
            rows = rows[rows >= 0]
            due[rows] = np.minimum(due[rows], (np.arange(len(rows)) + 0.5) / budget[name])
        order = np.argsort(due, kind="stable")[:depth]
        return np.where(np.isinf(due[order]), -1, order)


@dataclass(frozen=True)
class BestPopularity:
    """The popularity that did best on validation, what was tried, and its evaluation on the split."""

    ranker: DecayedPopularity
    trials: list[dict[str, Any]]
    evaluation: Evaluation


def best_popularity(
    data_dir: str | Path,
    catalogue: Catalogue,
    *,
    rolling: bool | None = None,
    k: int = 50,
    ks: Sequence[int] = (10, 50),
    split: str = "test",
    requests: Requests | None = None,
    history_lag: int = 0,
    max_users: int | None = None,
    half_lives: Sequence[float] = HALF_LIVES,
    categories: np.ndarray | None = None,
    progress: bool = True,
) -> BestPopularity:
    """Choose scope and half-life by recall@k on validation, then evaluate on `split`.

    Args:
        rolling: whether counts roll on; None = this, too, is chosen on validation.
        requests: the split's requests, where they are already loaded (needed for `compare`); else they are
            read.
        history_lag, max_users: as in `load_requests`, for both splits; rolling counts lag as histories do.
        categories: as in `evaluate`.
    """
    options: dict[str, Any] = {"history_lag": history_lag, "max_users": max_users}
    validation = load_requests(data_dir, "validation", catalogue, **options)
    log = PositiveLog.read(data_dir, catalogue, "validation")
    every, seen = [], []
    for request in validation.requests:  # histories are looked at once, not in every trial
        seen.append(seen_rows(request, catalogue))
        every.append({name: value for name, value in request.items() if name != "history"})
    modes = [rolling] if rolling is not None else [False] if log.leave_one_out else [False, True]
    trials: list[dict[str, Any]] = [
        {"scope": scope, "half_life": half_life, "rolling": mode}
        for scope in SCOPES
        for half_life in half_lives
        for mode in modes
    ]
    for trial in tqdm(trials, desc="choosing popularity", unit="trial", disable=not progress):
        ranker = DecayedPopularity(log, catalogue, history_lag=history_lag, **trial)
        ranked = ranker.rank_unseen(every, seen, min(k, len(catalogue)))
        ranks = target_ranks(ranked, validation.request_index, validation.item_row)
        trial[f"recall@{k}"] = recall_at_k(ranks, k)
    best = max(trials, key=lambda trial: trial[f"recall@{k}"])
    settings = {name: best[name] for name in ("scope", "half_life", "rolling")}
    ranker = DecayedPopularity.fit(data_dir, catalogue, split, history_lag=history_lag, **settings)
    requests = requests or load_requests(data_dir, split, catalogue, **options)
    evaluation = evaluate(
        ranker, requests, catalogue, ks=ks, name=ranker.name, categories=categories, progress=progress
    )
    return BestPopularity(ranker, trials, evaluation)


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Rows of the `depth` highest scores, best first, equal scores by row; -1 where the score is 0."""
    least = np.partition(scores, -depth)[-depth] if depth < len(scores) else -np.inf
    rows = np.flatnonzero(scores >= least)  # of those that tie with the last the first rows, whatever the depth
    rows = rows[np.argsort(-scores[rows], kind="stable")][:depth]
    return np.where(scores[rows] > 0, rows, -1)


def _recode(codes: np.ndarray, names: list[str], vocabulary: list[str]) -> np.ndarray:
    """Codes of names as codes in the vocabulary: int64, -1 = null or not in it."""
    table = [vocabulary.index(name) if name in vocabulary else -1 for name in names]
    return np.array([*table, -1], dtype=np.int64)[codes]
