"""`prepare`: logs of any size into a sequences dataset, out of core.

    log ---- check ----> stage: good rows, partitioned by a hash of the user (parquet)
                             | one partition at a time: deduplicate, number views, order, collect, cut
                             v
    items -- check ----> DIR/{train,validation,test}/part-*.parquet, items.parquet, queries.parquet,
                         metadata.json (the vocabulary, read back from the train files alone), report.json

Users come out in the order of their id's hash, whatever the partitions: the same input gives the same bytes,
and nothing that train or the vocabulary holds can depend on a row after the cut.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pinrec_hf.data.contract import DataContractError, check_column_map, check_same_id_type, id_type
from pinrec_hf.data.engine import Engine, open_engine, rows_of, to_arrow
from pinrec_hf.data.items import TableWriter
from pinrec_hf.data.log_rows import FIRST_ROWS, check_log, find_unknown_items
from pinrec_hf.data.output import new_directory
from pinrec_hf.data.report import Finding, Report
from pinrec_hf.data.sequence_files import SequenceFiles, sequence_schema
from pinrec_hf.data.sequences import OPTIONAL, collect, events, rows_of_split, without_duplicates
from pinrec_hf.data.source import Input, Source, open_source
from pinrec_hf.data.splits import SPLITS, Split, Time, make_split
from pinrec_hf.modeling.configuration_pinrec import MAX_OUTCOMES

USERS_PER_BATCH = 2**11
LONGEST_GAP = 10**9  # minutes: what 64 bits of microseconds hold


def prepare(
    log: Input,
    *,
    output_dir: str | os.PathLike[str],
    items: Input = None,
    queries: Input = None,
    columns: Mapping[str, str] | None = None,
    time_unit: str | None = None,
    negative_outcomes: Sequence[str] = (),
    validation_start: Time | None = None,
    test_start: Time | None = None,
    test_end: Time | None = None,
    leave_one_out: bool = False,
    num_targets: int = 1,
    view_gap_minutes: float = 30,
    strict: bool = False,
    engine: str = "duckdb",
    name: str | None = None,
    license: str | None = None,
) -> Report:
    """Turn a log into a sequences dataset: one row a user, cut into train, validation and test.

    Args:
        log, items, queries: parquet (a path, a folder, a glob, or several), a `datasets.Dataset`, a pyarrow
            Table or RecordBatchReader, with the columns of `pinrec_hf.data.contract`.
        output_dir: a new folder; it appears only when everything in it is written.
        columns: contract name -> name in the tables.
        time_unit: of integer times: `"s"`, `"ms"` or `"us"`.
        negative_outcomes: outcomes that are no success (`hide`): inputs, never targets.
        validation_start, test_start, test_end: seconds since epoch or ISO 8601, UTC unless it says otherwise.
            By default the last day of the log is test and the day before it validation.
        leave_one_out: instead, each user's last `num_targets` events are test and as many before them validation.
        view_gap_minutes: without `request_id`, a longer gap ends a feed view.
        strict: refuse what is otherwise dropped and counted.
        engine: `"duckdb"`, or `"spark"` (extra `spark`): the same expressions, the same rows.
        name, license: of the dataset, kept in metadata.json.

    Returns:
        What was read, kept and dropped (also in report.json).

    Raises:
        DataContractError: input that breaks the contract (see `pinrec_hf.data.contract` and `Report`).
        FileExistsError: `output_dir` exists.
        OSError: no space left; nothing half-written stays.
    """
    if not 0 < view_gap_minutes <= LONGEST_GAP:
        raise ValueError(f"view_gap_minutes must be above 0 and at most {LONGEST_GAP:,}, not {view_gap_minutes}")
    with new_directory(output_dir) as folder:
        work = folder / ".work"
        work.mkdir()
        with open_engine(engine, work) as run, run.explained_errors(folder):
            report = Report()
            tables = {"log": log, "items": items, "queries": queries}
            sources = {
                table: open_source(table, given, columns, work, reads_arrow=run.reads_arrow)
                for table, given in tables.items()
                if given is not None
            }
            log_source = sources["log"]
            check_column_map(columns, {t: source.schema for t, source in sources.items()})
            id_types = _id_types(log_source, sources.get("items"))
            report.rows_read = {source.name: source.num_rows for source in sources.values()}

            checked = check_log(log_source, run.table(log_source), time_unit)
            report.findings += checked.findings
            if not checked.num_rows:
                raise DataContractError(f"log: no row is left; {'; '.join(map(str, report.findings))}")
            split = make_split(
                checked.last_time,
                validation_start=validation_start,
                test_start=test_start,
                test_end=test_end,
                leave_one_out=leave_one_out,
                num_targets=num_targets,
            )
            _check_negative_outcomes(checked.rows, negative_outcomes)
            sizes: dict[str, int | None] = {"items": None, "queries": None}
            for table, source in list(sources.items())[1:]:
                writer = TableWriter(run, source, "query" if table == "queries" else "item_id", time_unit)
                writer.write(folder / f"{table}.parquet")
                sizes[table], report.rows_kept[table] = writer.vector_size, writer.num_rows
                report.findings += writer.findings
            if items is not None:
                known = run.read("items_kept", [folder / "items.parquet"]).select("item_id")
                unknown = find_unknown_items(checked.rows, known)
                report.findings += [unknown] if unknown else []
            _refuse(report.findings, strict)

            optional = {column for column in OPTIONAL if column in log_source.columns}
            schema = sequence_schema(_ARROW_TYPES[id_types["user_id"]], _ARROW_TYPES[id_types["item_id"]], optional)
            parts = run.parts(checked.rows, checked.num_rows)
            _write_sequences(run, parts, folder, schema, split, view_gap_minutes, report)
            _refuse(report.findings, strict)
            split.check(report.num_users)

            vocabulary = _vocabulary(run, folder / "train", negative_outcomes)
            report.num_items = report.rows_kept["items"] if items is not None else _write_train_items(run, folder)
            metadata = {
                "format": 1,
                "name": name,
                "license": license,
                "id_types": id_types,
                **vocabulary,
                "split": split.to_dict(),
                "content_size": sizes["items"],
                "query_size": sizes["queries"],
                "num_items": report.num_items,
                "num_users": report.num_users,
                "num_events": report.num_events,
            }
            (folder / "metadata.json").write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", "utf-8")
            (folder / "report.json").write_text(report.to_json(), "utf-8")
        shutil.rmtree(work)
    return report


_ARROW_TYPES = {"string": pa.string(), "integer": pa.int64()}


def _id_types(log: Source, items: Source | None) -> dict[str, str]:
    def kind(source: Source, column: str) -> pa.DataType:
        return source.schema.field(source.columns[column]).type

    item_id = kind(log, "item_id")
    if "context_item_id" in log.columns:
        check_same_id_type(item_id, kind(log, "context_item_id"), "its context_item_id")
    if items is not None:
        check_same_id_type(item_id, kind(items, "item_id"), "the items table's item_id")
    return {"user_id": id_type(kind(log, "user_id")), "item_id": id_type(item_id)}


def _check_negative_outcomes(rows: ir.Table, negative: Sequence[str]) -> None:
    if not negative:
        return
    names = rows.select(outcome=rows.outcomes.unnest()).filter(lambda t: t.outcome.notnull()).distinct()
    present = sorted(row["outcome"] for row in rows_of(names))
    for outcome in negative:
        if outcome not in present:
            raise DataContractError(f"negative outcome {outcome!r} is not in the log, whose outcomes are {present}")


def _refuse(findings: Sequence[Finding], strict: bool) -> None:
    if strict and findings:
        raise DataContractError("strict refuses:\n" + "\n".join(map(str, findings)))


def _write_sequences(
    engine: Engine,
    parts: Sequence[ir.Table],
    folder: Path,
    schema: pa.Schema,
    split: Split,
    view_gap_minutes: float,
    report: Report,
) -> None:
    """Write train, validation and test, part by part, and count users, events and duplicate rows."""
    lists = [name for name in schema.names if name not in ("user_id", "target_start")]
    duplicates = Finding("log", "the row repeats another in every column", 0)
    report.rows_kept["log"] = 0
    report.num_events = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        files = {s: stack.enter_context(SequenceFiles(folder / s, schema)) for s in SPLITS}
        for part in tqdm(parts, desc="prepare", unit="part", disable=None):
            rows = engine.materialise("unique_rows", without_duplicates(part))
            _count_duplicates(rows, duplicates)
            report.rows_kept["log"] += rows_of(rows.aggregate(n=rows.count()))[0]["n"]
            users = engine.materialise("users", collect(events(rows, view_gap_minutes), split))
            ends = rows_of(users.aggregate(total=users.num_events.sum(), **{s: users[s].sum() for s in SPLITS}))[0]
            report.num_events["train"] += ends["train"]
            report.num_events["validation"] += ends["validation"] - ends["train"]
            report.num_events["test"] += ends["test"] - ends["validation"]
            report.events_after_test += ends["total"] - ends["test"]
            in_order = engine.ordered(users, "hash", "user_id")
            for s in SPLITS:
                for batch in engine.stream(rows_of_split(in_order, s, lists), USERS_PER_BATCH):
                    files[s].write(pa.Table.from_batches([batch]))
    report.num_users = {s: files[s].num_users for s in SPLITS}
    report.findings += [duplicates] if duplicates.count else []


def _count_duplicates(rows: ir.Table, duplicates: Finding) -> None:
    repeated = rows.filter(rows.copies > 1)
    duplicates.count += rows_of(repeated.aggregate(n=(repeated.copies - 1).sum().fill_null(0)))[0]["n"]
    first = repeated.select("user_id", "item_id", repeats=repeated.row, row=repeated.last_row).order_by("row")
    found = duplicates.first + rows_of(first.limit(FIRST_ROWS))
    duplicates.first = sorted(found, key=lambda row: row["row"])[:FIRST_ROWS]


def _vocabulary(engine: Engine, train: Path, negative: Sequence[str]) -> dict[str, Any]:
    """Surfaces and outcomes, most frequent first, of the train files and nothing else."""
    rows = engine.read("train_rows", sorted(train.iterdir()))
    each = rows.select(event=rows.surface.zip(rows.outcomes, rows.item_id).unnest())
    kinds = {"surface": each.event.f1, "outcomes": each.event.f2, "is_item": each.event.f3.notnull()}
    pairs = each.group_by(**kinds).agg(n=each.count())
    surfaces: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    by_surface: dict[str, dict[str, int]] = {}
    for row in rows_of(pairs):
        if row["surface"] is not None:
            surfaces[row["surface"]] = surfaces.get(row["surface"], 0) + row["n"]
        for outcome in row["outcomes"] or ():
            outcomes[outcome] = outcomes.get(outcome, 0) + row["n"]
            # nobody acts on a query: no target has that outcome
            if row["is_item"] and row["surface"] is not None and outcome not in negative:
                counts = by_surface.setdefault(row["surface"], {})
                counts[outcome] = counts.get(outcome, 0) + row["n"]

    def by_frequency(counts: dict[str, int]) -> list[str]:
        return sorted(counts, key=lambda name: (-counts[name], name))

    named = by_frequency(outcomes)
    if len({*named, *negative}) > MAX_OUTCOMES:
        raise DataContractError(
            f"log: train has {len(named)} outcomes, of which a model holds {MAX_OUTCOMES}; join rare ones, such as "
            f"{named[-1]!r}"
        )
    # one that train lacks is named by the caller: a model must know it, to know that it is negative
    named += [name for name in dict.fromkeys(negative) if name not in outcomes]
    return {
        "surfaces": by_frequency(surfaces),
        "outcomes": named,
        "negative_outcomes": list(dict.fromkeys(negative)),
        "outcome_counts": {
            s: {o: by_surface[s][o] for o in by_frequency(by_surface[s])}
            for s in by_frequency(surfaces)
            if s in by_surface
        },
    }


def _write_train_items(engine: Engine, folder: Path) -> int:
    """Without an items table the catalogue is what train saw, in the order of the ids."""
    rows = engine.read("train_rows", sorted((folder / "train").iterdir()))
    ids = (
        rows.select(item_id=rows.item_id.unnest()).distinct().filter(lambda t: t.item_id.notnull()).order_by("item_id")
    )
    table = to_arrow(ids)
    if not table.num_rows:
        raise DataContractError("log: train holds queries only, no item; give --items, or a later --validation-start")
    pq.write_table(table, folder / "items.parquet", compression="zstd")
    return table.num_rows
