"""Which items a request may be given: not those seen, excluded, out of their life time, or filtered out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.item_table import ItemTable


def seen_rows(request: Mapping[str, Any], catalogue: Catalogue) -> np.ndarray:
    """Catalogue rows that no ranker may offer: what the request's user acted on, either way, and the subject item.

    What was merely shown is not seen. As in the tokenizer, every event counts as acted on without `outcomes`, and so
    does one whose outcome is unknown (`None`).

    Returns:
        int64, ascending, each once; items that the catalogue lacks are left out.
    """
    subject = request.get("context_item_id")
    rows = np.unique(catalogue.rows([*_acted_on(request["history"]), *([] if subject is None else [subject])]))
    return rows[rows >= 0]


def _acted_on(history: Mapping[str, Sequence]) -> list[Any]:
    items, outcomes = history.get("item_id"), history.get("outcomes")
    if items is None:
        return []
    if outcomes is None:
        return list(items)
    return [item for item, names in zip(items, outcomes, strict=True) if names is None or len(names)]


class Eligibility:
    """Rules of a catalogue: rows that one request must not have, and masks that requests share.

    A mask costs a pass over the catalogue and a search of its own, so `key` tells which requests have the same.
    """

    def __init__(self, catalogue: Catalogue, items: ItemTable | None) -> None:
        self.catalogue, self.items = catalogue, items
        self._lives: tuple[np.ndarray, ...] | None = None
        if catalogue.has_availability:
            lives = catalogue.availability(np.arange(len(catalogue)))
            # of each side the moments at which anything changes, and every item's place among them
            self._moments, self._lives = zip(*(np.unique(side, return_inverse=True) for side in lives.T), strict=True)

    def excluded_rows(self, requests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Of each request the seen items, those in `exclude`, and the subject item itself: int64 catalogue rows,
        ascending, each once.

        Raises:
            ValueError: ids of another type than the catalogue's, or `exclude` is no list.
        """
        others = []
        for request in requests:
            exclude, subject = request.get("exclude"), request.get("context_item_id")
            if isinstance(exclude, str | int):
                raise ValueError(f"exclude is {exclude!r}; give a list of item ids")
            others.append([*([] if exclude is None else exclude), *([] if subject is None else [subject])])
        acted_on = self._rows_each([_acted_on(request.get("history") or {}) for request in requests])
        excluded = map(np.unique, map(np.concatenate, zip(acted_on, self._rows_each(others), strict=True)))
        return [rows[rows >= 0] for rows in excluded]

    def _rows_each(self, lists: Sequence[list[Any]]) -> list[np.ndarray]:
        """Catalogue rows of each list, looked up for all at once: a look-up has a price of its own."""
        rows = self.catalogue.rows([item for items in lists for item in items])
        return np.split(rows, np.cumsum([len(items) for items in lists]))[:-1]

    def key(self, request: Mapping[str, Any]) -> Hashable:
        """Equal for requests that share a mask; `(None, None, ())` where all items may come.

        Raises:
            ValueError: filters that are no dict.
        """
        born = died = None
        if self._lives is not None:
            timestamp = request.get("timestamp")
            times = (request.get("history") or {}).get("timestamp")
            # at an unknown time only what had gone by the user's last event is known to be gone
            newest = next((t for t in reversed(times) if t is not None), None) if times is not None else None
            latest = newest if timestamp is None else timestamp
            born = None if timestamp is None else int(np.searchsorted(self._moments[0], timestamp, side="right"))
            died = None if latest is None else int(np.searchsorted(self._moments[1], latest, side="right"))
        given = request.get("filters") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"filters are {given!r}; give a dict such as {{'market': ['de', 'fr']}}")
        filters = {
            name: tuple(wanted) if isinstance(wanted, list | tuple | set | np.ndarray) else (wanted,)
            for name, wanted in given.items()
        }
        return born, died, tuple(sorted(filters.items(), key=lambda pair: pair[0]))

    def masks(self, requests: Sequence[Mapping[str, Any]], among: np.ndarray) -> np.ndarray:
        """bool `(requests, catalogue)`: which of the catalogue rows `among` each request may be given."""
        masks = np.zeros((len(requests), len(self.catalogue)), dtype=bool)
        masks[:, among] = True
        allowed: dict[str, np.ndarray | None] = {}
        for own, request, without in zip(masks, requests, self.excluded_rows(requests), strict=True):
            key = self.key(request)
            if repr(key) not in allowed:
                allowed[repr(key)] = self.mask(key)
            shared = allowed[repr(key)]
            if shared is not None:
                own &= shared
            own[without] = False
        return masks

    def mask(self, key: Any) -> np.ndarray | None:
        """bool over catalogue rows, True = may come; None where all may.

        Raises:
            ValueError: filters without an items table, or that it does not know (see `ItemTable.mask`).
        """
        born, died, filters = key
        masks = []
        if filters:
            if self.items is None:
                raise ValueError("filters need the items' columns: items.parquet is missing from the model's folder")
            masks.append(self.items.mask(dict(filters)))
        if self._lives is not None:
            if born is not None:
                masks.append(self._lives[0] < born)
            if died is not None:
                masks.append(self._lives[1] >= died)
        return np.logical_and.reduce(masks) if masks else None
