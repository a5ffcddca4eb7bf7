"""The data contract: the columns of a log, an items and a queries table, checked before any row is read.

    log       one row an event: who, which item (null = a search query), which surface, when, what outcomes
    items     one row an item: its id; perhaps a content vector, features, life time; columns for display
    queries   one row a query text, optionally with its vector

Nothing here runs an engine: schemas are Arrow schemas, and importing this module needs nothing but pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa


class DataContractError(ValueError):
    """Input that breaks the data contract; the message names the table, row or column and the remedy."""


@dataclass(frozen=True)
class Column:
    """A column of the contract: its kind (a key of `KINDS`) and whether a table must have it."""

    kind: str
    required: bool = False


TABLES: dict[str, dict[str, Column]] = {
    "log": {
        "user_id": Column("id", required=True),
        "item_id": Column("id", required=True),
        "timestamp": Column("time", required=True),
        "surface": Column("string"),
        "outcomes": Column("names"),
        "outcome_timestamps": Column("times"),
        "order": Column("number"),
        "request_id": Column("id"),
        "position": Column("integer"),
        "query": Column("string"),
        "context_item_id": Column("id"),
        "weight": Column("number"),
        "request_features": Column("strings"),
    },
    "items": {
        "item_id": Column("id", required=True),
        "embedding": Column("vector"),
        "features": Column("strings"),
        "available_from": Column("time"),
        "available_until": Column("time"),
    },
    "queries": {"query": Column("string", required=True), "embedding": Column("vector", required=True)},
}

KINDS = {
    "id": "a string or an integer",
    "string": "a string",
    "strings": "a list of strings",
    "names": "a list of strings, or a string",
    "time": "a timestamp, a date or an integer (with time_unit)",
    "times": "a list of timestamps, dates or integers (with time_unit)",
    "integer": "an integer",
    "number": "a number",
    "vector": "a list of floats",
}

UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}

# An integer time outside these years is taken for a wrong unit; the units' plausible ranges are disjoint.
EARLIEST = int(datetime(1980, 1, 1, tzinfo=UTC).timestamp())
LATEST = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp())


def _element(kind: pa.DataType) -> pa.DataType | None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return kind.value_type if any(check(kind) for check in lists) else None


def is_string(kind: pa.DataType) -> bool:
    """Whether values of this type are text, also as a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_time_of_integers(kind: pa.DataType) -> bool:
    """Whether times of this type (or of its elements) are numbers, which need a `time_unit`."""
    kind = _element(kind) or kind
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _fits(kind: pa.DataType, wanted: str) -> bool:
    if pa.types.is_null(kind):  # a column of nulls only: legal wherever a null is
        return True
    element = _element(kind)
    if wanted == "names":
        return is_string(kind) or _fits(kind, "strings")
    if wanted in ("strings", "times", "vector"):
        if element is None:
            return False
        kinds = {"strings": "string", "times": "time", "vector": "number"}
        return _fits(element, kinds[wanted])
    if wanted == "time":
        times = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_integer, pa.types.is_floating)
        return any(check(kind) for check in times)
    return {
        "id": is_string(kind) or pa.types.is_integer(kind),
        "string": is_string(kind),
        "integer": pa.types.is_integer(kind),
        "number": pa.types.is_integer(kind) or pa.types.is_floating(kind),
    }[wanted]


def match_columns(schema: pa.Schema, table: str, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the contract's columns in a table and check their types.

    Args:
        schema: of the table as it was given.
        table: `"log"`, `"items"` or `"queries"`.
        columns: contract name -> name in the data. A name that this table lacks is looked up as it is.

    Returns:
        contract name -> name in the table, for the columns that are there, in the contract's order.

    Raises:
        DataContractError: a required column is missing (those present are listed), or one has another type.
    """
    present = set(schema.names)
    found: dict[str, str] = {}
    for name, column in TABLES[table].items():
        source = (columns or {}).get(name, name)
        source = source if source in present else name
        if source not in present:
            if column.required:
                raise DataContractError(
                    f"{table}: column {name!r} is missing; the columns present are {schema.names}. "
                    f"Map yours with columns={{{name!r}: ...}}"
                )
            continue
        kind = schema.field(source).type
        if not _fits(kind, column.kind) or (pa.types.is_null(kind) and column.required and column.kind != "time"):
            hint = ""
            if column.kind == "id" and pa.types.is_floating(kind):
                hint = "; pandas turns integers with holes into floats: use its 'Int64' type"
            raise DataContractError(
                f"{table}: column {source!r} ({name}) is {kind}, but must be {KINDS[column.kind]}{hint}. "
                f"The columns present are {[f'{field.name}: {field.type}' for field in schema]}"
            )
        found[name] = source
    return found


def check_column_map(columns: Mapping[str, str] | None, schemas: Mapping[str, pa.Schema]) -> None:
    """Refuse a `columns` map with names that the contract, or every table given, lacks."""
    known = {name for table in TABLES.values() for name in table}
    for name, source in (columns or {}).items():
        if name not in known:
            raise DataContractError(f"columns: {name!r} is no column of the contract, which has {sorted(known)}")
        if not any(source in schema.names for table, schema in schemas.items() if name in TABLES[table]):
            present = {table: schema.names for table, schema in schemas.items()}
            raise DataContractError(f"columns: no table has {source!r} (for {name!r}); present are {present}")


def id_type(kind: pa.DataType) -> str:
    """`"string"` or `"integer"`, as metadata.json writes it."""
    return "integer" if pa.types.is_integer(kind) else "string"


def check_same_id_type(log: pa.DataType, other: pa.DataType, name: str) -> None:
    """Refuse string ids on one side and integer ids on the other: they would never meet."""
    if pa.types.is_null(log) or pa.types.is_null(other) or id_type(log) == id_type(other):
        return
    raise DataContractError(
        f"the log's item_id is {log} but {name} is {other}: their ids would never be equal; cast one of them"
    )


def check_integer_times(name: str, smallest: float | None, largest: float | None, unit: str | None) -> None:
    """Refuse integer times without a unit, or outside 1980-2100 in it, naming the unit that would fit.

    Args:
        name: table and column, for the message.
        smallest, largest: of the column's values that are not negative; None if there are none.
        unit: `"s"`, `"ms"`, `"us"` or None.
    """
    if unit is not None and unit not in UNITS_PER_SECOND:
        raise DataContractError(f"time_unit must be one of {list(UNITS_PER_SECOND)}, not {unit!r}")
    if smallest is None or largest is None:
        return
    fitting = [u for u, per in UNITS_PER_SECOND.items() if EARLIEST * per <= smallest and largest < LATEST * per]
    if unit is None:
        hint = f"; {largest:.0f} looks like {fitting[0]!r}" if fitting else ""
        raise DataContractError(f"{name} holds integers: say their unit with time_unit='s'|'ms'|'us'{hint}")
    if unit in fitting:
        return
    per = UNITS_PER_SECOND[unit]
    worst = smallest if smallest < EARLIEST * per else largest
    remedy = f"time_unit={fitting[0]!r} would be plausible" if fitting else "no unit makes all of them plausible"
    unknown = "; an unknown time must be null, not 0" if smallest == 0 else ""
    raise DataContractError(
        f"{name}: {worst:.0f} is not between the years 1980 and 2100 in time_unit={unit!r}; {remedy}{unknown}"
    )


def check_typed_times(name: str, smallest: int | None, largest: int | None) -> None:
    """Refuse timestamps outside 1980-2100, as integers read in a wrong unit have them (1970, or 55,000).

    Args:
        name: table and column, for the message.
        smallest, largest: microseconds since epoch; None if there are none.
    """
    if smallest is None or largest is None:
        return
    for time in (smallest, largest):
        if not EARLIEST <= time // 10**6 < LATEST:
            raise DataContractError(
                f"{name} holds {time / 10**6:.0f} s since epoch, which is not between the years 1980 and 2100: were "
                "integers of another unit made timestamps? An unknown time must be null"
            )


def parse_time(value: int | float | str | datetime, name: str) -> int:
    """Seconds since epoch (UTC) of seconds, a datetime or an ISO 8601 string (`2022-05-03T00:00+08:00`).

    A string or datetime without an offset is UTC.
    """
    try:
        if isinstance(value, str) and value.isdigit() and len(value) > 8:
            value = int(value)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        seconds = int(value // 1)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataContractError(f"{name}={value!r} is neither seconds since epoch nor an ISO 8601 time") from error
    if not EARLIEST <= seconds < LATEST:
        raise DataContractError(f"{name}={value!r} is not between the years 1980 and 2100 in seconds since epoch")
    return seconds
