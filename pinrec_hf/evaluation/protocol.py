"""From rows of a sequences dataset to requests and their targets.

The rules (DESIGN, evaluation): a request sees its user's events strictly before its time and nothing else; a
target is an event of the split's window with a positive outcome, on an item that the catalogue knows and the
user has not acted on before. What is dropped is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pinrec_hf.data.dataset_folder import read_metadata
from pinrec_hf.evaluation.events import (
    NOT_AN_ITEM,
    UNKNOWN_TIME,
    Events,
    encode,
    flatten_events,
    iter_split,
    read_split,
)
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

HISTORY_COLUMNS = ("item_id", "surface", "timestamp", "outcomes", "request_id", "query", "context_item_id")


class RequestList(Sequence[dict[str, Any]]):
    """Requests in the one request schema, each made of its user's events when it is asked for.

    What lies in arrow in between is small; asked for in order, a user's events become Python objects once.
    """

    def __init__(
        self, columns: dict[str, pa.Array], start: np.ndarray, end: np.ndarray, fields: dict[str, list[Any]]
    ) -> None:
        self._columns, self._fields = columns, fields
        self._start, self._length = start.tolist(), (end - start).tolist()
        self._longest = dict(zip(self._start, self._length, strict=True))  # ordered by time: the user's last
        self._user: tuple[int, dict[str, list[Any]]] = (-1, {})

    def __len__(self) -> int:
        return len(self._start)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, length = self._start[index], self._length[index]
        if self._user[0] != start:
            longest = self._longest[start]
            self._user = (
                start,
                {name: column.slice(start, longest).to_pylist() for name, column in self._columns.items()},
            )
        request: dict[str, Any] = {"history": {name: values[:length] for name, values in self._user[1].items()}}
        for name, values in self._fields.items():
            if values[index] is not None or name in ("surface", "timestamp"):
                request[name] = values[index]
        return request

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def take(self, which: np.ndarray) -> RequestList:
        """Some of them: int64 places, ascending."""
        start = np.array(self._start, np.int64)[which]
        length = np.array(self._length, np.int64)[which]
        fields = {name: [values[i] for i in which.tolist()] for name, values in self._fields.items()}
        return RequestList(self._columns, start, start + length, fields)


@dataclass(frozen=True)
class Requests:
    """Requests of a split, and their targets; the arrays have one entry a target, ordered by request.

    Attributes:
        requests: dicts of the request schema with `user_id`, ordered by user and time.
        request_index: int64, the target's request. item_row: int64, its catalogue row. user: int64, its user
            (a code).
        surface: its surface, None = unknown. outcomes: its positive outcomes, all of them.
        history_length: int64, events that the request's history holds, those shown and ignored not counted.
        item_counts: int64 (items,), positive events of train per catalogue row.
        dropped: number of positive events of the window that are no targets, by reason: `unknown_item` (the
            catalogue lacks it), `seen_before` (the user acted on it strictly before), `repeated` (a second
            positive event on the same item at the same time).
        split: name of the split.
    """

    requests: Sequence[dict[str, Any]]
    request_index: np.ndarray
    item_row: np.ndarray
    user: np.ndarray
    surface: list[str | None]
    outcomes: list[list[str]]
    history_length: np.ndarray
    item_counts: np.ndarray
    dropped: dict[str, int]
    split: str

    def __len__(self) -> int:
        return len(self.requests)


def load_requests(
    data_dir: str | Path,
    split: str,
    catalogue: Catalogue,
    *,
    history_lag: int = 0,
    surface: str | None = None,
    max_users: int | None = None,
    seed: int = 0,
) -> Requests:
    """Read the requests and targets of `split` ("validation" or "test").

    Args:
        data_dir: a sequences dataset.
        catalogue: finds the items' rows.
        history_lag: seconds; a history lacks the events newer than its request's time minus this. Targets do
            not change.
        surface: only the targets on this one; None = all.
        max_users: a random sample of this many of the split's users, of that surface (drawn with `seed`); None = all.

    Raises:
        FileNotFoundError: no dataset.
        ValueError: no such split, a negative lag, or a split without a target, or without one on the surface.
    """
    metadata = read_metadata(data_dir)
    if history_lag < 0:
        raise ValueError(f"history_lag is {history_lag} s; give the seconds (0 or more) that histories lag behind")
    negative = metadata["negative_outcomes"]
    requests = requests_from_rows(
        read_split(data_dir, split, surface=surface, max_users=max_users, seed=seed),
        catalogue,
        negative_outcomes=negative,
        leave_one_out=metadata["split"]["kind"] == "leave_one_out",
        history_lag=history_lag,
        surfaces=metadata["surfaces"],
        outcomes=metadata["outcomes"],
        item_counts=count_items(data_dir, catalogue, negative),
        split=split,
    )
    if not len(requests):
        where = "" if surface is None else f" on surface {surface!r}"
        raise ValueError(f"split {split!r} of {data_dir} has no targets{where} (dropped: {requests.dropped})")
    return requests if surface is None else only_surfaces(requests, surface)


def requests_from_rows(
    rows: pa.Table,
    catalogue: Catalogue,
    *,
    negative_outcomes: Sequence[str] = (),
    leave_one_out: bool = False,
    history_lag: int = 0,
    surfaces: Sequence[str] | None = None,
    outcomes: Sequence[str] | None = None,
    item_counts: np.ndarray | None = None,
    split: str = "",
) -> Requests:
    """Requests and targets of rows of a sequences dataset.

    Targets of one user that share their time, surface, query, context item and request features share a
    request; under leave-one-out all of a user's do, at the time and in the context of the first. Where the
    target lacks a query or context item, the last query event of its feed view, up to its time, gives it.

    Args:
        rows: the columns of a sequences dataset, any rows of it.
        negative_outcomes: outcomes that make no target. leave_one_out: whether a history is what comes before
            `target_start`, whatever its time. history_lag: see `load_requests`.
        surfaces, outcomes: the names that train knows. Others, which no model can know, become None in
            requests (surfaces) and histories; targets keep theirs. None = all are
            known.
        item_counts, split: passed on to the result.

    Raises:
        ValueError: lists of different lengths in a row, or events out of the order of their times.
    """
    events = flatten_events(rows, catalogue, negative_outcomes)
    targets, dropped = _targets(events, leave_one_out)
    asking = targets  # whose moment and context the request has
    if leave_one_out:  # the first of a user's next N asks for all of them
        asking = targets[np.searchsorted(events.user[targets], events.user[targets])]
    end = _history_end(events, asking, leave_one_out, history_lag)

    keys = [events.user[targets], np.unique(events.time, return_inverse=True)[1][asking], end]
    values: dict[str, list[Any]] = {}
    for name in ("surface", "query", "context_item_id", "request_features"):
        if name in events.columns:
            source = asking
            column = events.columns[name]
            if name in ("query", "context_item_id"):
                source = _asked(events, asking, column)
            taken = column.take(pa.array(source, mask=source < 0))
            if name == "request_features":
                taken = pc.binary_join(taken, "\x00")  # lists have no dictionary encoding
            codes, values[name] = encode(taken)
            keys.append(codes)
            values[name].append(None)  # code -1
    distinct, first, request_index = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
    fields: dict[str, list[Any]] = {
        "user_id": rows.column("user_id").take(pa.array(distinct[:, 0])).to_pylist(),
        "surface": [],
        "timestamp": [None if time == UNKNOWN_TIME else time for time in events.time[asking][first].tolist()],
    }
    if surfaces is not None:
        values["surface"] = [name if name in surfaces else None for name in values["surface"]]
    for place, (name, names) in enumerate(values.items(), start=3):
        fields[name] = [names[code] for code in distinct[:, place].tolist()]
    if "query" in fields and "context_item_id" in fields:  # a row with both is about its query, as in a history
        about = zip(fields["query"], fields["context_item_id"], strict=True)
        fields["context_item_id"] = [None if query is not None else subject for query, subject in about]
    if "request_features" in fields:
        fields["request_features"] = [f.split("\x00") if f else None for f in fields["request_features"]]

    order = np.argsort(request_index.ravel(), kind="stable")
    targets, request_index = targets[order], request_index.ravel()[order]
    start = events.offsets[events.user[targets]]
    left, right = (np.searchsorted(events.positive_event, targets, side) for side in ("left", "right"))
    noted = np.zeros(len(events) + 1, dtype=np.int64)  # acted on, or a query
    np.cumsum(events.acted | (events.item_row == NOT_AN_ITEM), out=noted[1:])
    surface = events.columns["surface"].take(pa.array(targets)).to_pylist()
    return Requests(
        requests=RequestList(
            _history_columns(events, surfaces, outcomes),
            events.offsets[distinct[:, 0]],
            distinct[:, 2],
            fields,
        ),
        request_index=request_index,
        item_row=events.item_row[targets],
        user=events.user[targets],
        surface=surface,
        outcomes=[
            [events.outcome_names[code] for code in events.positive_outcome[a:b].tolist()]
            for a, b in zip(left, right, strict=True)
        ],
        history_length=noted[end[order]] - noted[start],
        item_counts=np.zeros(len(catalogue), dtype=np.int64) if item_counts is None else item_counts,
        dropped=dropped,
        split=split,
    )


def only_surfaces(requests: Requests, *surfaces: str) -> Requests:
    """The requests and targets of these surfaces.

    Raises:
        ValueError: there are none.
    """
    kept = np.array([name in surfaces for name in requests.surface], bool)
    if not kept.any():
        raise ValueError(f"split {requests.split!r} has no targets on surface {' or '.join(map(repr, surfaces))}")
    return only_targets(requests, kept)


def only_targets(requests: Requests, kept: np.ndarray) -> Requests:
    """Some of the targets, and the requests that they are of.

    Args:
        kept: bool `(targets,)`, at least one of them True.
    """
    which, request_index = np.unique(requests.request_index[kept], return_inverse=True)
    places, asked = np.flatnonzero(kept), requests.requests
    return replace(
        requests,
        requests=asked.take(which) if isinstance(asked, RequestList) else [asked[i] for i in which.tolist()],
        request_index=request_index,
        item_row=requests.item_row[kept],
        user=requests.user[kept],
        surface=[requests.surface[i] for i in places.tolist()],
        outcomes=[requests.outcomes[i] for i in places.tolist()],
        history_length=requests.history_length[kept],
    )


def count_items(data_dir: str | Path, catalogue: Catalogue, negative_outcomes: Sequence[str]) -> np.ndarray:
    """Positive events of train per catalogue row: int64 of shape (items,)."""
    counts = np.zeros(len(catalogue), dtype=np.int64)
    for rows in iter_split(data_dir, "train", ["item_id", "outcomes"]):
        events = flatten_events(rows, catalogue, negative_outcomes)
        counts += np.bincount(events.item_row[events.positive & (events.item_row >= 0)], minlength=len(catalogue))
    return counts


def _history_columns(
    events: Events, surfaces: Sequence[str] | None, outcomes: Sequence[str] | None
) -> dict[str, pa.Array]:
    """The columns that histories are cut from, with the names that train knows only."""
    columns = {name: events.columns[name] for name in HISTORY_COLUMNS if name in events.columns}
    if surfaces is not None:
        known = pc.is_in(columns["surface"], value_set=pa.array(surfaces, type=columns["surface"].type))
        columns["surface"] = pc.if_else(known, columns["surface"], None)
    if outcomes is not None and not set(events.outcome_names) <= set(outcomes):
        lists = columns["outcomes"].to_pylist()
        lists = [None if names is None else [name if name in outcomes else None for name in names] for names in lists]
        columns["outcomes"] = pa.array(lists, type=columns["outcomes"].type)
    return columns


def _targets(events: Events, leave_one_out: bool) -> tuple[np.ndarray, dict[str, int]]:
    """Indexes of the target events, ascending, and how many positive events are none, by reason."""
    inside = np.arange(len(events)) >= events.target_start[events.user]
    candidates = np.flatnonzero(inside & events.positive)
    known = candidates[events.item_row[candidates] >= 0]

    pair = events.user * (events.item_row.max(initial=0) + 1) + events.item_row
    acted = np.flatnonzero(events.acted & (events.item_row >= 0))
    pairs, first = np.unique(pair[acted], return_index=True)
    first_acted = acted[first[np.searchsorted(pairs, pair[known])]]  # always found: a target is acted on
    when = np.arange(len(events)) if leave_one_out else events.time
    fresh = known[when[first_acted] >= when[known]]
    once = np.sort(fresh[np.unique(pair[fresh], return_index=True)[1]])
    dropped = {
        "unknown_item": len(candidates) - len(known),
        "seen_before": len(known) - len(fresh),
        "repeated": len(fresh) - len(once),
    }
    return once, dropped


def _history_end(events: Events, targets: np.ndarray, leave_one_out: bool, lag: int) -> np.ndarray:
    """Index of the first event that each target's history must not hold."""
    user, time = events.user[targets], events.time[targets]
    if leave_one_out and not lag:  # the given order decides: times tie or are unknown
        return events.target_start[user]
    # the user's events up to the newest visible time, unknown times first: one search in (user, time) order
    moments = np.unique(events.time)
    width = len(moments) + 1
    known = time != UNKNOWN_TIME
    newest = np.where(known, time, UNKNOWN_TIME + max(1, lag)) - max(1, lag)
    visible = np.searchsorted(moments, newest, side="right")
    keys = events.user * width + np.searchsorted(moments, events.time)
    if (np.diff(keys) < 0).any():
        row = events.user[1:][np.diff(keys) < 0][0]
        raise ValueError(f"row {row}: the user's events are not in the order of their times; prepare the log again")
    end = np.minimum(np.searchsorted(keys, user * width + visible), targets)  # itself: of unknown time
    return np.minimum(events.target_start[user], end) if leave_one_out else end


def _asked(events: Events, targets: np.ndarray, column: pa.Array) -> np.ndarray:
    """Index of the event whose `column` holds for each target: itself or its view's last query, -1 = none."""
    given = np.asarray(column.is_valid())
    queries = np.flatnonzero(given & (events.item_row == NOT_AN_ITEM))
    own = np.where(given[targets], targets, -1)
    if not len(queries):
        return own
    moment = np.unique(events.time, return_inverse=True)[1]
    key = events.request * (moment.max() + 1) + moment
    queries = queries[np.argsort(key[queries], kind="stable")]
    last = queries[np.maximum(np.searchsorted(key[queries], key[targets], side="right") - 1, 0)]
    found = (events.request[last] == events.request[targets]) & (key[last] <= key[targets])
    return np.where(own >= 0, own, np.where(found, last, -1))
