"""Days of a small log: who is trained on what, from whom, and that a run goes on where it was killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_world import DAY, FIRST_TIME, tiny_items, tiny_log

from pinrec_hf.cli import main
from pinrec_hf.evaluation import prequential as module
from pinrec_hf.evaluation.prequential import Plan, prequential
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.training import pretrain

START = FIRST_TIME + 5 * DAY
COMMON = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no", "eval_strategy": "no",
          "load_best_model_at_end": False}  # fmt: skip


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A plan's fields, as YAML has them. Two items are new on the second day that is tested."""
    folder = tmp_path_factory.mktemp("logs")
    rows = tiny_log()
    new = [{**rows[0], "item_id": "p1", "user_id": f"u{n}", "timestamp": START + DAY + n} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows + new), folder / "log.parquet")
    pq.write_table(tiny_items(), folder / "items.parquet")
    tables = {name: str(folder / f"{name}.parquet") for name in ("log", "items")}
    return {
        "prepare": {**tables, "time_unit": "s", "negative_outcomes": ["hide"]},
        "start": START,
        "days": 1,
        "validation_hours": 24,
        "cold": {"cold": {**COMMON, "preset": "tiny", "config_overrides": {"dropout": 0.0}}},
        "warm": {"warm": {**COMMON, "recent_days": 1, "replay": 0.5, "learning_rate": 1e-3}},
    }


@pytest.fixture
def trainings(monkeypatch):
    """Trains in this process, which is faster; the commands so far, as dicts."""
    commands = []

    def launch(words):
        commands.append({name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)})
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        with contextlib.redirect_stdout(sys.stderr):
            pretrain.main()
        return 0

    monkeypatch.setattr(module, "_launch", launch)
    return commands


def day(number: int) -> str:
    return f"{datetime.fromtimestamp(START + number * DAY, UTC):%Y-%m-%d}"


def test_each_day_trains_on_all_before_it_and_tests_on_it(fields, trainings, tmp_path, capsys):
    root = tmp_path / "days"
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({**fields, "start": day(0)}))  # an unquoted date
    assert main(["prequential", "--plan", str(plan), "--output-dir", str(root)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        [day(0), "cold"],
        [day(0), "warm"],
    ]
    plan.write_text(yaml.safe_dump({**fields, "start": day(0), "days": 2}))  # goes on
    assert main(["prequential", "--plan", str(plan), "--output-dir", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((root / "prequential.json").read_text())
    assert (root / "prequential.png").stat().st_size > 10_000

    made = [os.path.relpath(command["output_dir"], root) for command in trainings]
    assert made == [f"{day(0)}/cold", f"{day(-1)}/cold", f"{day(0)}/warm", f"{day(1)}/cold", f"{day(1)}/warm"]
    assert [c["model"] for c in trainings if "model" in c] == [
        str(root / day(-1) / "cold"),
        str(root / day(0) / "warm"),
    ]
    for command in trainings:  # on what comes before the day that tests it
        split = json.loads((root / command["data"] / "metadata.json").read_text())["split"]
        assert split["test_end"] - split["validation_end"] == DAY == split["validation_end"] - split["train_end"]
        assert command["data"] == os.path.join(os.path.dirname(command["output_dir"]), "data")
    for number, row in enumerate(rows):
        assert (row["day"], row["test_start"]) == (day(number), START + number * DAY)
        assert row["targets"] >= row["users"] > 20
        assert row["models"].keys() == {"cold", "warm"}
        assert row["minus_first"].keys() == {"warm"}
        for model in row["models"].values():
            assert model["steps"] == 2
            assert model["cpu_seconds"] > model["train_cpu_seconds"] > 0
            assert not model["resumed"]
            value, low, high = model["recall@50"]
            assert low <= value <= high
        cold, warm = (row["models"][name]["recall@10"][0] for name in ("cold", "warm"))
        assert row["minus_first"]["warm"]["recall@10"][0] == pytest.approx(warm - cold)


def test_catalogues_that_grew_in_another_order_are_compared_by_item(fields, trainings, tmp_path):
    """The items table of each day has other rows: what is new stands last in a warm catalogue, first in a cold one."""
    plan = Plan(**fields)
    prequential(plan, tmp_path / "days")
    items = tiny_items()
    reverse = items.take(list(range(len(items) - 1, -1, -1)))
    pq.write_table(reverse, tmp_path / "items.parquet")
    turned = {**fields["prepare"], "items": str(tmp_path / "items.parquet")}
    folder = tmp_path / "days" / day(1)
    module._prepare(Plan(**{**fields, "prepare": turned}), folder, START + DAY)
    (row,) = prequential(Plan(**{**fields, "days": 2}), tmp_path / "days")[1:]
    cold, warm = (load_pretrained(folder / name)[1].catalogue for name in ("cold", "warm"))
    assert cold.ids(range(60)) == warm.ids(range(60))[::-1]
    assert row["minus_first"]["warm"]["recall@50"][0] == pytest.approx(
        row["models"]["warm"]["recall@50"][0] - row["models"]["cold"]["recall@50"][0]
    )


def test_what_is_done_is_not_done_again_after_a_kill(fields, trainings, tmp_path):
    root, plan = tmp_path / "days", tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "pinrec_hf", "prequential", "--plan", str(plan), "--output-dir", str(root)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while not (root / day(0) / "cold.training").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -9
    assert not (root / "prequential.json").exists()
    assert len(prequential(Plan(**fields), root)) == 1
    assert [command["resume"] for command in trainings] == ["True", "False", "False"]
    assert len(prequential(Plan(**fields), root)) == 1
    assert len(trainings) == 3
    with pytest.raises(FileExistsError, match="a run with another warm"):
        prequential(Plan(**{**fields, "warm": {}}), root)


def test_a_folder_of_something_else_is_refused(fields, trainings, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        prequential(Plan(**fields), tmp_path)
    assert trainings == []


def test_a_training_that_fails_is_told(fields, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_launch", lambda words: 1)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(fields))
    assert main(["prequential", "--plan", str(plan), "--output-dir", str(tmp_path / "days")]) == 2
    assert "the same command again goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": 0}, "days >= 1"),
        ({"cold": {}}, "a cold model"),
        ({"warm": {"cold": {}}}, "of one name"),
        ({"warm": {"data": {}}}, "a folder's name"),
        ({"warm": {"../up": {}}}, "a folder's name"),
        ({"warm": {"warm": {"model": "x"}}}, "model: set for each day"),
        ({"prepare": {"log": "x", "test_start": 0}}, "test_start: set for each day"),
        ({"prepare": {"logs": "x"}}, "no argument 'logs'"),
        ({"colder": {}}, "is no plan"),
        ({"start": None}, "neither seconds since epoch"),
    ],
)
def test_a_plan_that_says_too_little_or_too_much(fields, trainings, tmp_path, changes, message):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({**fields, **changes}))
    with pytest.raises(ValueError, match=message):
        prequential(Plan.read(plan), tmp_path / "days")
    assert trainings == []
