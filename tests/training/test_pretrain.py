"""The script as a user runs it: kills, resumes, processes, and what it refuses."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pinrec_hf.training.trainer import COMPLETE, newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "pretrain.py"
QUIET = {"item_id_dropout": 0.0, "outcome_dropout": 0.0, "dropout": 0.0}


def arguments(tiny_data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "data": tiny_data, "output_dir": output, "preset": "tiny", "use_cpu": True,
        "disable_tqdm": True, "max_steps": 12,
        "per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps",
        "save_steps": 3, "logging_steps": 1, **changes,
    }  # fmt: skip
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run(*args: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(SCRIPT), *args]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def same_bits(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "model"
    result = run(*arguments(tiny_data, output))
    assert result.returncode == 0, result.stderr[-3000:]
    return output


def test_finished_run_leaves_a_model_and_no_checkpoints(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "model.safetensors", "catalogue.safetensors", "tokenizer_config.json"} <= names
    assert {"trainer_state.json", "items.parquet", "modeling_pinrec.py"} <= names
    assert [path.name for path in whole.parent.iterdir()] == ["model"]
    assert json.loads((whole / "config.json").read_text())["embedding_norm"] > 0
    assert any("eval_recall@10" in e for e in json.loads((whole / "trainer_state.json").read_text())["log_history"])


def killed_run(args: list[str], output: Path, kills: int, rng: random.Random, longest: float) -> int:
    """Starts, kills at a random moment and resumes, up to `kills` times; returns how many landed before the end."""
    checkpoints = output.with_name(output.name + ".training")
    for landed in range(kills):
        resume = ["--resume", str(checkpoints.exists())]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *args, *resume], env=env, cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.time() + rng.uniform(0.3, 1) * longest
        while time.time() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            return landed  # it was faster than the kill
    result = run(*args, "--resume", str(checkpoints.exists()))
    assert result.returncode == 0, result.stderr[-3000:]
    return kills


def test_killed_and_resumed_run_ends_in_the_same_bits(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    args = arguments(tiny_data, output)
    checkpoints = output.with_name("model.training")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *args], env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    # five steps are an epoch: it goes on within the second
    while not (newest_checkpoint(checkpoints) or "").endswith(("-6", "-9")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    # a kill inside a save leaves a checkpoint without its marker: it must not be resumed from
    newest = Path(newest_checkpoint(checkpoints) or "")
    torn = newest.with_name("checkpoint-11")
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(checkpoints) == str(newest)

    refused = run(*args)
    assert refused.returncode != 0
    assert "--resume" in refused.stderr
    resumed = run(*args, "--resume", "True")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert same_bits(whole, output)
    assert losses(whole) == losses(output)


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bits(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    started = time.time()
    assert run(*arguments(tiny_data, tmp_path / "timed")).returncode == 0
    longest, rng, left = time.time() - started, random.Random(0), 20
    for attempt in itertools.count():
        output = tmp_path / f"model-{attempt}"
        left -= killed_run(arguments(tiny_data, output), output, left, rng, longest)
        assert same_bits(whole, output)
        if not left:
            break


def test_two_processes_make_the_losses_of_one(tiny_data: Path, tmp_path: Path) -> None:
    changes = {"config_overrides": json.dumps(QUIET), "eval_strategy": "no", "save_strategy": "no",
               "load_best_model_at_end": False, "max_steps": 14}  # fmt: skip
    one = run(*arguments(tiny_data, tmp_path / "one", **changes, per_device_train_batch_size=8))
    assert one.returncode == 0, one.stderr[-3000:]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    two = run(*arguments(tiny_data, tmp_path / "two", **changes, per_device_train_batch_size=4), launcher=launcher)
    assert two.returncode == 0, two.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "pinrec prepare"),
        ({"epochs": "2"}, "--epochs"),
        ({"preset": "huge"}, "choose one of"),
        ({"architecture": "gru"}, "choose one of"),
        ({"config_overrides": '{"similarity": "euclid"}'}, "similarity"),
        ({"config_overrides": '{"content_size": 0}'}, "['content_size'], which the data or --preset decide"),
        ({"config_overrides": "[1]"}, "is no JSON object (a list)"),
        ({"config_overrides": '{"max_position_embeddings": "64"}'}, "max_position_embeddings"),
        ({"target": "sesion"}, "--target 'sesion' is none of next, window, session"),
        ({"max_minutes": "-1"}, "--max_minutes -1.0 must be above 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny_data: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    result = run(*arguments(tiny_data, tmp_path / "model", **changes))
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = run(*arguments(tiny_data, tmp_path / "model"))
    assert result.returncode != 0
    assert "exists" in result.stderr


def test_a_checkpoint_holds_no_catalogue(tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    args = arguments(tiny_data, output, max_steps=3)
    # saving the model fails in the end, so that the checkpoint stays
    (tmp_path / "data").mkdir()
    for path in tiny_data.iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    args[args.index(str(tiny_data))] = str(tmp_path / "data")
    broken = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}\n"
    broken += "import pinrec_hf.training.record as r; r.generate_requests = None\n"
    broken += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", broken, *args], env=env, cwd=ROOT, capture_output=True, text=True)
    assert "NoneType" in ended.stderr
    found = {path.name for path in (tmp_path / "model.training" / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "optimizer.pt", COMPLETE} <= found
    assert not found & {"catalogue.safetensors", "queries.safetensors", "tokenizer_config.json"}


def test_newest_checkpoint_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
