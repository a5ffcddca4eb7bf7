"""The files of one split: Arrow batches in, parquet out, the same bytes however the rows were batched."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

EVENTS_PER_ROW_GROUP = 2**18
ROW_GROUPS_PER_FILE = 16


def sequence_schema(user_type: pa.DataType, item_type: pa.DataType, optional: set[str]) -> pa.Schema:
    """The Arrow schema of train, validation and test files.

    Args:
        user_type, item_type: `pa.string()` or `pa.int64()`.
        optional: those of query, context_item_id, position, weight and request_features that the log has.
    """
    lists = {
        "item_id": item_type,
        "surface": pa.string(),
        "timestamp": pa.int64(),
        "outcomes": pa.list_(pa.string()),
        "request_id": pa.int64(),
        "query": pa.string(),
        "context_item_id": item_type,
        "position": pa.int32(),
        "weight": pa.float32(),
        "request_features": pa.list_(pa.string()),
    }
    always = ("item_id", "surface", "timestamp", "outcomes", "request_id")
    columns = [(name, pa.list_(kind)) for name, kind in lists.items() if name in always or name in optional]
    return pa.schema([("user_id", user_type), *columns, ("target_start", pa.int64())])


class SequenceFiles:
    """Writes `folder/part-00000.parquet`, ... A row group ends with the user who fills it, so its bounds
    depend on the rows alone. Use as a context manager.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self.num_users = 0
        self._pending: list[pa.Table] = []
        self._pending_events = 0
        self._row_groups = 0
        self._file: pq.ParquetWriter | None = None
        folder.mkdir()

    def write(self, rows: pa.Table) -> None:
        """Append one row a user."""
        rows = rows.cast(self.schema)
        while rows.num_rows:
            events = pc.list_value_length(rows["item_id"]).to_numpy()
            filled = self._pending_events + np.cumsum(events)
            end = int(np.searchsorted(filled, EVENTS_PER_ROW_GROUP)) + 1  # the user who fills it is inside
            self._pending.append(rows.slice(0, end))
            self._pending_events = int(filled[min(end, len(filled)) - 1])
            if end <= len(filled):
                self._flush()
            rows = rows.slice(end)

    def _flush(self) -> None:
        table = pa.concat_tables(self._pending).combine_chunks()
        if self._file is None:
            path = self.folder / f"part-{self._row_groups // ROW_GROUPS_PER_FILE:05d}.parquet"
            self._file = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._file.write_table(table, row_group_size=max(table.num_rows, 1))
        self.num_users += table.num_rows
        self._row_groups += 1
        self._pending, self._pending_events = [], 0
        if self._row_groups % ROW_GROUPS_PER_FILE == 0:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> SequenceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._pending:
            self._flush()
        self._close()
