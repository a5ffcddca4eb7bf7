"""From checked log rows to one row a user: Ibis expressions only, which compile for DuckDB and Spark alike.

    rows -> no duplicates -> late outcomes apart -> feed views numbered -> in order -> one row a user -> cut

Every step looks only at rows that are not later than the event it treats, so that what comes out before a cut
cannot depend on what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable

import ibis
import ibis.expr.types as ir

from pinrec_hf.data.log_rows import MICROS
from pinrec_hf.data.splits import Split

OPTIONAL = ("query", "context_item_id", "position", "weight", "request_features")
EVENT = ("item_id", "surface", "timestamp", "outcomes", "request_id")


@ibis.udf.scalar.builtin
def md5(text: str) -> str:  # type: ignore[empty-body]
    """Hex digest: both engines have it, and it is the same everywhere, unlike their hash functions."""


def user_hash(user_id: ir.Value) -> ir.StringValue:
    """Places users in an order that depends on nothing but the id."""
    return md5(user_id.cast("string"))


def without_duplicates(rows: ir.Table) -> ir.Table:
    """Rows that agree in every column become one: `row` the first, `last_row` the last, `copies` how many."""
    columns = [name for name in rows.columns if name != "row"]
    return rows.group_by(columns).agg(row=rows.row.min(), last_row=rows.row.max(), copies=rows.count())


def events(rows: ir.Table, view_gap_minutes: float) -> ir.Table:
    """Events with `request_id` and `seq`, their place in the user's history.

    Args:
        rows: of `without_duplicates`; `time` in microseconds.
        view_gap_minutes: a feed view without a given request id ends at a longer gap.
    """
    optional = [name for name in OPTIONAL if name in rows.columns]
    key = [name for name in rows.columns if name not in ("row", "last_row", "copies", "outcomes", "outcome_timestamps")]
    if "outcome_timestamps" in rows.columns:
        rows = _split_outcomes(rows)
        rows = rows.group_by([*key, "outcomes"]).agg(late=rows.late.collect().flatten().unique())
    else:
        rows = rows.mutate(outcomes=_names(rows.outcomes))
    # the one sort by all columns; what follows orders by this number
    in_order = ibis.window(group_by="user_id", order_by=_order(rows))
    rows = _number_views(rows.mutate(seq=ibis.row_number().over(in_order)), view_gap_minutes)
    if "late" in rows.columns:
        late = rows.filter(rows.late.length() > 0)
        late = late.mutate(late=late.late.unnest())
        late = late.mutate(time=late.late.f2, outcomes=_names(ibis.array([late.late.f1])))
        rows = rows.drop("late").union(late.drop("late"))
        # what came later stands at its own time, where `order` decides again
        rows = rows.mutate(seq=ibis.row_number().over(ibis.window(group_by="user_id", order_by=_order(rows))))
    rows = rows.mutate(timestamp=rows.time // MICROS)
    return rows.select("user_id", "seq", *EVENT, *optional)


def _names(outcomes: ir.ArrayValue) -> ir.ArrayValue:
    """An event's outcomes as a sorted set; null where nothing but unknown names was given."""
    names = outcomes.filter(lambda name: name.notnull())
    known = ibis.ifelse((names.length() == 0) & (outcomes.length() > 0), None, names.unique().sort())
    return ibis.ifelse(outcomes.length() == 0, outcomes, known)  # most rows of a log: nothing to compute


def _split_outcomes(rows: ir.Table) -> ir.Table:
    """`outcomes` keeps those of the event's own second; `late` gets the others, as pairs (outcome, time)."""
    unknown = rows.outcomes.map(lambda name: ibis.null("int64"))
    pairs = rows.outcomes.zip(ibis.ifelse(rows.outcome_timestamps.isnull(), unknown, rows.outcome_timestamps))

    def is_late(pair: ir.StructValue) -> ir.BooleanValue:
        later = (pair.f2 // MICROS > rows.time // MICROS) | rows.time.isnull()
        return pair.f2.notnull() & later

    early = pairs.filter(lambda pair: ~is_late(pair)).map(lambda pair: pair.f1)
    return rows.mutate(outcomes=_names(early), late=pairs.filter(is_late))


def _order(rows: ir.Table) -> list[ir.Value]:
    """Time, `order`, `position`, item; then every other column, so that no tie is left to the engine."""
    names = [
        "time",
        "order",
        "position",
        "item_id",
        "surface",
        *OPTIONAL,
        "request_id",
        "outcomes",
    ]
    names = [name for name in dict.fromkeys(names) if name in rows.columns]
    return [ibis.asc(rows[name], nulls_first=True) for name in names]


def _number_views(rows: ir.Table, gap_minutes: float) -> ir.Table:
    """`request_id` becomes 0, 1, 2, ... in the order in which a user's feed views begin.

    Without a given one, a view ends at a change of surface, query or context item, at a gap, and wherever a
    time is unknown (nothing says that two such events came together). What follows a query event need not repeat it.
    """
    user = ibis.window(group_by="user_id", order_by="seq")
    if "request_id" in rows.columns:
        view = ibis.window(group_by=["user_id", "request_id"])
        opens = ibis.ifelse(rows.request_id.isnull(), rows.seq, rows.seq.min().over(view))
        rows = rows.mutate(opens=opens)
        in_turn = ibis.window(group_by="user_id", order_by="opens")
        return rows.mutate(request_id=ibis.dense_rank().over(in_turn)).drop("opens")
    gap = rows.time - rows.time.lag().over(user)
    begins = gap.isnull() | (gap > int(gap_minutes * 60 * MICROS))
    for name in ("surface", "query", "context_item_id"):
        if name in rows.columns:
            changes = ~rows[name].identical_to(rows[name].lag().over(user))
            if name == "query":
                changes = changes & ~(rows.query.isnull() & rows.item_id.lag().over(user).isnull())
            begins = begins | changes
    rows = rows.mutate(begins=begins)
    so_far = ibis.cumulative_window(group_by="user_id", order_by="seq")
    return rows.mutate(request_id=rows.begins.nullif(False).count().over(so_far) - 1).drop("begins")


def collect(events: ir.Table, split: Split) -> ir.Table:
    """One row a user: `events` (list of structs, oldest first) and how many of them each split may hold.

    `train`, `validation` and `test` are lengths of prefixes. A user has a row of validation only where that
    prefix is longer than train's, and of test where it is longer than validation's.
    """
    fields = {name: events[name] for name in ("seq", *events.columns) if name != "user_id"}
    users = events.group_by("user_id").agg(
        events=ibis.struct(fields).collect(),
        **{name: events.seq.count(where=_known_before(events.timestamp, end)) for name, end in split.ends().items()},
        num_events=events.count(),
    )
    if split.kind == "leave_one_out":
        enough = users.num_events > 2 * split.num_targets
        held_out = {"train": 2 * split.num_targets, "validation": split.num_targets, "test": 0}
        users = users.mutate(**{name: users.num_events - ibis.ifelse(enough, n, 0) for name, n in held_out.items()})
    # collect, then sort: Spark has no ordered collect. `seq` leads the struct and is unique.
    users = users.mutate(events=users.events.sort(), hash=user_hash(users.user_id))
    return users.order_by("hash", "user_id")


def _known_before(timestamp: ir.IntegerValue, end: int) -> ir.BooleanValue:
    return timestamp.isnull() | (timestamp < end)


def rows_of_split(users: ir.Table, part: str, columns: Iterable[str]) -> ir.Table:
    """The rows of one split, from `collect`'s table."""
    begin = {"train": ibis.literal(0, "int64"), "validation": users.train, "test": users.validation}[part]
    end = users[part]
    lists = {name: users.events[:end].map(lambda event, name=name: event[name]) for name in columns}
    return users.filter(end > begin).select("user_id", **lists, target_start=begin)
