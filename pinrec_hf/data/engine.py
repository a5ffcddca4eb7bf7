"""The engines that `prepare` may run on: the expressions are the same, and so is what comes out.

    duckdb    one machine, out of core, partition by partition
    spark     a cluster, or one machine with Java (extra `spark`)

An engine reads, keeps and streams tables; what is computed is said in Ibis elsewhere, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from pinrec_hf.data.source import Source

ENGINES = ("duckdb", "spark")


class Engine(ABC):
    """Open one with `open_engine`, as a context manager.

    Attributes:
        reads_arrow: whether `table` takes a pyarrow Table as it is.
    """

    reads_arrow: bool

    @abstractmethod
    def table(self, source: Source, *, others: bool = False) -> ir.Table:
        """An input with the contract's names and types, and `row`, its place in the input.

        Ids are strings or int64; integer and float times stay as they are (their unit is the caller's
        business), timestamps become int64 microseconds.

        Args:
            others: also keep `source.other_columns`, as they are.
        """

    @abstractmethod
    def read(self, name: str, files: Sequence[Path]) -> ir.Table:
        """Parquet files that `prepare` wrote, as a table of that name."""

    @abstractmethod
    def parts(self, rows: ir.Table, num_rows: int) -> Sequence[ir.Table]:
        """Rows of a log, each user's in one part; parts come in the order of the users' hashes."""

    @abstractmethod
    def materialise(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute an expression once; the next one of that name may replace it."""

    @abstractmethod
    def ordered(self, table: ir.Table, *columns: str) -> ir.Table:
        """A table whose rows were made in the order of these columns, with that order assured."""

    @abstractmethod
    def stream(self, expression: ir.Table, batch_size: int) -> Iterator[pa.RecordBatch]:
        """The rows of an expression in order, a batch at a time.

        Nothing else can run on the engine until the last batch was taken.
        """

    @abstractmethod
    def explained_errors(self, folder: Path) -> AbstractContextManager[None]:
        """The engine's errors about the disk, the data or Ctrl-C become what they would be elsewhere."""


def open_engine(name: str, work: Path) -> AbstractContextManager[Engine]:
    """The engine of that name, keeping what does not fit into memory in the folder `work`.

    Raises:
        ValueError: an engine that does not exist, or that is not installed.
    """
    if name == "duckdb":
        from pinrec_hf.data.duckdb_engine import open_duckdb

        return open_duckdb(work)
    if name == "spark":
        try:
            from pinrec_hf.data.spark_engine import open_spark
        except ModuleNotFoundError as error:
            raise ValueError("engine 'spark' needs Java and `pip install \".[spark]\"` in the clone") from error
        return open_spark(work)
    raise ValueError(f"engine {name!r} does not exist; choose one of {list(ENGINES)}")


def to_arrow(expression: ir.Table) -> pa.Table:
    """A small result."""
    backend: Any = expression.get_backend()
    if backend.name == "pyspark":  # Ibis 12 goes by pandas, which has no integers with holes
        return backend.raw_sql(backend.compile(expression)).toArrow()
    return expression.to_pyarrow()


def rows_of(expression: ir.Table) -> list[dict[str, Any]]:
    """The few rows of a small result, as dicts."""
    return to_arrow(expression).to_pylist()
