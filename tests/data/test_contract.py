from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pinrec_hf.data.contract import (
    DataContractError,
    check_column_map,
    check_integer_times,
    check_same_id_type,
    match_columns,
    parse_time,
)

LOG = {"user_id": pa.string(), "item_id": pa.int64(), "timestamp": pa.timestamp("us")}


def test_columns_are_found_under_the_names_given():
    schema = pa.schema([("who", pa.string()), ("item_id", pa.int32()), ("ts", pa.int64()), ("extra", pa.binary())])
    found = match_columns(schema, "log", {"user_id": "who", "timestamp": "ts", "embedding": "vector"})
    assert found == {"user_id": "who", "item_id": "item_id", "timestamp": "ts"}


def test_a_missing_column_lists_those_present():
    with pytest.raises(DataContractError, match=r"log: column 'user_id' is missing.*\['item', 'timestamp'\]"):
        match_columns(pa.schema([("item", pa.string()), ("timestamp", pa.int64())]), "log")


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("user_id", pa.float64(), "user_id.*double.*a string or an integer; pandas"),
        ("user_id", pa.null(), "user_id.*null"),
        ("timestamp", pa.string(), "timestamp.*string.*a timestamp, a date or an integer"),
        ("outcomes", pa.int8(), "outcomes.*must be a list of strings, or a string"),
        ("request_features", pa.string(), "request_features.*must be a list of strings"),
        ("outcomes", pa.list_(pa.int64()), "outcomes.*must be a list of strings"),
        ("surface", pa.int8(), "surface.*must be a string"),
        ("position", pa.float32(), "position.*must be an integer"),
        ("order", pa.string(), "order.*must be a number"),
        ("outcome_timestamps", pa.timestamp("s"), "outcome_timestamps.*a list of timestamps"),
    ],
)
def test_a_mistyped_column_says_what_it_must_be(column, kind, message):
    with pytest.raises(DataContractError, match=message):
        match_columns(pa.schema(LOG | {column: kind}), "log")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.uint8(),
        pa.int64(),
    ],
)
def test_ids_may_be_any_strings_or_integers(kind):
    assert "user_id" in match_columns(pa.schema(LOG | {"user_id": kind}), "log")


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_outcomes_may_be_any_list_of_strings(kind):
    assert "outcomes" in match_columns(pa.schema(LOG | {"outcomes": kind}), "log")


def test_a_column_map_with_unknown_names_is_refused():
    schemas = {"log": pa.schema(LOG)}
    with pytest.raises(DataContractError, match="'users' is no column of the contract"):
        check_column_map({"users": "user_id"}, schemas)
    with pytest.raises(DataContractError, match="no table has 'uid'"):
        check_column_map({"user_id": "uid"}, schemas)


def test_string_ids_against_integer_ids():
    check_same_id_type(pa.int8(), pa.int64(), "items")
    with pytest.raises(DataContractError, match=r"item_id is string but items is int64.*cast"):
        check_same_id_type(pa.string(), pa.int64(), "items")


@pytest.mark.parametrize(
    ("times", "unit", "message"),
    [
        ((1_650_812_741_436, 1_650_812_999_999), "s", "'ms' would be plausible"),
        ((1_650_812_741, 1_650_812_742), "ms", "'s' would be plausible"),
        ((1_650_812_741_436, 1_650_812_741_437), None, "time_unit=.*looks like 'ms'"),
        ((0, 1_650_812_741), "s", "no unit.*must be null, not 0"),
        ((5, 7), "s", "5 is not between the years 1980 and 2100"),
        ((1, 2), "hours", "time_unit must be one of"),
    ],
)
def test_implausible_integer_times(times, unit, message):
    with pytest.raises(DataContractError, match=message):
        check_integer_times("log: column 'timestamp'", *times, unit)


@pytest.mark.parametrize(
    "value",
    [
        1651507200,
        1651507200.7,
        "1651507200",
        "2022-05-02T16:00",
        "2022-05-03T00:00+08:00",
        datetime(2022, 5, 2, 16, tzinfo=UTC),
    ],
)
def test_times_as_seconds_or_iso(value):
    assert parse_time(value, "test_start") == 1651507200


@pytest.mark.parametrize("value", ["yesterday", "1651507200000", 3, float("nan"), float("inf"), None])
def test_other_times_are_refused(value):
    with pytest.raises(DataContractError, match="test_start="):
        parse_time(value, "test_start")
