"""A flat view of a sequences dataset: one entry an event, no Python loop over events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pinrec_hf.modeling.catalogue_pinrec import Catalogue

UNKNOWN_TIME = np.iinfo(np.int64).min  # older than every known time
NOT_AN_ITEM = -2  # a query event; -1 is an item that the catalogue lacks
REQUIRED = ("user_id", "item_id", "surface", "timestamp", "outcomes", "request_id", "target_start")
OPTIONAL = ("query", "context_item_id", "request_features")


@dataclass(frozen=True)
class Events:
    """Events of all users, users in row order, each user's oldest first; all arrays have one entry an event.

    Attributes:
        offsets: int64 (users + 1,): user u's events are `offsets[u]:offsets[u + 1]`.
        user: int64, the dataset row. target_start: int64, index in this view of the user's first target
            candidate.
        item_row: int64 catalogue row, -1 = an item that the catalogue lacks, -2 = a query event.
        time: int64 seconds since epoch, UTC, `UNKNOWN_TIME` where unknown.
        request: int64, numbers the feed views of all users.
        acted: bool, an item that the user acted on, either way. positive: bool, with a positive outcome.
        columns: arrow arrays of the list columns, flattened.
        positive_event, positive_outcome: int64, an entry a positive outcome: index of its event (ascending),
            and of its name in `outcome_names`.
    """

    offsets: np.ndarray
    user: np.ndarray
    target_start: np.ndarray
    item_row: np.ndarray
    time: np.ndarray
    request: np.ndarray
    acted: np.ndarray
    positive: np.ndarray
    columns: dict[str, pa.Array]
    positive_event: np.ndarray
    positive_outcome: np.ndarray
    outcome_names: list[str]

    def __len__(self) -> int:
        return len(self.user)


def iter_split(
    data_dir: str | Path, split: str, columns: Sequence[str] | None = None, users: int = 20_000
) -> Iterator[pa.Table]:
    """The rows of one split in file order, some users at a time: all columns for evaluation, or those named.

    Raises:
        ValueError: the split is missing or empty, or lacks a column.
    """
    for file in split_files(data_dir, split):
        present = pq.read_schema(file).names
        wanted = REQUIRED if columns is None else columns
        missing = [name for name in wanted if name not in present]
        if missing:
            raise ValueError(f"{file} lacks the column {missing[0]!r}; it has {present}: prepare the log again")
        chosen = [*wanted, *(name for name in OPTIONAL if columns is None and name in present)]
        if pq.read_metadata(file).num_rows == 0:  # no batch, but a schema
            yield pq.read_table(file, columns=chosen)
        for batch in pq.ParquetFile(file).iter_batches(batch_size=users, columns=chosen):
            yield pa.Table.from_batches([batch])


def read_split(
    data_dir: str | Path, split: str, *, surface: str | None = None, max_users: int | None = None, seed: int = 0
) -> pa.Table:
    """The rows of one split, or of a random sample of its users, in file order; of those alone who are on `surface` in
    the split's window, if it is named. Raises as `iter_split`."""
    if surface is None:
        chosen = np.arange(sum(pq.read_metadata(file).num_rows for file in split_files(data_dir, split)))
    else:
        chosen = _rows_on(data_dir, split, surface)
    if max_users is not None and max_users < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, size=max_users, replace=False))
    parts, start = [], 0
    for rows in iter_split(data_dir, split):
        low, high = np.searchsorted(chosen, [start, start + len(rows)])
        parts.append(rows.take(chosen[low:high] - start))
        start += len(rows)
    return pa.concat_tables(parts, promote_options="default")


def _rows_on(data_dir: str | Path, split: str, surface: str) -> np.ndarray:
    """int64, ascending: rows with an event on a surface at or after their `target_start`."""
    found, start = [np.zeros(0, np.int64)], 0
    for rows in iter_split(data_dir, split, ["surface", "target_start"]):
        lists = rows.column("surface").combine_chunks()
        row = _numpy(pc.list_parent_indices(lists))
        offsets = lists.offsets.to_numpy()
        inside = np.arange(len(row)) + offsets[0] - offsets[row] >= _numpy(rows.column("target_start"))[row]
        there = np.asarray(pc.equal(lists.flatten(), surface).fill_null(False))
        found.append(start + np.unique(row[inside & there]))
        start += len(rows)
    return np.concatenate(found)


def split_files(data_dir: str | Path, split: str) -> list[Path]:
    """The parquet files of one split, in order.

    Raises:
        ValueError: there are none; it names the splits there are.
    """
    files = sorted((Path(data_dir) / split).glob("*.parquet"))
    if not files:
        known = sorted({path.parent.name for path in Path(data_dir).glob("*/*.parquet")})
        raise ValueError(f"split {split!r} has no parquet files in {data_dir}; there are {known}")
    return files


def flatten_events(table: pa.Table, catalogue: Catalogue, negative_outcomes: Sequence[str] = ()) -> Events:
    """Flatten rows of a sequences dataset; see `Events`. Columns that the table lacks count as zeros."""
    lists = {
        name: table.column(name)
        for name in table.column_names
        if pa.types.is_list(table.schema.field(name).type) or pa.types.is_large_list(table.schema.field(name).type)
    }
    lengths = _numpy(pc.list_value_length(lists["item_id"]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = {name: _combined(pc.list_flatten(column)) for name, column in lists.items()}
    num_events = int(offsets[-1])
    for name, column in columns.items():
        if len(column) != num_events:
            raise ValueError(
                f"column {name!r} holds {len(column)} entries and 'item_id' {num_events}: every list of a "
                "row must have one entry an event; prepare the log again"
            )
    user = np.repeat(np.arange(len(lengths)), lengths)

    sizes = _numpy(pc.fill_null(pc.list_value_length(columns["outcomes"]), 0))
    names = _combined(pc.list_flatten(columns["outcomes"]))
    outcome, outcome_names = encode(names)
    item_row = _item_rows(columns["item_id"], catalogue)
    event = np.repeat(np.arange(num_events), sizes)
    counts = np.array([name not in negative_outcomes for name in outcome_names] + [False])[outcome]
    counts &= item_row[event] != NOT_AN_ITEM
    event, outcome = event[counts], outcome[counts]
    positive = np.zeros(num_events, dtype=bool)
    positive[event] = True

    start = _numpy(table.column("target_start")) if "target_start" in table.column_names else np.zeros(len(lengths))
    empty = np.zeros(num_events, dtype=np.int64)
    request = _numpy(columns["request_id"]).astype(np.int64) if "request_id" in columns else empty
    time = _numpy(pc.fill_null(columns["timestamp"], UNKNOWN_TIME)) if "timestamp" in columns else empty
    return Events(
        offsets=offsets,
        user=user,
        target_start=offsets[:-1] + start.astype(np.int64),
        item_row=item_row,
        time=time.astype(np.int64),
        request=user * (request.max(initial=0) + 1) + request,
        acted=((sizes > 0) | _numpy(columns["outcomes"].is_null())) & (item_row != NOT_AN_ITEM),
        positive=positive,
        columns=columns,
        positive_event=event,
        positive_outcome=outcome,
        outcome_names=outcome_names,
    )


def encode(column: pa.Array) -> tuple[np.ndarray, list[Any]]:
    """Codes of a column's values, int64, -1 = null, and the values that the codes stand for."""
    encoded = column.dictionary_encode()
    return _numpy(pc.fill_null(encoded.indices, -1)).astype(np.int64), encoded.dictionary.to_pylist()


def _item_rows(item_id: pa.Array, catalogue: Catalogue) -> np.ndarray:
    """Catalogue rows of a column of ids, each distinct id looked up once."""
    codes, distinct = encode(item_id)
    return np.append(catalogue.rows(distinct), NOT_AN_ITEM)[codes]


def _combined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(_combined(column).to_numpy(zero_copy_only=False))
