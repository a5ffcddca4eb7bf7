"""`prepare` on Spark: a session of the caller's, or the one that `spark-submit` or spark-defaults.conf configure.

The output folder must lie where driver and executors see it under the same path.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, functions

from pinrec_hf.data.contract import DataContractError
from pinrec_hf.data.engine import Engine
from pinrec_hf.data.source import Source


class SparkEngine(Engine):
    reads_arrow = False

    def __init__(self, session: SparkSession, work: Path) -> None:
        self.session, self.work = session, work
        self.con: Any = ibis.pyspark.connect(session)
        self._num_written = 0

    def table(self, source: Source, *, others: bool = False) -> ir.Table:
        rows = self._read(source.data).select(
            "*", functions.expr("parse_url(_metadata.file_path, 'PATH') AS file"), "_metadata.row_index"
        )
        for field in source.schema:
            rows = _nanoseconds_to_timestamps(rows, field)
        escaped = [urlsplit(uri).path for uri in rows.inputFiles()]  # as the file's metadata have it
        by_path = {unquote(path): path for path in escaped}
        files = [by_path[os.path.abspath(file)] for file in source.data]
        # a row's place without a sort: where its file begins, and its place in the file
        begins = list(zip(files, source.first_rows, strict=True))
        first_rows = self.session.createDataFrame(begins, "file string, first_row long")
        rows.join(first_rows.hint("broadcast"), "file").createOrReplaceTempView(f"{source.name}_input")
        columns = ["first_row + row_index AS row", *source.casts(_micros, others=others)]
        sql = sqlglot.transpile(f"SELECT {', '.join(columns)} FROM {source.name}_input", read="duckdb", write="spark")[
            0
        ]
        self.session.sql(sql).createOrReplaceTempView(source.name)
        return self.con.table(source.name)

    def read(self, name: str, files: Sequence[Path]) -> ir.Table:
        self._read(files).createOrReplaceTempView(name)
        return self.con.table(name)

    def parts(self, rows: ir.Table, num_rows: int) -> Sequence[ir.Table]:
        return [rows]  # Spark partitions by user itself

    def materialise(self, name: str, expression: ir.Table) -> ir.Table:
        return self.read(name, self._write(expression))

    def ordered(self, table: ir.Table, *columns: str) -> ir.Table:
        return table.order_by(*columns)  # Spark reads files in any order

    def stream(self, expression: ir.Table, batch_size: int) -> Iterator[pa.RecordBatch]:
        for path in self._write(expression):
            file = pq.ParquetFile(path)
            schema = pa.schema([field.with_nullable(True) for field in file.schema_arrow])  # as DuckDB's are
            for batch in file.iter_batches(batch_size):
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    @contextmanager
    def explained_errors(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except PySparkException as error:
            text = str(error)
            if "No space left" in text:
                raise OSError(errno.ENOSPC, f"no space left beside {folder}; nothing was kept: {text}") from error
            if "FAILED_READ_FILE" in text:
                raise DataContractError(f"the input cannot be read: {text}") from error
            raise

    def _read(self, files: Sequence[str | Path]) -> DataFrame:
        escaped = [re.sub(r"([\\*?{}\[\]])", r"\\\1", os.path.abspath(file)) for file in files]
        return self.session.read.option("mergeSchema", True).parquet(*escaped)

    def _write(self, expression: ir.Table) -> list[Path]:
        """The rows in parquet files: their order is that of the files' names."""
        folder = self.work / f"spark-{self._num_written}"
        self._num_written += 1
        self.session.sql(self.con.compile(expression)).write.parquet(str(folder.absolute()))
        return sorted(folder.glob("part-*.parquet"))


@contextmanager
def open_spark(work: Path) -> Iterator[SparkEngine]:
    session = SparkSession.builder.appName("pinrec prepare").getOrCreate()
    # the settings that decide what is read: the caller's come back
    settings = {"spark.sql.session.timeZone": "UTC", "spark.sql.legacy.parquet.nanosAsLong": "true"}
    before = {name: str(session.conf.get(name)) for name in settings}
    try:
        for name, value in settings.items():
            session.conf.set(name, value)
        yield SparkEngine(session, work)
    finally:
        for name, value in before.items():
            session.conf.set(name, value)


def _micros(kind: pa.DataType, expression: str) -> str:
    return f"unix_micros({expression}::TIMESTAMPTZ)"


def _nanoseconds_to_timestamps(rows: DataFrame, field: pa.Field) -> DataFrame:
    """Spark has no nanoseconds: a column of them, or of lists of them, is read as integers."""
    column = "`" + field.name.replace("`", "``") + "`"
    if _is_nanoseconds(field.type):
        return rows.withColumn(field.name, functions.expr(f"timestamp_micros({column} div 1000)"))
    if _is_nanoseconds(getattr(field.type, "value_type", field.type)):
        micros = f"transform({column}, time -> timestamp_micros(time div 1000))"
        return rows.withColumn(field.name, functions.expr(micros))
    return rows


def _is_nanoseconds(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) and kind.unit == "ns"
