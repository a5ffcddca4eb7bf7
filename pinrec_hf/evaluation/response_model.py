"""The ranker behind two retrievers in an online test: what will this user do with this impression?

A small network on features that any production ranker has, learned from a log's impressions and from nothing else:
popularity of the item per surface and outcome (counted on the days before), likeness of its content to what the user
liked, was shown and asks for, how often it was shown to them, its age, and the position it was shown at. Every
retriever's candidates pass the same fitted model, so what differs downstream is the retriever's doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pinrec_hf.data.dataset_folder import build_query_catalogue, read_metadata
from pinrec_hf.evaluation.events import UNKNOWN_TIME, encode, flatten_events, iter_split, read_split
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

DAY = 86_400
PRIOR = 20.0  # impressions at the surface's mean rate that every item starts with
RECENT_LIKED, RECENT_SHOWN = 3, 32
HIDDEN, EPOCHS, BATCH, LEARNING_RATE = 32, 12, 512, 3e-3


@dataclass(frozen=True)
class _Situations:
    """n requests as arrays. Request i's history is `liked[liked_range[0, i] : liked_range[1, i]]`, oldest first.

    surface (n,) int64: code, -1 = unknown. time (n,) int64: seconds. context float32 (n, d): direction of the query's
    vector or the subject item's, 0 without. liked, shown int64: catalogue rows of all histories, one after another.
    """

    surface: np.ndarray
    time: np.ndarray
    context: np.ndarray
    liked: np.ndarray
    liked_range: np.ndarray
    shown: np.ndarray
    shown_range: np.ndarray


class ResponseModel:
    """P(outcome) of an impression; make one with `fit`.

    Attributes:
        outcomes: their names, the columns of `predict`. validation_auc: per outcome, on impressions of the validation
            days; NaN where all or none had it.
    """

    def __init__(self, data_dir: str | Path, catalogue: Catalogue) -> None:
        metadata = read_metadata(data_dir)
        if metadata["split"]["kind"] != "time":
            raise ValueError(f"{data_dir} was split leave-one-out; a response model needs days: prepare it by time")
        if not catalogue.content_size:
            raise ValueError(f"the items of {data_dir} have no vectors; a response model compares contents")
        self.catalogue, self.queries = catalogue, build_query_catalogue(data_dir)
        self.surfaces, self.outcomes = list(metadata["surfaces"]), list(metadata["outcomes"])
        self.negative = list(metadata["negative_outcomes"])
        self.items = _directions(catalogue.vectors(np.arange(len(catalogue))))
        self.available_from = catalogue.availability(np.arange(len(catalogue)))[:, 0]
        self.values = torch.tensor([-1.0 if name in self.negative else 1.0 for name in self.outcomes])
        self.validation_auc: dict[str, float] = {}
        self._data_dir, self._train_end = Path(data_dir), int(metadata["split"]["train_end"])
        self._count()

    @classmethod
    def fit(cls, data_dir: str | Path, catalogue: Catalogue, *, max_users: int = 2_000, seed: int = 0) -> ResponseModel:
        """Learn from the train impressions of a sequences dataset; the best epoch is chosen on validation.

        Args:
            data_dir: a sequences dataset with ignored impressions and known times. catalogue: of its items.
            max_users: a random sample of this many users of each split; item popularity counts all of train.
            seed: of the sample, the network and the order of batches: the same seed, the same model.

        Raises:
            ValueError: a leave-one-out split, items without vectors, or no impression that was ignored.
        """
        model = cls(data_dir, catalogue)
        train, train_labels = model._examples("train", max_users, seed)
        if train_labels.any(axis=1).all():
            raise ValueError(f"{data_dir} has no ignored impressions in train; a response model needs them")
        validation, validation_labels = model._examples("validation", max_users, seed)
        model._learn(train, train_labels, validation, validation_labels, seed)
        return model

    @torch.inference_mode()
    def predict(self, requests: Sequence[Mapping[str, Any]], rows: np.ndarray) -> np.ndarray:
        """Probabilities float32 `(requests, m, outcomes)` of each outcome, were the item shown on top.

        Args:
            requests: dicts of the request schema, with times. rows: int64 `(requests, m)` catalogue rows, -1 = none.
        """
        there = rows >= 0
        owner = np.nonzero(there)[0]
        features = self._features(self._situations(requests), owner, rows[there], np.zeros(len(owner)))
        found = np.full((*rows.shape, len(self.outcomes)), np.nan, np.float32)
        found[there] = torch.sigmoid(self.network((torch.from_numpy(features) - self.mean) / self.spread)).numpy()
        return found

    def best(self, requests: Sequence[Mapping[str, Any]], rows: np.ndarray) -> np.ndarray:
        """`rows` in the order of expected positive minus expected negative outcomes, -1 last."""
        value = self.predict(requests, rows) @ self.values.numpy()
        order = np.argsort(np.where(rows >= 0, -value, np.inf), axis=1, kind="stable")
        return np.take_along_axis(rows, order, axis=1)

    # -- what is known about an impression -------------------------------------------------------------------------

    def _features(self, s: _Situations, owner: np.ndarray, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """float32 (pairs, features) of item `row` in situation `owner`, both int64 (pairs,)."""
        day = np.clip((s.time[owner] - self._first_day) // DAY, 0, len(self._counts) - 1)
        surface = s.surface[owner]
        columns = []
        for counts, rates in (
            (self._counts[day, surface, row], self._rates[surface]),  # an unknown surface, -1, is the last: all
            (self._counts[day, -1, row], self._rates[[-1]]),
        ):
            smoothed = (counts[:, 1:] + PRIOR * rates) / (counts[:, :1] + PRIOR)
            columns += [np.log(smoothed / rates), np.log1p(counts[:, :1])]
        liked = _means(self.items, s.liked, s.liked_range, RECENT_LIKED)
        everything = _means(self.items, s.liked, s.liked_range, None)
        recent = _means(self.items, s.shown, s.shown_range, RECENT_SHOWN)
        item = self.items[row]
        columns += [np.einsum("pd,pd->p", p[owner], item)[:, None] for p in (liked, everything, recent, s.context)]
        born = self.available_from[row]
        known = born > np.iinfo(np.int64).min
        age = np.where(known, (s.time[owner] - np.where(known, born, 0)) / DAY, 0.0)
        columns += [
            np.log1p(_times_shown(s, owner, row, len(self.items)))[:, None],
            np.log1p(s.liked_range[1] - s.liked_range[0])[owner, None],
            known[:, None],
            np.log1p(np.maximum(age, 0))[:, None],
            np.log1p(position)[:, None],
            surface[:, None] == np.arange(len(self.surfaces)),
        ]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def _count(self) -> None:
        """Cumulative counts float32 (days, surfaces + all, items, impressions + outcomes) before each day of train."""
        parts = []
        for rows in iter_split(self._data_dir, "train"):
            events = flatten_events(rows, self.catalogue)
            shown = np.flatnonzero((events.item_row >= 0) & (events.time > UNKNOWN_TIME))
            labels = self._labels(events.columns["outcomes"])[shown]
            parts.append((events.item_row[shown], self._surface_codes(events)[shown], events.time[shown], labels))
        row, surface, time, labels = map(np.concatenate, zip(*parts, strict=True))
        self._first_day = int(time.min()) // DAY * DAY
        day = (time - self._first_day) // DAY
        days = (self._train_end - self._first_day - 1) // DAY + 2
        counts = np.zeros((days, len(self.surfaces) + 1, len(self.items), 1 + len(self.outcomes)), np.float32)
        seen = np.concatenate([np.ones((len(row), 1), bool), labels], axis=1)
        event, column = np.nonzero(seen)
        after = np.minimum(day + 1, days - 1)[event]
        np.add.at(counts, (after, np.full_like(event, len(self.surfaces)), row[event], column), 1)
        event, column, after = (part[surface[event] >= 0] for part in (event, column, after))
        np.add.at(counts, (after, surface[event], row[event], column), 1)
        self._counts = np.cumsum(counts, axis=0)
        total = self._counts[-1].sum(axis=1)
        self._rates = (total[:, 1:] + 1) / (total[:, :1] + 100)

    def _labels(self, outcomes: pa.Array) -> np.ndarray:
        """bool (events, outcomes)."""
        lists = outcomes.fill_null([]) if outcomes.null_count else outcomes
        codes, names = encode(lists.flatten())
        event = np.repeat(np.arange(len(lists)), np.asarray(lists.value_lengths()))
        labels = np.zeros((len(lists), len(self.outcomes)), bool)
        place = np.array([self.outcomes.index(name) if name in self.outcomes else -1 for name in names] + [-1])[codes]
        labels[event[place >= 0], place[place >= 0]] = True
        return labels

    def _surface_codes(self, events: Any) -> np.ndarray:
        codes, names = encode(events.columns["surface"])
        return np.array([self.surfaces.index(n) if n in self.surfaces else -1 for n in names] + [-1])[codes]

    def _examples(self, split: str, max_users: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of a split's impressions; a history is what lies strictly before its time."""
        events = flatten_events(read_split(self._data_dir, split, max_users=max_users, seed=seed), self.catalogue)
        labels = self._labels(events.columns["outcomes"])
        positive = labels[:, self.values.numpy() > 0].any(axis=1) & (events.item_row >= 0)
        is_shown = events.item_row >= 0
        number = np.arange(len(events))
        moment = np.ones(len(events), bool)
        moment[1:] = (np.diff(events.user) != 0) | (np.diff(events.time) != 0)
        first = np.maximum.accumulate(np.where(moment, number, 0))  # of the events at the same time
        inside = number >= events.target_start[events.user]  # all of train
        example = np.flatnonzero(is_shown & inside & (events.time > UNKNOWN_TIME))
        asked, owner = np.unique(first[example], return_inverse=True)
        any_row = example[np.unique(owner, return_index=True)[1]]  # an impression tells the request's context

        def before(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            upto = np.concatenate([[0], np.cumsum(mask)])
            return events.item_row[mask], np.stack([upto[events.offsets[events.user[asked]]], upto[asked]])

        query, subject = (
            events.columns[name].take(pa.array(any_row)).to_pylist() if name in events.columns else [None] * len(asked)
            for name in ("query", "context_item_id")
        )
        situations = _Situations(
            self._surface_codes(events)[any_row],
            events.time[any_row],
            self._context(query, subject),
            *before(positive),
            *before(is_shown),
        )
        position = number[example] - any_row[owner]
        return self._features(situations, owner, events.item_row[example], position), labels[example]

    def _situations(self, requests: Sequence[Mapping[str, Any]]) -> _Situations:
        liked, shown = [], []
        for request in requests:
            history = request["history"]
            rows = self.catalogue.rows([item for item in history["item_id"] if item is not None])
            good = [
                any(name not in self.negative for name in names)
                for item, names in zip(history["item_id"], history["outcomes"], strict=True)
                if item is not None
            ]
            shown.append(rows[rows >= 0])
            liked.append(rows[(rows >= 0) & np.array(good, bool)])
        names = [request.get("surface") for request in requests]
        return _Situations(
            np.array([self.surfaces.index(name) if name in self.surfaces else -1 for name in names], np.int64),
            np.array([request["timestamp"] for request in requests], np.int64),
            self._context(*([request.get(name) for request in requests] for name in ("query", "context_item_id"))),
            *_flat(liked),
            *_flat(shown),
        )

    def _context(self, queries: list[Any], subjects: list[Any]) -> np.ndarray:
        """float32 (n, d): direction of the query's vector, or of the subject item's; 0 where there is none."""
        context = np.zeros((len(queries), self.items.shape[1]), np.float32)
        sources: list[tuple[list[Any], Catalogue]] = [(subjects, self.catalogue)]
        if self.queries is not None and self.queries.content_size == self.catalogue.content_size:
            sources.append((queries, self.queries))
        for asked, source in sources:
            given = np.array([i for i, value in enumerate(asked) if value is not None], np.int64)
            rows = source.rows([asked[i] for i in given])
            context[given[rows >= 0]] = _directions(source.vectors(rows[rows >= 0]))
        return context

    # -- learning --------------------------------------------------------------------------------------------------

    def _learn(self, x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray, seed: int) -> None:
        """Sigmoid outputs, one an outcome; the epoch with the least loss on held-out days is kept."""
        features, labels = torch.from_numpy(x), torch.from_numpy(y).float()
        self.mean, self.spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        features, held = (features - self.mean) / self.spread, (torch.from_numpy(held_x) - self.mean) / self.spread
        held_labels = torch.from_numpy(held_y).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, y.shape[1]))
        order = torch.Generator().manual_seed(seed)
        loss = nn.BCEWithLogitsLoss()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        best, kept = float("inf"), {name: value.clone() for name, value in self.network.state_dict().items()}
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(features), generator=order).split(BATCH):
                optimizer.zero_grad()
                loss(self.network(features[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.inference_mode():
                found = float(loss(self.network(held), held_labels))
            if found < best:
                best, kept = found, {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(kept)
        with torch.inference_mode():
            scores = self.network(held).numpy()
        self.validation_auc = {name: _auc(scores[:, c], held_y[:, c]) for c, name in enumerate(self.outcomes)}


def _directions(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _flat(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of rows in one int64 array, and where each begins and ends: int64 (2, lists)."""
    end = np.cumsum([len(rows) for rows in lists])
    return np.concatenate([*lists, np.zeros(0)]).astype(np.int64), np.stack([np.append(0, end[:-1]), end])


def _means(items: np.ndarray, flat: np.ndarray, ranges: np.ndarray, last: int | None) -> np.ndarray:
    """Mean direction float32 (n, d) of the last items (or all) of each history; 0 without any."""
    start, end = ranges
    start = start if last is None else np.maximum(start, end - last)
    sums = np.zeros((len(flat) + 1, items.shape[1]))
    np.cumsum(items[flat], axis=0, out=sums[1:])
    return ((sums[end] - sums[start]) / np.maximum(end - start, 1)[:, None]).astype(np.float32)


def _times_shown(s: _Situations, owner: np.ndarray, row: np.ndarray, num_items: int) -> np.ndarray:
    """How often each pair's item is among the last that its situation's user was shown: int64 (pairs,)."""
    end = s.shown_range[1]
    length = np.minimum(end - s.shown_range[0], RECENT_SHOWN)
    who = np.repeat(np.arange(len(end)), length)
    place = np.repeat(end, length) - 1 - (np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length))
    keys, counts = np.unique(who * num_items + s.shown[place], return_counts=True)
    wanted = owner * num_items + row
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[found] == wanted, counts[found], 0)


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: P(a random positive scores above a random negative), ties half."""
    positive = int(labels.sum())
    if not 0 < positive < len(labels):
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank among equals, from 1
    return float((rank[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))
