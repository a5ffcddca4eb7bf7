"""The items and queries tables: checked in batches, written in the order in which they came."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pinrec_hf.data.contract import (
    UNITS_PER_SECOND,
    DataContractError,
    check_integer_times,
    is_time_of_integers,
)
from pinrec_hf.data.engine import Engine, open_engine, rows_of, to_arrow
from pinrec_hf.data.log_rows import FIRST_ROWS
from pinrec_hf.data.report import Finding
from pinrec_hf.data.source import Input, Source, open_source

ROWS_PER_GROUP = 2**14


@contextmanager
def checked_items(items: Input, time_unit: str | None = None) -> Iterator[Path]:
    """A folder, for the time of the block, whose `items.parquet` is as `prepare` would write it.

    Raises:
        DataContractError: a row that `prepare` would leave out, or no such file, or columns of other types.
    """
    with tempfile.TemporaryDirectory() as name, open_engine("duckdb", Path(name)) as run:
        folder = Path(name)
        with run.explained_errors(folder):
            writer = TableWriter(run, open_source("items", items, None, folder), "item_id", time_unit)
            writer.write(folder / "items.parquet")
        if writer.findings:
            found = "; ".join(f"{f.reason} ({f.count:,} rows, the first: {f.first[0]})" for f in writer.findings)
            raise DataContractError(f"items: {found}; mend these rows, or leave them out")
        yield folder


class TableWriter:
    """Checks and writes one table with a unique key and, perhaps, vectors.

    Attributes:
        num_rows: rows written.
        vector_size: width of `embedding` (the commonest in the table), or None without that column.
        findings: rows left out: null or repeated keys; vectors null, of another width, zero, NaN or infinite.
    """

    def __init__(self, engine: Engine, source: Source, key: str, time_unit: str | None) -> None:
        self.engine, self.source, self.key = engine, source, key
        self.num_rows = 0
        self._found: dict[str, Finding] = {}
        self._view = engine.table(source, others=True)
        self._repeated = self._find_repeated()
        self.vector_size = self._find_vector_size() if "embedding" in source.columns else None
        self._units = {
            name: self._time_unit(name, time_unit) for name in source.columns if name.startswith("available_")
        }

    @property
    def findings(self) -> list[Finding]:
        return list(self._found.values())

    def write(self, path: Path) -> None:
        """Write the rows that keep the contract.

        Raises:
            DataContractError: no row keeps it.
        """
        groups = self._groups()
        first = next(groups, None)
        if first is None:
            raise DataContractError(f"{self.source.name}: no row is left; {'; '.join(map(str, self.findings))}")
        with pq.ParquetWriter(path, first.schema, compression="zstd") as file:
            file.write_table(first)
            for group in groups:
                file.write_table(group)

    def _find_repeated(self) -> np.ndarray:
        """Rows whose key an earlier row has."""
        keys = self._view.filter(self._view[self.key].notnull()).select("row", self.key)
        repeated = keys.group_by(self.key).agg(first=keys.row.min(), n=keys.count()).filter(lambda t: t.n > 1)
        later = keys.inner_join(repeated, self.key).filter(lambda t: t.row != t.first).select("row").order_by("row")
        return to_arrow(later)["row"].to_numpy()

    def _find_vector_size(self) -> int:
        widths = self._view.mutate(width=self._view.embedding.length()).group_by("width").agg(n=lambda t: t.count())
        widths = widths.filter(widths.width > 0).order_by(ibis.desc("n"), "width").limit(1)
        commonest = rows_of(widths)
        if not commonest:
            raise DataContractError(f"{self.source.name}: column 'embedding' holds no vector; leave it out or fill it")
        return commonest[0]["width"]

    def _time_unit(self, name: str, time_unit: str | None) -> int:
        """Units per second of a time column, after checking that its numbers are plausible in them."""
        if not is_time_of_integers(self.source.schema.field(self.source.columns[name]).type):
            return UNITS_PER_SECOND["us"]
        times = self._view[name]
        times = times.nullif(float("nan")) if times.type().is_floating() else times
        ends = rows_of(self._view.aggregate(low=times.min(), high=times.max()))[0]
        check_integer_times(f"{self.source.name}: column {name!r}", ends["low"], ends["high"], time_unit)
        return UNITS_PER_SECOND[time_unit or "s"]

    def _groups(self) -> Iterator[pa.Table]:
        pending: list[pa.Table] = []
        num_pending = 0
        for batch in self.engine.stream(self._expression(), ROWS_PER_GROUP):
            table = self._check(pa.Table.from_batches([batch]))
            while table.num_rows:
                piece = table.slice(0, ROWS_PER_GROUP - num_pending)
                table = table.slice(piece.num_rows)
                pending.append(piece)
                num_pending += piece.num_rows
                self.num_rows += piece.num_rows
                if num_pending == ROWS_PER_GROUP:
                    yield pa.concat_tables(pending).combine_chunks()
                    pending, num_pending = [], 0
        if pending:
            yield pa.concat_tables(pending).combine_chunks()

    def _expression(self) -> ir.Table:
        view = self.engine.ordered(self._view, "row")
        if "features" in view.columns:
            named = view.features.filter(lambda feature: feature.notnull())
            view = view.mutate(features=named.fill_null(ibis.literal([], type="array<string>")))
        return view

    def _check(self, table: pa.Table) -> pa.Table:
        rows = table["row"].to_numpy()
        reasons = np.full(len(rows), "", dtype=object)
        if self.vector_size is not None:
            self._judge_vectors(table["embedding"].combine_chunks(), reasons)
        reasons[np.isin(rows, self._repeated)] = f"{self.key} repeats an earlier row's"
        reasons[table[self.key].is_null().to_numpy()] = f"{self.key} is null"
        for reason in dict.fromkeys(reasons[reasons != ""]):
            self._count(reason, table.filter(reasons == reason).select(["row", self.key]))
        table = table.filter(reasons == "").drop_columns("row")
        for name, per in self._units.items():
            # not every integer is a float: the year 9999, which says "never", is off by less than a second
            seconds = pc.floor(pc.divide(table[name].cast(pa.float64(), safe=False), float(per)))
            seconds = pc.if_else(pc.is_nan(seconds), None, seconds).cast(pa.int64())
            table = table.set_column(table.schema.get_field_index(name), name, seconds)
        return table

    def _judge_vectors(self, vectors: pa.ListArray, reasons: np.ndarray) -> None:
        right = (
            pc.equal(pc.list_value_length(vectors), self.vector_size).fill_null(False).to_numpy(zero_copy_only=False)
        )
        reasons[~right] = f"embedding has not {self.vector_size} numbers, as most have"
        values = vectors.filter(pa.array(right)).flatten().fill_null(float("nan")).to_numpy()
        values = values.reshape(-1, self.vector_size)
        judged = np.full(len(values), "", dtype=object)
        judged[~values.any(axis=1)] = "embedding is zero"
        judged[~np.isfinite(values).all(axis=1)] = "embedding holds NaN or infinity"
        reasons[right] = judged

    def _count(self, reason: str, rows: pa.Table) -> None:
        finding = self._found.setdefault(reason, Finding(self.source.name, reason, 0))
        finding.count += rows.num_rows
        finding.first += rows.slice(0, FIRST_ROWS - len(finding.first)).to_pylist()
