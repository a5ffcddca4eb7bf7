"""The script as a user runs it: an adapter or a whole model, killed and resumed, on two processes, and its refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pinrec_hf.data.prepare import prepare
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.training import finetune
from pinrec_hf.training.trainer import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "finetune.py"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def arguments(tiny_data: Path, model: Path, output: Path, /, **changes: object) -> list[str]:
    values = {
        "data": tiny_data, "model": model, "output_dir": output, "surface": "search", "lora": True, "use_cpu": True,
        "disable_tqdm": True, "max_steps": 12, "per_device_train_batch_size": 4, "eval_strategy": "steps",
        "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, **changes,
    }  # fmt: skip
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def run(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def run_here(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """As `run`, without another import of torch."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *args])
    finetune.main()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def adapter(tiny_data: Path, saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "pinrec-search"
    result = run(*arguments(tiny_data, saved_model, output))
    assert result.returncode == 0, result.stderr[-3000:]
    return output


def test_an_adapter_and_what_says_whose_it_is(adapter: Path, saved_model: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    kept = {"adapter_config.json", "adapter_model.safetensors", "surface_config.json"}
    assert names == {*kept, "trainer_state.json", "training.json", "data.json"}
    assert [path.name for path in adapter.parent.iterdir()] == ["pinrec-search"]
    about = json.loads((adapter / "surface_config.json").read_text())
    assert about["surface"] == "search"
    assert about["base_model"] == str(saved_model)
    assert sum(about["outcome_budget"].values()) == pytest.approx(1)
    trained = weights(adapter)
    assert all(".layers." in name or ".outcome_head." in name for name in trained)
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    log = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    assert any("eval_recall@10" in entry for entry in log)
    assert max(entry.get("learning_rate", 0) for entry in log) == pytest.approx(5e-4, rel=0.3)


def test_killed_and_resumed_run_ends_in_the_same_bits(
    tiny_data: Path, saved_model: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pinrec-search"
    args = arguments(tiny_data, saved_model, output)
    checkpoints = output.with_name("pinrec-search.training")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *args], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while newest_checkpoint(checkpoints) is None and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    resumed = run(*args, "--resume", "True")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    first, second = weights(adapter), weights(output)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(adapter) == losses(output)


def test_two_processes_make_the_losses_of_one(tiny_data: Path, model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    quiet = tmp_path / "quiet"
    model.save_pretrained(quiet)
    tokenizer.save_pretrained(quiet)
    config = json.loads((quiet / "config.json").read_text())
    config |= {"item_id_dropout": 0.0, "outcome_dropout": 0.0, "dropout": 0.0}
    (quiet / "config.json").write_text(json.dumps(config))
    changes = {
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": 6,
    }  # fmt: skip
    run_here(monkeypatch, *arguments(tiny_data, quiet, tmp_path / "one", **changes, per_device_train_batch_size=8))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    two = run(*arguments(tiny_data, quiet, tmp_path / "two", **changes), launcher=launcher)
    assert two.returncode == 0, two.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert losses(tmp_path / "one")[-1] != losses(tmp_path / "one")[0]


def test_full_finetuning_leaves_a_model_that_shares_the_bases_index(
    tiny_data: Path, saved_model: Path, tmp_path: Path, monkeypatch
) -> None:
    output = tmp_path / "pinrec-search"
    budget = '{"save": 0.9, "click": 0.1}'
    run_here(monkeypatch, *arguments(tiny_data, saved_model, output, lora=None, outcome_budget=budget, max_steps=6))
    before, after = weights(saved_model), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("layers.") for name in changed)
    assert any(name.startswith("outcome_head.") for name in changed)
    assert not any(name.startswith("item_encoder.") for name in changed)
    model, _ = load_pretrained(output)
    assert model.config.outcome_budgets["search"] == {"save": 0.9, "click": 0.1}
    assert model.config.item_id_dropout > 0
    assert model.config.embedding_norm > 0
    for path in saved_model.glob("index*"):
        shutil.copyfile(path, output / path.name)
    PinRecRetriever.from_pretrained(output)


def test_all_surfaces_unfrozen_without_impressions_from_yaml(
    tiny_data: Path, saved_model: Path, tmp_path: Path, monkeypatch
) -> None:
    output = tmp_path / "pinrec-all"
    texts = arguments(
        tiny_data, saved_model, output, surface=None, lora=None, max_steps=2, unfreeze_item_encoder=True,
        impression_negatives=False, eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    values = {name[2:]: value for name, value in zip(texts[::2], texts[1::2], strict=True)}
    lines = [f"{name}: {v if v in ('True', 'False') or v.isdigit() else json.dumps(v)}" for name, v in values.items()]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    run_here(monkeypatch, str(tmp_path / "run.yaml"))
    before, after = weights(saved_model), weights(output)
    assert not torch.equal(before["item_encoder.up_proj.weight"], after["item_encoder.up_proj.weight"])


@pytest.fixture(scope="module")
def bare_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything shown was clicked, but nothing on `search` was."""
    rows = [
        {"user_id": f"u{user}", "item_id": f"p{(user + day) % 9}", "surface": "homefeed", "outcomes": ["click"],
         "timestamp": 1_700_006_400 + day * 86_400 + user}
        for user in range(12) for day in range(8)
    ]  # fmt: skip
    rows += [{**row, "surface": "search", "outcomes": ["hide"]} for row in rows[:20]]
    folder = tmp_path_factory.mktemp("bare") / "data"
    prepare(pa.Table.from_pylist(rows), time_unit="s", negative_outcomes=["hide"], output_dir=folder)
    return folder


def test_no_ignored_row_is_legal_and_said(bare_data: Path, saved_model: Path, tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(finetune.logger, "warning", said.append)
    changes = {"surface": "homefeed", "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    run_here(monkeypatch, *arguments(bare_data, saved_model, tmp_path / "out", **changes, load_best_model_at_end=False))
    assert "no ignored impression beside a target on surface 'homefeed'" in said[0]


def with_metadata(data: Path, folder: Path, **changes: object) -> Path:
    """The same rows, told of otherwise."""
    shutil.copytree(data, folder, dirs_exist_ok=True)
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, **changes}))
    return folder


def test_a_log_that_knows_more_outcomes_than_the_base(
    tiny_data: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default budget names none of them; validation reads them as unknown ones."""
    outcomes = {"search": {"save": 3, "share": 3}}
    data = with_metadata(
        tiny_data, tmp_path / "data", outcomes=["save", "click", "hide", "share"], outcome_counts=outcomes
    )
    rows = pq.read_table(data / "validation")
    lists = [[["share"], *names[1:]] for names in rows["outcomes"].to_pylist()]
    where = [["shop", *names[1:]] for names in rows["surface"].to_pylist()]
    for name, values in (("outcomes", lists), ("surface", where)):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, name, pa.array(values, rows.schema.field(name).type))
    for file in (data / "validation").iterdir():
        file.unlink()
    pq.write_table(rows, data / "validation" / "part-0.parquet")
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**metadata, "surfaces": [*metadata["surfaces"], "shop"]}))
    run_here(monkeypatch, *arguments(data, saved_model, tmp_path / "out", max_steps=3))
    assert json.loads((tmp_path / "out" / "surface_config.json").read_text())["outcome_budget"] == {"save": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surface": "shop"}, "add_surfaces(['shop'])"),
        ({"data": "nowhere"}, "pinrec prepare"),
        ({"model": "nowhere"}, "neither a folder here nor a repo"),
        ({"unfreeze_item_encoder": True}, "--lora leaves the item encoder alone"),
        ({"surface": None}, "adapter of one surface: name it by --surface"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"outcome_budget": '{"hide": 1}'}, "is negative"),
        ({"outcome_budget": '{"save": -1}'}, "finite numbers >= 0"),
        ({"outcome_budget": "save=1"}, "--outcome_budget 'save=1' is no JSON object"),
        ({"data": "turned"}, "['hide'] changed between positive and negative"),
        ({"target": "window"}, "leave --target out"),
        ({"data": "bare"}, "has no target on surface 'search'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny_data: Path, bare_data: Path, saved_model: Path, tmp_path: Path, changes: dict[str, object], message: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    if changes.get("data") == "bare":
        changes = {"data": bare_data}
    if changes.get("data") == "turned":
        changes = {"data": with_metadata(tiny_data, tmp_path_factory.mktemp("turned"), negative_outcomes=[])}
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        run_here(monkeypatch, *arguments(tiny_data, saved_model, tmp_path / "out", **changes))
    assert message in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
