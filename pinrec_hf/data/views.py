"""Finetuning rows: what a user did in the feed views of a surface, each predicted from the view's request.

    encoded rows, ignored impressions kept -> targets of each view -> windows of history that end where a view begins

A view's request sees what came before the view's first item, its own query or subject item last; so rows of one view
never see each other. Impressions that were ignored are hard negatives of their own view and nothing else: they are no
part of any history.
"""

import copy
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from pinrec_hf.data.windows import ListColumn, SequenceDataset, encode_split
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT
from pinrec_hf.modeling.events_pinrec import CONTEXT_POSITION, EVENT_COLUMNS, EncodedRow
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

TARGET_COLUMNS = {
    "target_events": np.int32,
    "target_items": np.int64,
    "target_surfaces": np.int16,
    "target_outcomes": np.int64,
    "target_timestamps": np.int64,
    "target_offsets": np.int64,
    "target_weights": np.float32,
    "target_features": np.int64,
    "hard_counts": np.int32,
}
"""One entry a target: the window's events before its request, item id, surface code, bit set of positive outcomes, time
of its request and seconds until it happened (-1 unknown), weight, request features, and how many of the window's
`hard_items` (int64 item ids) are its own."""

VIEW_ENCODING = 3
"""Raise it when views become other windows, so that what is cached is not taken for them."""


def encode_views(data: str | Path, tokenizer: PinRecTokenizer, surface: str | None = None) -> datasets.Dataset:
    """The train split as windows of at most `tokenizer.model_max_length - 1` events, each with targets on `surface`.

    As `encode_split`'s, the result is memory-mapped from the `datasets` cache.

    Args:
        surface: whose views are predicted; all by default.

    Raises:
        FileNotFoundError: `data` is no sequences dataset.
        ValueError: the tokenizer does not know the surface.
    """
    impressions = copy.copy(tokenizer)
    impressions.keep_ignored = True
    encoded = encode_split(data, "train", impressions)
    code = None if surface is None else tokenizer.surface_code(surface)
    window, mask = tokenizer.model_max_length - 1, tokenizer.positive_mask
    columns = {**EVENT_COLUMNS, **TARGET_COLUMNS, "hard_items": np.int64}
    what = [encoded._fingerprint, str(code), str(window), str(mask), str(VIEW_ENCODING)]
    return encoded.with_format("arrow").map(
        lambda rows: view_windows(rows, window, mask, code),
        batched=True,
        remove_columns=encoded.column_names,
        features=datasets.Features({n: datasets.List(datasets.Value(np.dtype(t).name)) for n, t in columns.items()}),
        new_fingerprint=hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32],
        desc="Finding feed views",
    )


class ViewDataset(SequenceDataset):
    """Windows that `encode_views` made, each with its targets and its place in the epoch as a key.

    Args:
        views: what `encode_views` gave.
    """

    def __init__(self, views: datasets.Dataset) -> None:
        super().__init__(views, window=np.iinfo(np.int64).max)
        # each is a window already, also one whose request comes before any event
        self._rows, self._parts = np.arange(len(views)), np.zeros(len(views), np.int64)
        self._targets = {name: ListColumn(views.data.column(name)) for name in (*TARGET_COLUMNS, "hard_items")}
        self._times = self._targets["target_timestamps"]

    def __getitem__(self, index: int) -> EncodedRow:
        window = super().__getitem__(index)
        return window | {name: column.row(index) for name, column in self._targets.items()}

    def target_counts(self, positive_mask: int, num_items: int, ahead: int = 1) -> np.ndarray:
        """int64 `(num_items + 2,)`: how often each item id is a target in an epoch; all of a view's are, whatever
        `ahead` is."""
        return sum(
            (np.bincount(items, minlength=num_items + FIRST_ITEM) for items in self._targets["target_items"].chunks()),
            start=np.zeros(num_items + FIRST_ITEM, np.int64),
        )

    @property
    def num_hard_negatives(self) -> int:
        """Impressions that were ignored, counted once a target that they stand beside."""
        return int(self._targets["hard_items"].lengths.sum())


def view_windows(rows: pa.Table, window: int, positive_mask: int, surface: int | None = None) -> pa.Table:
    """Encoded rows to windows with targets: the columns of `EVENT_COLUMNS`, `TARGET_COLUMNS` and `hard_items`.

    A target is an item with a positive outcome in a view (a late one included) that the user had not acted on before
    the view began. Its hard negatives are the view's items that were ignored; where positions are known, only those
    above the last item acted on, which the user has certainly seen.

    Args:
        rows: lists a user, ignored impressions among them. window: events in a window, at most.
        positive_mask: bit set of the outcomes that make a target. surface: code of the targets' surface, None = all.
    """
    lists = {name: rows[name].combine_chunks() for name in EVENT_COLUMNS}
    flat = {name: values.flatten().to_numpy(zero_copy_only=False) for name, values in lists.items()}
    lengths = lists["items"].value_lengths().to_numpy(zero_copy_only=False)
    types, items, sets, requests = (flat[name] for name in ("types", "items", "outcomes", "requests"))
    n, row = len(items), np.repeat(np.arange(len(lengths)), lengths)
    size = int(items.max(initial=0)) + 1

    # the feed view of each event, numbered in the order in which users and views begin; an unknown one is alone
    most = int(requests.max(initial=0)) + 1
    keys = np.where(requests < 0, len(lengths) * most + np.arange(n), row * most + requests)
    _, opens, view = np.unique(keys, return_index=True, return_inverse=True)
    is_item = types == ITEM_EVENT
    begins = np.full(len(opens), n)
    np.minimum.at(begins, view[is_item], np.flatnonzero(is_item))

    reacted = is_item & (sets > 0)
    acted = reacted & (items >= FIRST_ITEM)
    kept = _kept(flat, row, view, reacted)
    kept_before = np.cumsum(kept) - kept

    pair, own = view * size + items, row * size + items
    positive = np.flatnonzero(
        acted & ((sets & positive_mask) != 0) & ((flat["surfaces"] == surface) | (surface is None))
    )
    pairs, first, which = np.unique(pair[positive], return_index=True, return_inverse=True)
    outcomes = np.zeros(len(pairs), np.int64)
    np.bitwise_or.at(outcomes, which, sets[positive] & positive_mask)
    event = positive[first]
    items_acted, first_act = np.unique(own[acted], return_index=True)
    first_act = np.flatnonzero(acted)[first_act]
    fresh = first_act[np.searchsorted(items_acted, own[event])] >= begins[view[event]]
    event, outcomes = event[fresh], outcomes[fresh]
    target_view, target_row = view[event], row[event]
    start = np.searchsorted(row, target_row)
    before = kept_before[begins[target_view]] - kept_before[start]
    # what a view was about that got its first reaction after other views had begun is seen by its own targets alone
    about = np.maximum(begins[target_view] - 1, start)
    late = (flat["positions"][about] == CONTEXT_POSITION) & (view[about] == target_view) & ~kept[about]
    group = np.where(late, len(lengths) + target_view, target_row)

    number, end = _cut(group, before, window)
    order = np.lexsort((number, group))  # stable: still by view and item, however a view's rows are ordered
    event, outcomes, before, end, number, target_view, start, about, late, group = (
        values[order] for values in (event, outcomes, before, end, number, target_view, start, about, late, group)
    )
    new = np.flatnonzero((np.diff(group, prepend=-1) != 0) | (np.diff(number, prepend=-1) != 0))
    begin = np.maximum(end + late - window, 0)
    sizes = (end - begin)[new]
    events = np.flatnonzero(kept)[_ranges(kept_before[start[new]] + begin[new], sizes)]
    events = np.insert(events, np.cumsum(sizes)[late[new]], about[new][late[new]])
    sizes += late[new]

    hard_counts, hard_items = _hard_negatives(flat, view, pair, is_item, reacted, target_view)
    asked = opens[target_view]
    # views may interleave: nothing of a history is younger than the request
    times, newest = flat["timestamps"], np.maximum(asked, begins[target_view] - 1)
    requested = np.where(times[asked] < 0, -1, np.maximum(times[asked], times[newest]))
    happened = times[event]
    targets = {
        "target_events": before + late - begin,
        "target_items": items[event],
        "target_surfaces": flat["surfaces"][event],
        "target_outcomes": outcomes,
        "target_timestamps": requested,
        "target_offsets": np.where((requested >= 0) & (happened >= 0), happened - requested, -1),
        "target_weights": flat["weights"][event],
        "target_features": flat["features"][asked],
        "hard_counts": hard_counts,
    }
    counts = np.diff(new, append=len(event))
    hard = np.add.reduceat(np.append(hard_counts, 0), new) if len(new) else counts
    made = {name: (values[events], sizes) for name, values in flat.items()}
    made |= {name: (values.astype(TARGET_COLUMNS[name]), counts) for name, values in targets.items()}
    made["hard_items"] = hard_items, hard
    return pa.table({name: _list_array(values, lengths) for name, (values, lengths) in made.items()})


def _kept(flat: EncodedRow, row: np.ndarray, view: np.ndarray, reacted: np.ndarray) -> np.ndarray:
    """bool: the events of a request's history, which holds nothing that was ignored.

    What a view was about belongs to it where something was acted on before another view came, once as long as no
    other comes in between; a query that the log has as an event of its own, always.
    """
    is_context = flat["positions"] == CONTEXT_POSITION
    run = np.cumsum(is_context | (np.diff(view, prepend=-1) != 0)) - 1
    answered = np.bincount(run, reacted) > 0
    kept = np.where(is_context, answered[run], (flat["types"] != ITEM_EVENT) | reacted)
    about = np.zeros((2, len(answered)), np.int64)  # the query or subject item of each run
    about[:, run[is_context]] = flat["queries"][is_context], flat["items"][is_context]
    left = np.flatnonzero(kept)
    now, last = left[1:], left[:-1]
    again = (view[now] == view[last]) & (row[now] == row[last]) & (about[:, run[now]] == about[:, run[last]]).all(0)
    kept[now[is_context[now] & again]] = False
    return kept


def _cut(row: np.ndarray, before: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Each target's window, counted from the row's newest, and where in the row's history that window ends.

    A window ends where its newest view begins and holds the targets of all views that begin in it.
    """
    number, end = np.zeros(len(row), np.int64), np.zeros(len(row), np.int64)
    left, windows = np.arange(len(row)), 0
    while len(left):
        last = np.full(row.max() + 1, -1)
        np.maximum.at(last, row[left], before[left])
        inside = before[left] > last[row[left]] - window
        number[left[inside]], end[left[inside]] = windows, last[row[left[inside]]]
        left, windows = left[~inside], windows + 1
    return number, end


def _hard_negatives(
    flat: EncodedRow, view: np.ndarray, pair: np.ndarray, is_item: np.ndarray, reacted: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many ignored items each wanted view has, and the items themselves, one view after the other."""
    positions, views = flat["positions"], int(view.max(initial=-1)) + 1
    lowest = np.full(views, -1)
    np.maximum.at(lowest, view[reacted], positions[reacted])
    below = (positions >= 0) & (lowest[view] >= 0) & (positions > lowest[view])
    ignored = np.flatnonzero(is_item & ~reacted & (flat["items"] >= FIRST_ITEM) & ~below)
    ignored = ignored[~np.isin(pair[ignored], pair[reacted])]
    ignored = ignored[np.unique(pair[ignored], return_index=True)[1]]  # once each, ordered by view
    counts = np.bincount(view[ignored], minlength=views)
    starts = np.cumsum(counts) - counts
    return counts[wanted], flat["items"][ignored[_ranges(starts[wanted], counts[wanted])]]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of each length, one after the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
