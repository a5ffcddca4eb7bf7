"""A `prepare` that is killed leaves no dataset; the next one writes the bytes of one that was not, and tidies."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.output import new_directory
from pinrec_hf.data.prepare import prepare

SCRIPT = "import sys; from pinrec_hf.data.prepare import prepare; prepare(sys.argv[1], output_dir=sys.argv[2])"


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    path, n = tmp_path_factory.mktemp("log") / "log.parquet", 400_000
    rng = np.random.default_rng(0)
    times = pa.array(1_700_006_400_000_000 + rng.integers(0, 8 * 86_400 * 10**6, n), pa.timestamp("us"))
    users, items = np.arange(n) % 1_000, rng.integers(0, 500, n)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    return path


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory) -> dict[str, bytes]:
    """What nobody killed."""
    prepare(log, output_dir=(data := tmp_path_factory.mktemp("whole") / "data"))
    return contents(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", [".work/log*", "train/part-*"])
def test_killed_and_started_again(log, whole, tmp_path, stage):
    out = tmp_path / "data"
    command = [sys.executable, "-c", SCRIPT, str(log), str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(f"data.partial-*/{stage}")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [f"data.partial-{process.pid}"]
    prepare(log, output_dir=out)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_living_run_writes_is_left_alone(tmp_path):
    left = tmp_path / "data.partial-0"
    left.mkdir()
    writing = (
        "import sys, time; from pinrec_hf.data.output import new_directory\n"
        "with new_directory(sys.argv[1]): print('ready', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", writing, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        alive = tmp_path / f"data.partial-{process.pid}"
        assert not left.exists()
        with new_directory(tmp_path / "data"):
            assert alive.is_dir()
        process.kill()
