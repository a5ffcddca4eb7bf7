"""A small prepared log of three surfaces, with a tokenizer and a tiny model of it; a Hub on loopback."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what tests encode stays out of the user's cache; set before anything of Hugging Face is imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="pinrec-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny_world import DAY, FIRST_TIME, NUM_DAYS, tiny_items, tiny_log, tiny_queries

from pinrec_hf.data.dataset_folder import build_tokenizer, default_budgets, read_metadata
from pinrec_hf.data.prepare import prepare
from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.item_table import write_item_table

torch.set_num_threads(1)


def prepare_tiny(rows: list[dict[str, Any]], folder: Path, **options: Any) -> Path:
    """`prepare` of a log such as `tiny_log` makes, with its items and queries."""
    tables = {"items": tiny_items(), "queries": tiny_queries()}
    log = pa.Table.from_pylist(rows)
    prepare(log, **tables, time_unit="s", negative_outcomes=["hide"], output_dir=folder, name="tiny", **options)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder that `prepare` wrote: 80 users, 60 items, train of six days, a day each of validation and test."""
    return prepare_tiny(tiny_log(), tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def poisoned_data(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of one log; in the second all rows of the test day are poisoned.

    Other items, outcomes, surfaces and times, more of everything, and users who came only then.
    """
    start = FIRST_TIME + (NUM_DAYS - 1) * DAY
    rows = tiny_log()
    late = [row for row in rows if row["timestamp"] is not None and row["timestamp"] >= start]
    poison = {"item_id": "p3", "outcomes": ["poison", "save"], "surface": "poison", "query": "poison"}
    changed = [{**row, **poison, "timestamp": start + i % DAY} for i, row in enumerate(late)]
    changed += [{**row, "user_id": f"{row['user_id']}-late", "item_id": "p4"} for row in changed]
    base, cut = tmp_path_factory.mktemp("canary"), {"test_start": start, "test_end": start + DAY}
    poisoned = [row for row in rows if row not in late] + changed
    return prepare_tiny(rows, base / "clean", **cut), prepare_tiny(poisoned, base / "poisoned", **cut)


@pytest.fixture(scope="session")
def tokenizer(tiny_data) -> PinRecTokenizer:
    return build_tokenizer(tiny_data, model_max_length=64)


def tiny_config(tokenizer: PinRecTokenizer, **fields) -> PinRecConfig:
    """The `tiny` preset with every input on: ids, content, features, query vectors, all signals."""
    return PinRecConfig.from_preset(
        "tiny",
        **{
            "surfaces": tokenizer.surfaces,
            "outcomes": tokenizer.outcomes,
            "negative_outcomes": tokenizer.negative_outcomes,
            "num_items": len(tokenizer.catalogue),
            "content_size": tokenizer.catalogue.content_size,
            "query_size": tokenizer.query_size,
            "feature_buckets": 64,
            "hash_table_size": 128,
            "catalogue_fingerprint": tokenizer.catalogue.fingerprint,
            **fields,
        },
    )


@pytest.fixture(scope="session")
def make_config(tokenizer):
    """`make_config(**fields)`: the tiny config of `tokenizer`, with some fields changed."""
    return lambda **fields: tiny_config(tokenizer, **fields)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """`make_model(**fields)`: a seeded tiny model in eval mode, all weights large enough for outputs to differ."""

    def make(**fields) -> PinRecModel:
        torch.manual_seed(0)
        model = PinRecModel(tiny_config(tokenizer, **{"initializer_range": 0.2, **fields})).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and phases begin at zero, which would hide errors
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model, tiny_data) -> PinRecModel:
    """A tiny model in eval mode, untrained, shared by all tests: never train or change it."""
    return make_model(outcome_budgets=default_budgets(read_metadata(tiny_data)))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, model, tokenizer, tiny_data) -> Path:
    """A model's folder as pretraining leaves it, indexed: read it, or copy it to change it."""
    folder = tmp_path_factory.mktemp("saved") / "pinrec-tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_item_table(tiny_data / "items.parquet", folder / "items.parquet", tokenizer.catalogue)
    build_index(folder)
    return folder


@pytest.fixture(scope="session")
def requests_example() -> list[dict[str, Any]]:
    """Requests of the one schema: a feed, a search, related items, an empty history, only unknown items."""
    now = FIRST_TIME + (NUM_DAYS - 1) * DAY
    history = {
        "item_id": ["p0", "p5", "with space", "p7"],
        "surface": ["homefeed", "homefeed", "search", None],
        "timestamp": [now - 3 * DAY, now - 2 * DAY, now - 600, None],
        "outcomes": [["save"], [], ["click", "save"], ["hide"]],
    }
    history["timestamp"].sort(key=lambda t: t or 0)
    return [
        {"user_id": "u0", "history": history, "surface": "homefeed", "timestamp": now},
        {"user_id": "u1", "history": history, "surface": "search", "timestamp": now, "query": "blue sofa"},
        {"user_id": "u2", "history": history, "surface": "related", "timestamp": None, "context_item_id": "p3"},
        {"user_id": "u3", "history": {}, "surface": "homefeed", "timestamp": now},
        {
            "user_id": "u4",
            "history": {"item_id": ["never seen"], "outcomes": [["save"]], "timestamp": [now - 60]},
            "surface": None,
            "timestamp": now,
        },
    ]


class Loopback:
    """A Hub on loopback (`tests/hub/loopback.py`), and clients in processes of their own, online to it alone."""

    def __init__(self, port: int, homes: Path) -> None:
        self.url, self.homes = f"http://127.0.0.1:{port}", homes

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def files(self, repo: str, revision: str = "main") -> dict[str, int]:
        """Path and size of all that a repo holds, but for what its creation put there."""
        kind, name = repo.split("/", 1) if repo.count("/") == 2 else ("models", repo)
        entries = self.get(f"/api/{kind}/{name}/tree/{revision}")
        return {entry["path"]: entry["size"] for entry in entries if entry["path"] != ".gitattributes"}

    def accident(self, **what: list) -> None:
        """See `Hub` in loopback.py; also forgets the requests that were made so far."""
        urllib.request.urlopen(f"{self.url}/test/accident", json.dumps(what).encode()).close()

    def environment(self, home: str, offline: bool = False) -> dict[str, str]:
        """What a client's process runs with."""
        return {
            **os.environ,
            "HF_HOME": str(self.homes / home),
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopback",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self, script: str, *args: object, home: str, offline: bool = False):
        """Run a script; returns what it prints last, as JSON. `home` names its cache, empty at first."""
        words = [sys.executable, "-c", script, *map(str, args)]
        environment = self.environment(home, offline)
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def loopback(tmp_path_factory):
    command = [sys.executable, str(Path(__file__).parent / "hub" / "loopback.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield Loopback(int(server.stdout.readline()), tmp_path_factory.mktemp("homes"))
        finally:
            server.terminate()
