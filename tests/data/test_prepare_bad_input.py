import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data import prepare as prepare_module
from pinrec_hf.data.contract import DataContractError
from pinrec_hf.data.output import new_directory, replaced
from pinrec_hf.data.prepare import prepare

T0, DAY = 1_700_006_400, 86_400


def good_log(**changes):
    columns = {
        "user_id": ["a"] * 3,
        "item_id": ["x", "y", "z"],
        "timestamp": [T0, T0 + DAY, T0 + 2 * DAY],
        "outcomes": [["save"], ["click"], ["save"]],
    }
    return pa.table(columns | changes)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "output" / "data"


@pytest.fixture(autouse=True)
def nothing_stays(out):
    out.parent.mkdir()
    yield
    assert [path.name for path in out.parent.iterdir()] in ([], ["data"])


def refuse(out, message, log=None, error=DataContractError, **options):
    with pytest.raises(error, match=message):
        prepare(good_log() if log is None else log, output_dir=out, **{"time_unit": "s"} | options)
    assert not out.exists()


def test_files_that_cannot_be_read(out, tmp_path):
    file = tmp_path / "log.parquet"
    refuse(out, "no file matches '.*log.parquet'", log=file)
    refuse(out, "no file matches", log=str(tmp_path / "*.parquet"))
    refuse(out, "no path was given", log=[])
    file.write_bytes(b"")
    refuse(out, "log.parquet is empty", log=file)
    file.write_text("user_id,item_id\n1,2\n")
    refuse(out, "log.parquet is no parquet file, or was cut off", log=file)
    pq.write_table(good_log(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse(out, "was cut off", log=file)
    pq.write_table(good_log().slice(0, 0), file)
    refuse(out, "log: the input has no rows", log=file)


def test_damaged_pages(out, tmp_path):
    file = tmp_path / "log.parquet"
    pq.write_table(good_log(), file)
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    refuse(out, "the input cannot be read", log=file)


def test_files_of_different_types(out, tmp_path):
    pq.write_table(good_log(), tmp_path / "1.parquet")
    pq.write_table(good_log(user_id=[1, 2, 3]), tmp_path / "2.parquet")
    refuse(out, "'user_id' is missing or has another type in .*2.parquet", log=str(tmp_path / "*.parquet"))
    pq.write_table(good_log().drop_columns("outcomes"), tmp_path / "2.parquet")
    refuse(out, "'outcomes' is missing", log=str(tmp_path / "*.parquet"))


def test_columns(out):
    refuse(
        out,
        r"'timestamp' is missing; the columns present are \['user_id'",
        good_log().drop_columns("timestamp"),
    )
    refuse(out, "outcomes.*must be a list of strings", good_log(outcomes=[1] * 3))
    refuse(out, "no table has 'uid'", columns={"user_id": "uid"})
    refuse(out, "needs the column outcomes", good_log(outcome_timestamps=[[T0]] * 3).drop_columns("outcomes"))
    refuse(out, "an entry for each.*'row': 1", good_log(outcome_timestamps=[[T0], [], [T0]]))


def test_times(out):
    refuse(out, "looks like 's'", time_unit=None)
    refuse(out, "time_unit='s' would be plausible", time_unit="ms")
    refuse(
        out,
        "no unit makes all of them plausible; an unknown time must be null",
        good_log(timestamp=[0, T0, T0]),
    )
    refuse(out, "outcome_timestamps.*'ms' would be plausible", good_log(outcome_timestamps=[[T0 * 1000]] * 3))
    for wrong in (T0 // 1000, 4_200_000_000):  # seconds taken for milliseconds; 2103
        typed = pa.array([wrong] * 3).cast(pa.timestamp("s"))
        refuse(out, "were integers of another unit made timestamps", good_log(timestamp=typed))
    items = pa.table({"item_id": ["x"], "available_from": [T0 * 1000]})
    refuse(out, "items: column 'available_from'.*'ms' would be plausible", items=items)
    refuse(out, "time_unit must be one of", time_unit="hours")


def test_ids(out):
    refuse(out, "item_id is string but the items table's item_id is int64", items=pa.table({"item_id": [1]}))
    refuse(out, "item_id is string but its context_item_id is int64", good_log(context_item_id=[1, 2, 3]))
    big = pa.array([2**63] * 3, pa.uint64())
    refuse(out, "the input cannot be read", good_log(user_id=big))


def test_outcomes(out):
    refuse(
        out,
        r"negative outcome 'hide' is not in the log, whose outcomes are \['click', 'save'\]",
        negative_outcomes=["hide"],
    )


def test_more_outcomes_than_a_model_holds(out):
    names = [f"o{n}" for n in range(63)]
    refuse(out, "train has 63 outcomes, of which a model holds 62; join", good_log(outcomes=[names, ["o0"], ["o0"]]))


def test_a_gap_that_is_none(out):
    for gap in (0, -1, float("nan"), float("inf"), 1e300):
        refuse(out, "view_gap_minutes must be above 0 and at most", error=ValueError, view_gap_minutes=gap)


def test_nothing_left(out):
    refuse(out, "log: no row is left; log: 3 dropped: null user_id", good_log(user_id=pa.nulls(3, pa.string())))
    refuse(out, "items: no row is left", items=pa.table({"item_id": pa.nulls(2, pa.string())}))
    refuse(
        out,
        "'embedding' holds no vector",
        items=pa.table({"item_id": ["x"], "embedding": pa.nulls(1, pa.list_(pa.float32()))}),
    )


def test_windows(out):
    refuse(
        out,
        r"train is empty: no event lies in \[the beginning, 2023-11-15T00:00:00Z\)",
        validation_start="2023-11-15",
    )
    refuse(out, "validation is empty", validation_start=T0 + DAY + 5)
    refuse(out, "test is empty", test_start=T0 + 3 * DAY, validation_start=T0 + DAY)
    refuse(out, "does not hold", validation_start=T0 + 2 * DAY, test_start=T0 + DAY)
    refuse(out, "test_start='tomorrow' is neither", test_start="tomorrow")
    refuse(out, "leave_one_out takes no times", test_start=T0, leave_one_out=True)
    refuse(out, "no event has a known timestamp", good_log(timestamp=pa.nulls(3, pa.int64())))
    refuse(out, "users with at least 3 events", good_log().slice(0, 2), leave_one_out=True)
    refuse(out, "users with at least 201 events", leave_one_out=True, num_targets=100)
    refuse(out, "num_targets is 0: it must be at least 1", leave_one_out=True, num_targets=0)
    refuse(out, "num_targets is 2.*with leave_one_out only", num_targets=2)
    refuse(out, "view_gap_minutes must be above 0", view_gap_minutes=0, error=ValueError)


def test_an_output_directory_that_exists(out):
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="choose another output directory, or remove it first"):
        prepare(good_log(), output_dir=out, time_unit="s")
    assert (out / "mine").read_text() == "keep"


def test_two_runs_into_one_directory(out):
    def race():
        with new_directory(out) as partial:
            (partial / "mine").write_text("second")
            out.mkdir()
            (out / "theirs").write_text("first")

    with pytest.raises(FileExistsError, match="another run wrote it meanwhile"):
        race()
    assert (out / "theirs").read_text() == "first"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (duckdb.IOException('IO Error: Could not write file "x": No space left on device'), OSError),
        (duckdb.OutOfMemoryException("failed to offload; max_temp_directory_size"), OSError),
    ],
)
def test_what_stops_a_run_midway_leaves_nothing(out, monkeypatch, error, shown):
    def stop(*arguments):
        assert list(out.parent.glob("data.partial-*/train/*")), "the first files were written"
        raise error

    monkeypatch.setattr(prepare_module, "_vocabulary", stop)
    with pytest.raises(shown) as caught:
        prepare(good_log(), output_dir=out, time_unit="s")
    if shown is OSError:
        assert caught.value.errno == errno.ENOSPC


def test_ctrl_c_in_the_middle_of_a_query(out):
    script = f"""
import pyarrow as pa, numpy as np
from pinrec_hf.data.prepare import prepare
n = 1_500_000
log = pa.table({{"user_id": np.arange(n) % 1000, "item_id": np.arange(n), "timestamp": np.arange(n) + {T0}}})
print("ready", flush=True)
prepare(log, output_dir={str(out)!r}, time_unit="s")
"""
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in a shell's background
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeded)
    assert process.stdout.readline() == "ready\n"
    for _ in range(3_000):
        if list(out.parent.glob("data.partial-*/.work/log*")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    assert os.listdir(out.parent) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old")

    def broken():
        with replaced(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        broken()
    assert (path.read_text(), os.listdir(path.parent)) == ("old", ["file"])
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), os.listdir(path.parent)) == ("new", ["file"])
    with pytest.raises(FileNotFoundError, match="nowhere"), replaced(tmp_path / "nowhere" / "file"):
        pass
