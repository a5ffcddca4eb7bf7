"""Opening inputs: parquet paths and globs, Arrow tables and streams, `datasets.Dataset`.

This is the one module that speaks SQL (DuckDB's, translated for others): it names and casts the contract's columns,
so that the expressions behind it are plain Ibis and do not care which engine reads the files.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pinrec_hf.data.contract import TABLES, DataContractError, is_string, is_time_of_integers, match_columns

Input = Any  # a path or glob, several of them, a pyarrow Table or RecordBatchReader, or a datasets.Dataset
Micros = Callable[[pa.DataType, str], str]  # SQL for a timestamp's microseconds since epoch


@dataclass(frozen=True)
class Source:
    """A table that can be read as often as needed.

    Attributes:
        name: `"log"`, `"items"` or `"queries"`.
        data: a table, or paths of parquet files.
        schema: as given.
        columns: contract name -> name in the data (see `match_columns`).
        num_rows: how many rows it has.
        first_rows: place of each file's first row.
    """

    name: str
    data: pa.Table | list[str]
    schema: pa.Schema
    columns: dict[str, str]
    num_rows: int
    first_rows: list[int]

    @property
    def other_columns(self) -> list[str]:
        """Those that the contract doesn't know, for display and filters."""
        return [name for name in self.schema.names if name not in {*self.columns, *self.columns.values(), "row"}]

    def casts(self, micros: Micros, *, others: bool = False) -> list[str]:
        """SQL that gives the contract's columns their names and types, see `Engine.table`."""
        casts = [f"{_cast(self, name, micros)} AS {name}" for name in self.columns]
        return casts + [_quote(name) for name in self.other_columns] if others else casts


def sql_path(path: str | os.PathLike[str]) -> str:
    """A path as SQL text, of which no character is a pattern."""
    return "'" + glob.escape(os.fspath(path)).replace("'", "''") + "'"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _times(kind: pa.DataType, expression: str, micros: Micros) -> str:
    if is_time_of_integers(kind):
        return f"{expression}::{'DOUBLE' if pa.types.is_floating(kind) else 'BIGINT'}"
    return f"{expression}::BIGINT" if pa.types.is_null(kind) else micros(kind, expression)


def _cast(source: Source, name: str, micros: Micros) -> str:
    column, kind = _quote(source.columns[name]), source.schema.field(source.columns[name]).type
    match TABLES[source.name][name].kind:
        case "id":
            return f"{column}::{'BIGINT' if pa.types.is_integer(kind) else 'VARCHAR'}"
        case "string":
            return f"{column}::VARCHAR"
        case "names" if is_string(kind):
            return f"[{column}::VARCHAR]"
        case "strings" | "names":
            return f"{column}::VARCHAR[]"
        case "time":
            return _times(kind, column, micros)
        case "times":
            element = kind if pa.types.is_null(kind) else kind.value_type
            column = f"{column}::BIGINT[]" if pa.types.is_null(kind) else column
            return f"list_transform({column}, lambda x: {_times(element, 'x', micros)})"
        case "integer":
            return f"{column}::INTEGER"
        case "vector":
            return f"{column}::FLOAT[]"
        case _:
            return f"{column}::{'BIGINT' if pa.types.is_integer(kind) else 'DOUBLE'}"


def open_source(
    name: str, given: Input, columns: Mapping[str, str] | None, work: Path, *, reads_arrow: bool = True
) -> Source:
    """Open an input and check its columns; a stream is first written to `work`, to be read more than once, and a
    pyarrow Table too unless the engine `reads_arrow`.

    Raises:
        DataContractError: no such file, a file that is not (or only half) parquet, no rows, files of
            different types, missing or mistyped columns.
    """
    data: pa.Table | list[str]
    if isinstance(given, pa.Table) and reads_arrow:
        data, schemas, rows = given, {"the table": given.schema}, [given.num_rows]
    else:
        stream = _stream(given)
        data = [_spool(stream, work / f"{name}_input.parquet")] if stream is not None else _find_files(name, given)
        footers = {file: _footer(name, file) for file in data}
        schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
        rows = [footer.num_rows for footer in footers.values()]
    for file, schema in schemas.items():
        folded = [column.casefold() for column in schema.names]
        if same := [column for column in schema.names if folded.count(column.casefold()) > 1]:
            raise DataContractError(f"{name}: the names of columns {same} in {file} differ in case alone; rename them")
    num_rows, first_rows = sum(rows), [0, *np.cumsum(rows)[:-1].tolist()]
    if num_rows == 0:
        raise DataContractError(f"{name}: the input has no rows")
    sources = [
        Source(name, data, schema, match_columns(schema, name, columns), num_rows, first_rows)
        for schema in schemas.values()
    ]

    def read_as(source: Source, column: str) -> str:
        return _cast(source, column, lambda kind, expression: f"{expression}: {kind}")

    first = {column: read_as(sources[0], column) for column in sources[0].columns}
    for file, source in zip(schemas, sources, strict=True):
        for column in sorted(first.keys() | source.columns.keys()):
            if column not in source.columns or column not in first or read_as(source, column) != first[column]:
                differs = f"column {column!r} is missing or has another type in {file}"
                raise DataContractError(f"{name}: {differs} than in {next(iter(schemas))}")
    return sources[0]


def _stream(given: Input) -> pa.RecordBatchReader | None:
    if isinstance(given, pa.RecordBatchReader):
        return given
    if isinstance(given, pa.Table):
        return given.to_reader()
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
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        # a pattern may match a folder, and what is in it
        found = list(dict.fromkeys(file for match in matches for file in _parquet_files(match)))
        if not found:
            wanted = os.path.join(pattern, "*.parquet") if matches else pattern
            raise DataContractError(f"{name}: no file matches {wanted!r}")
        files += found
    if not files:
        raise DataContractError(f"{name}: no path was given")
    return files


def _parquet_files(path: str) -> list[str]:
    """A file itself, or the `*.parquet` in a folder, which may be folders again, as engines write them."""
    if not os.path.isdir(path):
        return [path]
    inside = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet")))
    return [file for match in inside for file in _parquet_files(match)]


def _footer(name: str, file: str) -> pq.FileMetaData:
    if os.path.getsize(file) == 0:
        raise DataContractError(f"{name}: {file} is empty (0 bytes); write it again")
    try:
        return pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise DataContractError(
            f"{name}: {file} is no parquet file, or was cut off while it was written: {error}"
        ) from error
