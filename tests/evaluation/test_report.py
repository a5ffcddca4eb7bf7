"""A report is whole or absent, readable, and needs nothing beside itself."""

import json
import re
import sys

import numpy as np
import pytest

from pinrec_hf.evaluation.evaluate import compare, evaluate
from pinrec_hf.evaluation.popularity import DecayedPopularity
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.evaluation.report import read_log_history, write_report


@pytest.fixture
def systems(write_dataset, random_users, catalogue):
    folder = write_dataset(random_users)
    requests = load_requests(folder, "test", catalogue)
    rankers = [DecayedPopularity.fit(folder, catalogue, scope=scope) for scope in ("surface", "global")]
    options = {"ks": (3, 5), "resamples": 50, "progress": False}
    return [
        evaluate(ranker, requests, catalogue, name=name, **options)
        for ranker, name in zip(rankers, ("PinRec <b>&", "a | b"), strict=True)
    ]


@pytest.fixture
def trainer_state(tmp_path):
    path = tmp_path / "trainer_state.json"
    log = [
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 2.5},
        {"step": 20, "eval_recall@10": 0.1, "eval_loss": 2.6},
    ]
    path.write_text(json.dumps({"log_history": log}))
    return path


def test_report_is_complete(systems, trainer_state, tmp_path):
    comparison = compare(*systems, resamples=50)
    folder = write_report(
        tmp_path / "report", systems, comparisons=[comparison], trainer_state=trainer_state, title="T & T"
    )
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.md", "report.html"}
    content = json.loads((folder / "evaluation.json").read_text())
    first = content["evaluations"][0]
    assert first["metrics"]["recall@3"]["value"] == systems[0].metrics["recall@3"].value
    assert first["groups"]["surface"]["feed"]["recall@5"]["users"] > 0
    assert first["dropped_targets"] == systems[0].requests.dropped
    assert content["comparisons"][0]["metrics"]["recall@3"]["difference"] == comparison.metrics["recall@3"].difference

    text = (folder / "evaluation.md").read_text()
    value = systems[0].metrics["recall@3"]
    assert f"| {value.value:.4f} [{value.low:.4f}, {value.high:.4f}] |" in text
    assert "a \\| b" in text
    tables = re.split(r"\n\n", text)
    for part in tables:  # every table has as many cells in each line
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1

    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5  # four groups and the learning curve
    assert "PinRec &lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_an_existing_directory_is_left_alone(systems, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="choose another output directory"):
        write_report(tmp_path / "report", systems)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["mine"]


def test_nothing_is_left_of_a_report_that_fails(systems, tmp_path, monkeypatch):
    monkeypatch.setattr("pinrec_hf.evaluation.report._page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path / "out" / "report", systems)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(systems, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pinrec_hf.evaluation.plots", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[report\]"'):
        write_report(tmp_path / "report", systems)
    assert not (tmp_path / "report").exists()


def test_nan_becomes_null(write_dataset, random_users, catalogue, tmp_path):
    class Short:
        def rank(self, requests, k):
            return np.full((len(requests), k), -1)

    requests = load_requests(write_dataset(random_users), "test", catalogue)
    found = evaluate(Short(), requests, catalogue, ks=(3,), resamples=10, progress=False)
    folder = write_report(tmp_path / "report", found)
    content = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert content["evaluations"][0]["metrics"]["tail_share@3"]["value"] is None


def test_unclear_systems_and_logs_are_refused(systems, tmp_path):
    with pytest.raises(ValueError, match="name of its own"):
        write_report(tmp_path / "report", [systems[0], systems[0]])
    with pytest.raises(ValueError, match="is no trainer state"):
        read_log_history(tmp_path / "absent.json")
    (tmp_path / "empty.json").write_text('{"log_history": []}')
    with pytest.raises(ValueError, match="holds no losses"):
        read_log_history(tmp_path / "empty.json")
    assert not (tmp_path / "report").exists()
