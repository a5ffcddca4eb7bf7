"""A model that two processes share by FSDP2 learns as one process does, and is whole wherever it is written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import QUIET, SCRIPT, arguments, losses, run, same_bits, weights

from pinrec_hf.hub.adapters import load_surface_adapters
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.training.trainer import newest_checkpoint

pytestmark = pytest.mark.scale

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = ROOT / "training" / "finetune.py"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUIETLY = {"config_overrides": json.dumps(QUIET), "max_steps": 6, "per_device_train_batch_size": 4}


def launched(script: Path, *args: str) -> list[str]:
    config = ["--config_file", str(ROOT / "training" / "fsdp2.yaml"), "--num_processes", "2"]
    here = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    # port 0: one that is free
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    return [*launcher, here, str(script), *args]


def run_two(script: Path, *args: str) -> None:
    done = subprocess.run(launched(script, *args), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def one(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains."""
    output = tmp_path_factory.mktemp("one") / "model"
    done = run(*arguments(tiny_data, output, **{**QUIETLY, "per_device_train_batch_size": 8}))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def two(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes that share it."""
    output = tmp_path_factory.mktemp("two") / "model"
    run_two(SCRIPT, *arguments(tiny_data, output, **QUIETLY))
    return output


def recalls(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_recall@50"] for entry in log if "eval_recall@50" in entry]


def test_two_processes_share_a_model_and_make_the_losses_of_one(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert len(losses(two)) == 6
    assert recalls(two) == pytest.approx(recalls(one), abs=0.1)
    model, _ = load_pretrained(two)  # refuses what is not whole
    assert type(model).__name__ == "PinRecModel"
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    first, second = weights(one), weights(two)
    assert all(torch.allclose(first[name], second[name], atol=2e-3) for name in first)


def test_killed_and_resumed_it_ends_in_the_same_bits(tiny_data: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    args = arguments(tiny_data, output, **QUIETLY)
    checkpoints = output.with_name("model.training")
    with subprocess.Popen(launched(SCRIPT, *args), env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL) as launcher:
        while newest_checkpoint(checkpoints) is None and launcher.poll() is None:
            time.sleep(0.005)
        for process in psutil.Process(launcher.pid).children(recursive=True):  # each in a session of its own
            process.kill()
        launcher.kill()
    assert not output.exists()
    found = Path(newest_checkpoint(checkpoints) or "")
    whole = torch.load(found / "pytorch_model_fsdp.bin")
    assert {name: tensor.shape for name, tensor in whole.items()} == {
        name: tensor.shape for name, tensor in weights(two).items()
    }
    run_two(SCRIPT, *args, "--resume", "True")
    assert same_bits(two, output)
    assert losses(two) == losses(output)


@pytest.mark.parametrize("lora", [True, False])
def test_finetuning(tiny_data: Path, one: Path, tmp_path: Path, lora: bool) -> None:
    def finetuning(output: Path, rows: int) -> list[str]:
        given = arguments(tiny_data, output, model=one, surface="search", lora=lora, max_steps=4, eval_steps=2,
                          save_steps=2, per_device_train_batch_size=rows)  # fmt: skip
        preset = given.index("--preset")
        return given[:preset] + given[preset + 2 :]

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = subprocess.run([sys.executable, str(FINETUNE), *finetuning(alone, 8)], env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0
    run_two(FINETUNE, *finetuning(shared, 4))
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)
    assert {path.name for path in shared.iterdir()} == {path.name for path in alone.iterdir()}
    model, _ = load_pretrained(one if lora else shared)
    if lora:
        load_surface_adapters(model, {"search": shared})
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    first, second = load_file(alone / file), load_file(shared / file)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)
