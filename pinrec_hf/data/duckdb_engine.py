"""`prepare` on DuckDB: embedded, out of core, a partition at a time."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from pinrec_hf.data.contract import DataContractError
from pinrec_hf.data.engine import Engine
from pinrec_hf.data.sequences import user_hash
from pinrec_hf.data.source import Source, sql_path

# DuckDB spills beyond this; Arrow batches and Python come on top.
MEMORY_LIMIT = "1500MB"
MAX_THREADS = 8
ROWS_PER_PARTITION = 2**20


class DuckDBEngine(Engine):
    reads_arrow = True

    def __init__(self, con: Backend, work: Path) -> None:
        self.con, self.work = con, work

    def table(self, source: Source, *, others: bool = False) -> ir.Table:
        if isinstance(source.data, pa.Table):
            relation = f"{source.name}_input"
            self.con.con.register(relation, source.data)
        else:
            quoted = ", ".join(map(sql_path, source.data))
            relation = f"read_parquet([{quoted}], union_by_name = true, hive_partitioning = false)"
        columns = ", ".join(["row_number() OVER () - 1 AS row", *source.casts(_micros, others=others)])
        self.con.raw_sql(f"CREATE VIEW {source.name} AS SELECT {columns} FROM {relation}")
        return self.con.table(source.name)

    def read(self, name: str, files: Sequence[Path]) -> ir.Table:
        paths = [glob.escape(str(file)) for file in files]
        return self.con.read_parquet(paths, table_name=name, hive_partitioning=False)

    def parts(self, rows: ir.Table, num_rows: int) -> Sequence[ir.Table]:
        digits = 0  # of the hash, in hex: 1, 16 or 256 parts
        while num_rows > ROWS_PER_PARTITION * 16**digits and digits < 2:
            digits += 1
        folder = self.work / "log"
        if digits:
            rows.mutate(part=user_hash(rows.user_id)[:digits]).to_parquet(folder, partition_by="part")
            parts = [sorted(part.glob("*.parquet")) for part in sorted(folder.iterdir())]
        else:
            rows.to_parquet(folder.with_suffix(".parquet"))
            parts = [[folder.with_suffix(".parquet")]]
        return [self.read(f"staged_{part}", files) for part, files in enumerate(parts)]

    def materialise(self, name: str, expression: ir.Table) -> ir.Table:
        """Into a temporary table, which may spill to disk."""
        self.con.raw_sql(f"CREATE OR REPLACE TEMP TABLE {name} AS {self.con.compile(expression)}")
        return self.con.table(name)

    def ordered(self, table: ir.Table, *columns: str) -> ir.Table:
        return table  # DuckDB gives rows back in the order in which they were inserted, or lie in their files

    def stream(self, expression: ir.Table, batch_size: int) -> Iterator[pa.RecordBatch]:
        # Ibis 12's own way fails on DuckDB 2
        yield from self.con.con.sql(self.con.compile(expression)).to_arrow_reader(batch_size)

    @contextmanager
    def explained_errors(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except duckdb.Error as error:
            text = str(error)
            if "No space left" in text or "max_temp_directory_size" in text:
                raise OSError(errno.ENOSPC, f"no space left beside {folder}; nothing was kept: {text}") from error
            unreadable = isinstance(error, duckdb.DataError | duckdb.InvalidInputException | duckdb.IOException)
            if unreadable or type(error) is duckdb.Error:  # what a damaged page raises
                raise DataContractError(f"the input cannot be read: {text}") from error
            raise
        except RuntimeError as error:
            if "interrupted" in str(error).lower():  # Ctrl-C in the middle of a query
                raise KeyboardInterrupt from error
            raise


@contextmanager
def open_duckdb(work: Path) -> Iterator[DuckDBEngine]:
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    con = ibis.duckdb.connect(memory_limit=MEMORY_LIMIT, temp_directory=str(work / "spill"), threads=threads)
    try:
        yield DuckDBEngine(con, work)
    finally:
        con.disconnect()


def _micros(kind: pa.DataType, expression: str) -> str:
    if pa.types.is_timestamp(kind) and kind.unit == "ns" and kind.tz:  # DuckDB 2 has no epoch_us for these
        return f"epoch_us({expression}::TIMESTAMPTZ)"
    return f"epoch_us({expression})"
