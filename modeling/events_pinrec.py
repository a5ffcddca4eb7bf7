"""`EventEncoder`: histories, as lists of names and ids, to checked integer columns with one entry an event.

The names become codes, ignored impressions go, and the query or subject item of a feed view is put before it.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .catalogue_pinrec import Catalogue, stable_hash
from .configuration_pinrec import (
    FIRST_ITEM,
    ITEM_EVENT,
    MAX_REQUEST_FEATURES,
    NO_ITEM,
    QUERY_EVENT,
    REQUEST_FEATURE_BITS,
    SUBJECT_EVENT,
    UNKNOWN_ITEM,
    more_names,
)

EVENT_COLUMNS = {
    "types": np.int8,
    "items": np.int64,
    "queries": np.int64,
    "surfaces": np.int16,
    "outcomes": np.int64,
    "timestamps": np.int64,
    "requests": np.int64,
    "weights": np.float32,
    "features": np.int64,
    "positions": np.int32,
}
"""Columns of an encoded row: event type, item id (catalogue row + 2), hash of the query's text (0 none), surface
code, outcome bit set, seconds since epoch (-1 unknown), feed view, loss weight, request features (packed hashes), place
in the feed view (-1 unknown)."""

CONTEXT_POSITION = -2
"""Of an event that no log has: what a view was about, put before it."""

EncodedRow = dict[str, np.ndarray]

HISTORY_COLUMNS = (
    "item_id", "surface", "timestamp", "outcomes", "query", "context_item_id", "request_id", "weight",
    "request_features", "position",
)  # fmt: skip
LATEST = 1 << 35
"""Seconds since epoch of the year 3058: a larger time is in another unit."""


class EventEncoder:
    """What turns the names of a log into the model's codes: the vocabulary, and which events count.

    Args: as in `PinRecTokenizer`.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        surfaces: Sequence[str],
        outcomes: Sequence[str],
        negative_outcomes: Sequence[str],
        keep_ignored: bool,
        contexts: bool,
        request_features: bool,
    ) -> None:
        self.catalogue = catalogue
        self.surfaces, self.outcomes = list(surfaces), list(outcomes)
        self.negative_outcomes, self.keep_ignored, self.contexts = list(negative_outcomes), keep_ignored, contexts
        self.request_features = request_features
        self._number_names()

    # -- names to codes ------------------------------------------------------------------------------------------

    def _number_names(self) -> None:
        more_names("outcomes", self.outcomes, [])  # as many as a set has bits
        self._surface_codes: dict[Any, int] = {None: 0, **{name: i + 1 for i, name in enumerate(self.surfaces)}}
        self._outcome_codes = {name: i + 1 for i, name in enumerate(self.outcomes)}

    def add_surfaces(self, names: Sequence[str]) -> None:
        """Surfaces after those that are there, as in `PinRecModel.add_surfaces`.

        Raises:
            ValueError: a surface that is there already, or named twice.
        """
        self.surfaces = more_names("surfaces", self.surfaces, names)
        self._number_names()

    def add_outcomes(self, names: Sequence[str], negative: bool = False) -> None:
        """Outcomes after those that are there, as in `PinRecModel.add_outcomes`.

        Raises:
            ValueError: an outcome that is there already, or named twice.
        """
        self.outcomes = more_names("outcomes", self.outcomes, names)
        self.negative_outcomes = [*self.negative_outcomes, *(names if negative else ())]
        self._number_names()

    @property
    def positive_mask(self) -> int:
        """Bit set of the outcomes that can be a target."""
        return sum(1 << self._outcome_codes[name] for name in self.outcomes if name not in self.negative_outcomes)

    def surface_code(self, surface: str | None) -> int:
        """Code of a request's surface (`None` is unknown, 0).

        Raises:
            ValueError: for a name that the model does not know.
        """
        if surface not in self._surface_codes:
            raise ValueError(f"surface {surface!r} is not among this model's surfaces {self.surfaces}")
        return self._surface_codes[surface]

    def outcome_code(self, outcome: str | None) -> int:
        """Code of a wanted outcome (`None` is unspecified, 0).

        Raises:
            ValueError: for a name that the model does not know, or a negative outcome.
        """
        if outcome is None:
            return 0
        wanted = [name for name in self.outcomes if name not in self.negative_outcomes]
        if outcome not in self._outcome_codes:
            raise ValueError(f"outcome {outcome!r} is not among this model's outcomes {wanted}")
        if outcome in self.negative_outcomes:
            raise ValueError(f"outcome {outcome!r} is negative and cannot be asked for; choose among {wanted}")
        return self._outcome_codes[outcome]

    def item_codes(self, ids: Sequence[Any]) -> np.ndarray:
        """int64 item ids of the model: catalogue row + 2, 1 unknown, 0 where the id is `None`."""
        missing = _missing(ids)
        codes = np.full(len(ids), NO_ITEM, np.int64)
        if not missing.all():
            rows = self.catalogue.rows([i for i in ids if i is not None] if missing.any() else ids)
            codes[~missing] = np.where(rows < 0, UNKNOWN_ITEM, rows + FIRST_ITEM)
        return codes

    # -- rows to codes -------------------------------------------------------------------------------------------

    def encode(self, histories: Sequence[Mapping[str, Sequence]], strict: bool = False) -> list[EncodedRow]:
        """Rows of the sequences dataset, or histories of requests, to integer columns.

        Ignored impressions are left out (unless `keep_ignored`), and the query or subject item of a feed view is
        put before its first event, as a request's is put last.

        Args:
            histories: dicts of equally long lists, oldest event first: `item_id` (`None` is a query event), and
                optionally `surface`, `timestamp` (int seconds, UTC), `outcomes` (lists of names; an empty one is
                shown and ignored), `query`, `context_item_id`, `request_id`, and of targets only `weight`,
                `request_features`, `position`. `None` is unknown in every column; a history needs no `outcomes` where
                the model has only one positive outcome.
            strict: whether a name that the model does not know is an error (a request) or unknown (a log).

        Raises:
            ValueError: columns of different length or no lists; times that are no seconds since epoch; ids of
                another type than the catalogue's; in a request an unknown column or name.
        """
        lengths = np.array([_length(history, row, strict) for row, history in enumerate(histories)], np.int64)
        total, row = int(lengths.sum()), np.repeat(np.arange(len(lengths)), lengths)
        flat: dict[str, list] = {
            column: list(chain.from_iterable(map(_column, histories, [column] * len(histories), lengths.tolist())))
            for column in HISTORY_COLUMNS
            if column != "outcomes" and any(history.get(column) is not None for history in histories)
        }
        nothing = [None] * total
        if strict:
            for name in set(flat.get("surface", ())):
                self.surface_code(name)
        surfaces = [self._surface_codes.get(name, 0) for name in flat.get("surface", nothing)]
        query_text = flat.get("query", nothing)
        asked = ~_missing(query_text)
        queries = np.zeros(total, np.int64)
        if asked.any():
            queries[asked] = stable_hash([text for text in query_text if text is not None])
        items = self.item_codes(flat["item_id"]) if total else np.zeros(0, np.int64)
        subjects = self.item_codes(flat.get("context_item_id", nothing))
        given = [
            self._given_outcomes(history, i, n) for i, (history, n) in enumerate(zip(histories, lengths, strict=True))
        ]
        outcomes = self._outcome_sets(list(chain.from_iterable(given)), row, strict)
        is_query = (items == NO_ITEM) & asked
        outcomes[is_query] = 0  # nobody acts on a query, also where every row of a log is an interaction
        if strict and ((items == NO_ITEM) & ~asked).any():
            empty = row[(items == NO_ITEM) & ~asked][0]
            raise ValueError(f"history {empty} has an event with neither an item_id nor a query; leave such events out")
        events = {
            "types": np.where(is_query, QUERY_EVENT, ITEM_EVENT).astype(np.int8),
            "items": items,
            "queries": np.where(is_query, queries, 0),
            "surfaces": np.array(surfaces, np.int16),
            "outcomes": outcomes,
            "timestamps": checked_times(flat.get("timestamp", nothing), "history", row),
            "requests": _numbers(_numbered(flat.get("request_id")), -1, total, np.int64),
            "weights": _numbers(flat.get("weight"), 1, total, np.float32),
            "features": np.zeros(total, np.int64),
            "positions": _numbers(flat.get("position"), -1, total, np.int32),
        }
        if self.request_features and "request_features" in flat:
            events["features"] = packed_features(flat["request_features"])
        kept = np.flatnonzero(np.where(is_query, self.contexts, (outcomes > 0) | self.keep_ignored))
        events = {name: values[kept] for name, values in events.items()}
        row = row[kept]
        if self.contexts:
            events, row = _insert_contexts(events, row, np.where(is_query, 0, queries)[kept], subjects[kept])
        ends = np.cumsum(np.bincount(row, minlength=len(lengths)))
        parts = {name: np.split(values, ends[:-1]) for name, values in events.items()} if len(lengths) else {}
        return [{name: values[i] for name, values in parts.items()} for i in range(len(lengths))]

    def _given_outcomes(self, history: Mapping[str, Sequence], row: int, length: int) -> Sequence:
        if length and history.get("outcomes") is None:
            wanted = [name for name in self.outcomes if name not in self.negative_outcomes]
            if len(wanted) != 1:
                raise ValueError(
                    f"history {row} needs `outcomes`, a list of names for each event, from {self.outcomes}"
                )
            return [wanted] * length
        return _column(history, "outcomes", length)

    def _outcome_sets(self, outcomes: list, row: np.ndarray, strict: bool) -> np.ndarray:
        """int64 bit sets: bit 0 for an outcome that is unknown, no bit for an event that was ignored."""
        kinds = {kind for kind in set(map(type, outcomes)) if not issubclass(kind, _LISTS)}
        if kinds:
            event = next(i for i, names in enumerate(outcomes) if type(names) in kinds)
            raise ValueError(
                f"`outcomes` of history {row[event]} holds {outcomes[event]!r} where a list of names is due: "
                'write ["save"], not "save"'
            )
        lists = [() if names is None else names for names in outcomes]
        names = list(chain.from_iterable(lists))
        if strict and (unknown := sorted({*names} - {None, *self.outcomes}, key=str)):
            raise ValueError(f"outcomes {unknown} are not among this model's outcomes {self.outcomes}")
        bits = np.left_shift(np.int64(1), np.array([self._outcome_codes.get(name, 0) for name in names], np.int64))
        sets = np.fromiter((names is None for names in outcomes), np.int64, len(outcomes))
        np.bitwise_or.at(sets, np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64)), bits)
        return sets


_LISTS = (list, tuple, set, frozenset, np.ndarray, type(None))


def _length(history: Mapping[str, Sequence], row: int, strict: bool) -> int:
    if not isinstance(history, Mapping):
        raise ValueError(
            f"history {row} is {history!r}; give a dict of columns: {{'item_id': [...], 'outcomes': [...]}}"
        )
    if strict and (unknown := sorted(set(history) - set(HISTORY_COLUMNS), key=str)):
        raise ValueError(f"history {row} has columns {unknown}; the known ones are {list(HISTORY_COLUMNS)}")
    lengths = {}
    for column in HISTORY_COLUMNS:
        values = history.get(column)
        if values is None:
            continue
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise ValueError(f"column {column!r} of history {row} is {values!r}; it must be a list, one entry an event")
        lengths[column] = len(values)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of history {row} differ in length: {lengths}")
    if lengths and "item_id" not in lengths:
        raise ValueError(f"history {row} has no `item_id` column, only {sorted(lengths)}")
    return next(iter(lengths.values()), 0)


def _column(history: Mapping[str, Sequence], column: str, length: int) -> Sequence:
    values = history.get(column)
    return [None] * length if values is None else values


def _missing(values: Sequence) -> np.ndarray:
    """bool: which are `None`. Most columns of most requests are whole or absent, which needs no look at each value."""
    count = values.count(None) if isinstance(values, list) else -1
    if count in (0, len(values)):
        return np.full(len(values), count > 0)
    return np.fromiter((value is None for value in values), bool, len(values))


def _numbers(values: Sequence | None, unknown: int, length: int, dtype: Any) -> np.ndarray:
    if values is None:
        return np.full(length, unknown, dtype)
    try:
        return np.array([unknown if value is None else value for value in values], dtype)
    except OverflowError:
        largest = max((value for value in values if value is not None), key=abs)
        raise ValueError(f"{largest} does not fit {np.dtype(dtype)}") from None


def _numbered(ids: Sequence | None) -> Sequence | None:
    """Request ids that are text, as in some logs, by numbers: what counts is which are equal."""
    if ids is None or not any(isinstance(value, str) for value in ids):
        return ids
    numbers: dict[str, int] = {}
    return [None if value is None else numbers.setdefault(str(value), len(numbers)) for value in ids]


def checked_times(values: Sequence, what: str, owner: np.ndarray) -> np.ndarray:
    """int64 seconds, -1 where `None`; `owner` says to which history or request (`what`) each value belongs."""
    known = ~_missing(values)
    times = np.full(len(values), -1, np.int64)
    if known.any():
        given = np.asarray([t for t in values if t is not None])
        right = (given >= 0) & (given < LATEST) if given.dtype.kind in "iuf" else np.zeros(len(given), bool)
        if not right.all():  # NaN is not right either
            raise ValueError(
                f"{what} {owner[known][~right][0]} has the timestamp {given[~right].tolist()[0]!r}, which is no number "
                f"of seconds since epoch (UTC) below {LATEST}; an unknown time is None"
            )
        times[known] = given
    return times


def packed_features(features: Sequence) -> np.ndarray:
    """int64: the 12-bit hashes of each request's feature strings side by side, 0 where there is none.

    One integer a request, so that it is sliced, cut and padded like every other column.
    """
    packed: dict[Any, int] = {}
    keys = [() if names is None else names if isinstance(names, str) else tuple(names) for names in features]
    for names in set(keys):  # few are distinct
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"request_features {names!r} are no list of strings; write ['device=ios', ...]")
        distinct = sorted(set(names))
        if len(distinct) > MAX_REQUEST_FEATURES:
            raise ValueError(
                f"{len(distinct)} request_features, of which {MAX_REQUEST_FEATURES} fit: {distinct}; join some "
                "into one, such as 'device=ios,country=de'"
            )
        codes = stable_hash(distinct) % ((1 << REQUEST_FEATURE_BITS) - 1) + 1
        packed[names] = sum(code << (REQUEST_FEATURE_BITS * i) for i, code in enumerate(codes.tolist()))
    return np.array([packed[names] for names in keys], np.int64)


def _insert_contexts(
    events: EncodedRow, row: np.ndarray, queries: np.ndarray, subjects: np.ndarray
) -> tuple[EncodedRow, np.ndarray]:
    """Puts the query or subject item of each feed view before its first event, unless the log has it there."""
    if not len(row):
        return events, row
    context = np.where(queries != 0, queries, subjects)
    view = np.stack([row, events["requests"], context])
    first = np.ones(len(row), bool)
    first[1:] = (view[:, 1:] != view[:, :-1]).any(0)
    stands_there = np.zeros(len(row), bool)
    stands_there[1:] = (events["queries"][:-1] == queries[1:]) & (queries[1:] != 0) & (row[1:] == row[:-1])
    at = np.flatnonzero(first & (context != 0) & ~stands_there)
    new = {name: values[at] for name, values in events.items()}
    is_query = queries[at] != 0
    new["types"] = np.where(is_query, QUERY_EVENT, SUBJECT_EVENT).astype(np.int8)
    new["items"] = np.where(is_query, NO_ITEM, subjects[at])
    new["queries"] = np.where(is_query, queries[at], 0)
    new["outcomes"] = np.zeros(len(at), np.int64)
    new["positions"] = np.full(len(at), CONTEXT_POSITION, np.int32)
    return {name: np.insert(events[name], at, new[name]) for name in events}, np.insert(row, at, row[at])


__all__ = ["CONTEXT_POSITION", "EVENT_COLUMNS", "HISTORY_COLUMNS", "EncodedRow", "EventEncoder"]
