"""The log row by row: what breaks the contract, and the rows that are left as typed events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir

from pinrec_hf.data.contract import (
    UNITS_PER_SECOND,
    DataContractError,
    check_integer_times,
    check_typed_times,
    is_string,
    is_time_of_integers,
)
from pinrec_hf.data.engine import rows_of
from pinrec_hf.data.report import Finding
from pinrec_hf.data.source import Source

FIRST_ROWS = 5
MICROS = 1_000_000
LARGEST_WEIGHT = 3e38  # of a float32

BAD_TIME = "negative or NaN timestamp"


@dataclass(frozen=True)
class CheckedLog:
    """The rows that keep the contract.

    Attributes:
        rows: `row, user_id, item_id, time` (int64 microseconds, null = unknown) and the other columns
            present.
        num_rows: how many there are.
        last_time: of them, in seconds; None if no time is known.
        findings: the rows left out.
    """

    rows: ir.Table
    num_rows: int
    last_time: int | None
    findings: list[Finding]


def check_log(source: Source, log: ir.Table, time_unit: str | None) -> CheckedLog:
    """Sort a log's rows into good ones and counted bad ones, in one scan.

    Raises:
        DataContractError: implausible times; `outcomes` and `outcome_timestamps` of unequal length.
    """
    numbers = {c for c in ("timestamp", "outcome_timestamps") if c in log.columns}
    numbers = {c for c in numbers if is_time_of_integers(source.schema.field(source.columns[c]).type)}
    units = {c: time_unit if c in numbers else "us" for c in ("timestamp", "outcome_timestamps")}
    check_integer_times("time", None, None, time_unit)

    bad_time = _bad_time(log.timestamp)
    bad_outcome_time = ibis.literal(False)
    if "outcome_timestamps" in log.columns:
        if "outcomes" not in log.columns:
            raise DataContractError("log: outcome_timestamps needs the column outcomes beside it")
        bad_outcome_time = log.outcome_timestamps.filter(_bad_time).length() > 0
        unequal = log.outcomes.length().fill_null(0) != log.outcome_timestamps.length()
        example = _first(log.filter(unequal), ["outcomes", "outcome_timestamps"], 1)
        if example:
            raise DataContractError(
                f"log: outcome_timestamps must have an entry for each of the outcomes (null = at once); {example[0]}"
            )
    has_query = log.query.notnull() if "query" in log.columns else ibis.literal(False)
    bad_weight = ibis.literal(False)
    if "weight" in log.columns:
        weight = log.weight.cast("float64")
        bad_weight = weight.isnan() | (weight < 0) | (weight > LARGEST_WEIGHT)
    reason = ibis.cases(
        (log.user_id.isnull(), "null user_id"),
        (log.item_id.isnull() & ~has_query, "neither item_id nor query"),
        (bad_time, BAD_TIME),
        (bad_outcome_time, "negative or NaN outcome_timestamps"),
        (bad_weight, "negative, NaN or infinite weight"),
    )
    log = log.mutate(reason=reason)
    _check_units(log, numbers, time_unit)

    counts = log.group_by("reason").agg(n=log.count(), first=log.timestamp.min(), last=log.timestamp.max())
    found = {row["reason"]: row for row in rows_of(counts)}
    good = found.pop(None, {"n": 0, "first": None, "last": None})
    if "timestamp" not in numbers:
        check_typed_times("log: column 'timestamp'", good["first"], good["last"])
    findings = []
    for text in sorted(found):
        columns = [
            "user_id",
            "item_id",
            *(c for c in source.columns if c in text and c not in ("user_id", "item_id")),
        ]
        findings.append(Finding("log", text, found[text]["n"], _first(log.filter(log.reason == text), columns)))

    rows = log.filter(log.reason.isnull()).drop("reason")
    rows = rows.mutate(time=_micros(rows.timestamp, units["timestamp"])).drop("timestamp")
    if "outcome_timestamps" in rows.columns:
        micros = rows.outcome_timestamps.map(lambda t: _micros(t, units["outcome_timestamps"]))
        rows = rows.mutate(outcome_timestamps=micros)
    if "position" in rows.columns:  # -1 is how many a log says that it does not know
        rows = rows.mutate(position=ibis.ifelse(rows.position < 0, None, rows.position))
    if "request_features" in rows.columns:
        rows = rows.mutate(request_features=rows.request_features.filter(lambda feature: feature.notnull()))
    if "surface" not in rows.columns:
        rows = rows.mutate(surface=ibis.literal("default"))
    if "outcomes" not in rows.columns:
        rows = rows.mutate(outcomes=ibis.array([ibis.literal("interaction")]))
    elif is_string(source.schema.field(source.columns["outcomes"]).type):  # of which no list can be empty
        rows = rows.mutate(outcomes=rows.outcomes.filter(lambda name: name.isnull() | (name != "")))
        if "outcome_timestamps" in rows.columns:
            none = rows.outcomes.length() == 0
            rows = rows.mutate(outcome_timestamps=ibis.ifelse(none, None, rows.outcome_timestamps))
    last_time = None if good["last"] is None else int(good["last"] // UNITS_PER_SECOND[units["timestamp"] or "s"])
    return CheckedLog(rows, good["n"], last_time, findings)


def find_unknown_items(rows: ir.Table, items: ir.Table) -> Finding | None:
    """The events of items that the items table lacks: they stay in histories, as the unknown item."""
    unknown = rows.filter(rows.item_id.notnull()).anti_join(items, "item_id")
    count = rows_of(unknown.aggregate(n=unknown.count()))[0]["n"]
    if not count:
        return None
    first = _first(unknown, ["user_id", "item_id"])
    return Finding(
        "log", "item_id is not in the items table (unknown item, never a target)", count, first, dropped=False
    )


def _bad_time(time: ir.NumericValue) -> ir.BooleanValue:
    bad = time < 0
    if time.type().is_floating():
        bad = bad | time.isnan() | time.isinf()
    return bad.fill_null(False)


def _micros(time: ir.NumericValue, unit: str | None) -> ir.NumericValue:
    micros = time * (MICROS // UNITS_PER_SECOND[unit or "s"])
    return micros.floor().cast("int64") if time.type().is_floating() else micros


def _check_units(log: ir.Table, numbers: set[str], time_unit: str | None) -> None:
    good = log.filter(log.reason.isnull())
    if "timestamp" in numbers:
        times = rows_of(good.aggregate(low=good.timestamp.min(), high=good.timestamp.max()))[0]
        check_integer_times("log: column 'timestamp'", times["low"], times["high"], time_unit)
    if "outcome_timestamps" in numbers:
        lists = good.outcome_timestamps
        times = rows_of(good.aggregate(low=lists.mins().min(), high=lists.maxs().max()))[0]
        check_integer_times("log: column 'outcome_timestamps'", times["low"], times["high"], time_unit)


def _first(rows: ir.Table, columns: list[str], limit: int = FIRST_ROWS) -> list[dict[str, Any]]:
    return rows_of(rows.select("row", *columns).order_by("row").limit(limit))
