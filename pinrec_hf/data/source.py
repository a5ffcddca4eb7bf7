"""Opening inputs for DuckDB: parquet paths and globs, Arrow tables and streams, `datasets.Dataset`.

This is the one module that speaks DuckDB's SQL: it names and casts the contract's columns, so that the
expressions behind it are plain Ibis and do not care which engine reads the files.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend

from pinrec_hf.data.contract import TABLES, DataContractError, is_time_of_integers, match_columns

Input = Any  # a path or glob, several of them, a pyarrow Table or RecordBatchReader, or a datasets.Dataset


@dataclass(frozen=True)
class Source:
    """A table that can be read as often as needed.

    Attributes:
        name: `"log"`, `"items"` or `"queries"`.
        relation: what follows FROM in SQL.
        schema: as given.
        columns: contract name -> name in the data (see `match_columns`).
        num_rows: how many rows it has.
    """

    name: str
    relation: str
    schema: pa.Schema
    columns: dict[str, str]
    num_rows: int

    @property
    def other_columns(self) -> list[str]:
        """Those that the contract doesn't know, for display and filters."""
        return [name for name in self.schema.names if name not in {*self.columns, *self.columns.values(), "row"}]

    def view(self, con: Backend, *, others: bool = False) -> ir.Table:
        """The table with the contract's names and types, and `row`, its place in the input.

        Ids are strings or int64; integer and float times stay as they are (their unit is the caller's
        business), timestamps become int64 microseconds.

        Args:
            others: also keep `other_columns`, as they are.
        """
        casts = [f"{_cast(self, name)} AS {name}" for name in self.columns]
        casts += [_quote(name) for name in self.other_columns] if others else []
        columns = ", ".join(["row_number() OVER () - 1 AS row", *casts])
        con.raw_sql(f"CREATE VIEW {self.name} AS SELECT {columns} FROM {self.relation}")
        return con.table(self.name)


def stream(con: Backend, expression: ir.Table, batch_size: int) -> Iterator[pa.RecordBatch]:
    """The rows of an expression in order, a batch at a time (Ibis 12's own way fails on DuckDB 2).

    Nothing else can run on the connection until the last batch was taken.
    """
    yield from con.con.sql(con.compile(expression)).to_arrow_reader(batch_size)


def materialise(con: Backend, name: str, expression: ir.Table) -> ir.Table:
    """Compute an expression once, into a temporary table that may spill to disk."""
    con.raw_sql(f"CREATE OR REPLACE TEMP TABLE {name} AS {con.compile(expression)}")
    return con.table(name)


def rows_of(expression: ir.Table) -> list[dict[str, Any]]:
    """The few rows of a small result, as dicts."""
    return expression.to_pyarrow().to_pylist()


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _micros(kind: pa.DataType, expression: str) -> str:
    if is_time_of_integers(kind):
        return f"{expression}::{'DOUBLE' if pa.types.is_floating(kind) else 'BIGINT'}"
    if pa.types.is_null(kind):
        return f"{expression}::BIGINT"
    if pa.types.is_timestamp(kind) and kind.unit == "ns" and kind.tz:  # DuckDB 2 has no epoch_us for these
        return f"epoch_us({expression}::TIMESTAMPTZ)"
    return f"epoch_us({expression})"


def _cast(source: Source, name: str) -> str:
    column, kind = _quote(source.columns[name]), source.schema.field(source.columns[name]).type
    match TABLES[source.name][name].kind:
        case "id":
            return f"{column}::{'BIGINT' if pa.types.is_integer(kind) else 'VARCHAR'}"
        case "string":
            return f"{column}::VARCHAR"
        case "strings":
            return f"{column}::VARCHAR[]"
        case "time":
            return _micros(kind, column)
        case "times":
            element = kind if pa.types.is_null(kind) else kind.value_type
            column = f"{column}::BIGINT[]" if pa.types.is_null(kind) else column
            return f"list_transform({column}, lambda x: {_micros(element, 'x')})"
        case "integer":
            return f"{column}::INTEGER"
        case "vector":
            return f"{column}::FLOAT[]"
        case _:
            return f"{column}::{'BIGINT' if pa.types.is_integer(kind) else 'DOUBLE'}"


def open_source(con: Backend, name: str, given: Input, columns: Mapping[str, str] | None, work: Path) -> Source:
    """Open an input and check its columns; a stream is first written to `work`, to be read more than once.

    Raises:
        DataContractError: no such file, a file that is not (or only half) parquet, no rows, files of
            different types, missing or mistyped columns.
    """
    if isinstance(given, pa.Table):
        relation, schemas, num_rows = f"{name}_input", {"the table": given.schema}, given.num_rows
        con.con.register(relation, given)
    else:
        stream = _stream(given)
        files = [_spool(stream, work / f"{name}_input.parquet")] if stream is not None else _find_files(name, given)
        footers = {file: _footer(name, file) for file in files}
        schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
        num_rows = sum(footer.num_rows for footer in footers.values())
        quoted = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        relation = f"read_parquet([{quoted}], union_by_name = true, hive_partitioning = false)"
    if num_rows == 0:
        raise DataContractError(f"{name}: the input has no rows")
    sources = [
        Source(name, relation, schema, match_columns(schema, name, columns), num_rows) for schema in schemas.values()
    ]
    first = {column: _cast(sources[0], column) for column in sources[0].columns}
    for file, source in zip(schemas, sources, strict=True):
        for column in sorted(first.keys() | source.columns.keys()):
            if column not in source.columns or column not in first or _cast(source, column) != first[column]:
                differs = f"column {column!r} is missing or has another type in {file}"
                raise DataContractError(f"{name}: {differs} than in {next(iter(schemas))}")
    return sources[0]


def _stream(given: Input) -> pa.RecordBatchReader | None:
    if isinstance(given, pa.RecordBatchReader):
        return given
    if hasattr(given, "with_format") and hasattr(given, "features"):  # a datasets.Dataset, not imported for its sake
        tables = given.with_format("arrow").iter(batch_size=10_000)
        first = next(tables, given.features.arrow_schema.empty_table())
        batches = (batch for table in itertools.chain([first], tables) for batch in table.to_batches())
        return pa.RecordBatchReader.from_batches(first.schema, batches)
    return None


def _spool(stream: pa.RecordBatchReader, path: Path) -> str:
    with pq.ParquetWriter(path, stream.schema) as file:
        for batch in stream:
            file.write_batch(batch)
    return str(path)


def _find_files(name: str, given: Input) -> list[str]:
    files: list[str] = []
    for pattern in [given] if isinstance(given, str | os.PathLike) else list(given):
        pattern = os.fspath(pattern)
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*.parquet")
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataContractError(f"{name}: no file matches {pattern!r}")
        files += found
    if not files:
        raise DataContractError(f"{name}: no path was given")
    return files


def _footer(name: str, file: str) -> pq.FileMetaData:
    if os.path.getsize(file) == 0:
        raise DataContractError(f"{name}: {file} is empty (0 bytes); write it again")
    try:
        return pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise DataContractError(
            f"{name}: {file} is no parquet file, or was cut off while it was written: {error}"
        ) from error
