"""Titles and filter columns of the catalogue's items: `items.parquet` in a model's folder, a row a catalogue row."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pinrec_hf.data.output import replaced
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

IN_CATALOGUE = ("embedding", "features", "available_from", "available_until")
FINGERPRINT = b"pinrec_catalogue"
NOT_OF_ITS_TYPE = (pa.ArrowException, OverflowError, UnicodeEncodeError)  # what Arrow says of a value that does not fit


class ItemTable:
    """Columns of an items file, each read when it is first asked for.

    Args:
        path: parquet with `item_id` and any other columns.
        catalogue: whose rows these are.

    Raises:
        ValueError: a truncated or foreign file, or the items of another catalogue.
    """

    def __init__(self, path: str | os.PathLike[str], catalogue: Catalogue) -> None:
        self.path = Path(path)
        try:
            schema, num_rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise ValueError(f"{path} is missing, truncated or no parquet file ({error}); copy it again") from error
        made_of = (schema.metadata or {}).get(FINGERPRINT, b"").decode()
        if made_of != catalogue.fingerprint or num_rows != len(catalogue):
            raise ValueError(
                f"{path} holds {num_rows} items of the catalogue {made_of or 'unknown'}, the tokenizer's is "
                f"{catalogue.fingerprint} of {len(catalogue)}; copy the file of the same model, or remove it: then "
                "nothing is shown or filtered by"
            )
        self.names = [name for name in schema.names if name != "item_id"]
        self._columns: dict[str, pa.ChunkedArray] = {}

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.names:
            raise ValueError(f"the items have no column {name!r}; they have {self.names}")
        if name not in self._columns:
            self._columns[name] = pq.read_table(self.path, columns=[name])[name]
        return self._columns[name]

    def values(self, name: str, rows: np.ndarray) -> list[Any]:
        """A column's values at catalogue rows (int64, `(n,)`).

        Raises:
            ValueError: no such column; the message lists those there are.
        """
        return list(self._column(name).take(pa.array(rows, pa.int64())).to_pylist())

    def parse(self, name: str, text: str) -> Any:
        """A value of a column, or of its lists, from text as a command line has it.

        Raises:
            ValueError: no such column, or a text that is no value of it.
        """
        kind = self._column(name).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        try:
            return pa.array([text]).cast(kind)[0].as_py()
        except NOT_OF_ITS_TYPE as error:
            raise ValueError(f"{name}={text!r}: the column holds {kind}") from error

    def mask(self, filters: Mapping[str, Any]) -> np.ndarray:
        """Which catalogue rows pass all filters: bool `(items,)`.

        Args:
            filters: `{column: value or list of values}`. A column of lists passes where any of its entries is wanted;
                a null passes where None is.

        Raises:
            ValueError: no such column, or values of another type than the column's.
        """
        passing: np.ndarray | None = None
        for name, wanted in filters.items():
            column = self._column(name)
            is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            kind = column.type.value_type if is_list else column.type
            values = list(wanted) if isinstance(wanted, list | tuple | set | np.ndarray) else [wanted]
            flat = pc.list_flatten(column) if is_list else column
            try:
                good = np.asarray(pc.is_in(flat, value_set=pa.array(values, kind)))
            except NOT_OF_ITS_TYPE as error:
                raise ValueError(f"filter {name}={values!r}: the column holds {kind} ({error})") from error
            if is_list:
                places = np.asarray(pc.list_parent_indices(column.combine_chunks()))[good]
                good = np.bincount(places, minlength=len(column)) > 0
                if None in values:
                    good |= np.asarray(column.is_null())
            passing = good if passing is None else passing & good
        if passing is None:
            raise ValueError("filters is empty; give {column: value}, or None for no filter")
        return passing


def write_item_table(
    items: str | os.PathLike[str],
    path: str | os.PathLike[str],
    catalogue: Catalogue,
    before: str | os.PathLike[str] | None = None,
) -> None:
    """Copy the display and filter columns of a sequences dataset's `items.parquet` beside a saved catalogue.

    Args:
        items: the dataset's file, whose rows are the catalogue's. path: parquet to write, whole or not at all.
        before: the file of the smaller catalogue that this one was appended to: its rows stay as they are, and only
            the items that it lacks are taken from `items`.

    Raises:
        ValueError: columns of other types than before.
    """
    source = pq.ParquetFile(items)
    kept = [name for name in source.schema_arrow.names if name not in IN_CATALOGUE]
    if before is not None:
        old, new = pq.read_table(before), source.read(columns=kept)
        new = new.filter(pc.invert(pc.is_in(new["item_id"], value_set=old["item_id"])))
        try:
            table = pa.concat_tables([old, new], promote_options="default")
        except pa.ArrowTypeError as error:
            raise ValueError(f"{items} has a column of another type than {before}: {error}") from error
        batches, schema = iter(table.to_batches(2**14)), table.schema
    else:
        batches = source.iter_batches(2**14, columns=kept)
        schema = pa.schema([source.schema_arrow.field(name) for name in kept])
    metadata = {FINGERPRINT: catalogue.fingerprint.encode()}
    with (
        replaced(path) as partial,
        pq.ParquetWriter(partial, schema.with_metadata(metadata), compression="zstd") as file,
    ):
        for batch in batches:
            file.write_batch(batch.replace_schema_metadata(metadata))
