"""What a finished training leaves for its model card: the command, the machine, the versions."""

import json
import platform
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

NAME = "training.json"
PACKAGES = ("torch", "transformers", "accelerate")


def write_training_record(folder: Path, script: str, argv: Sequence[str], *, processes: int, resumed: bool) -> None:
    """Write `training.json`; its `cpu_seconds` are those that this process has taken since its start, on all cores.

    Args:
        folder: of the finished model.
        script: as it is launched, e.g. `training/pretrain.py`.
        argv: its arguments, or the one YAML file that holds them.
        processes: that trained together.
        resumed: whether the training was interrupted, so that its last start alone has a measured runtime.
    """
    record = {
        "command": shlex.join(["accelerate", "launch", script, *spelled_out(argv)]),
        "hardware": hardware(processes),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "resumed": resumed,
        "cpu_seconds": time.process_time(),
    }
    (folder / NAME).write_text(json.dumps(record, indent=2) + "\n")


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The arguments, those of a YAML file included, without `--resume`.

    >>> spelled_out(["--data", "data", "--resume", "True", "--seed", "1"])
    ['--data', 'data', '--seed', '1']
    """
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        fields = yaml.safe_load(Path(argv[0]).read_text())
        argv = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    words = iter(argv)
    return [
        word for word in words if not (word == "--resume" and next(words, True)) and not word.startswith("--resume=")
    ]


def hardware(processes: int) -> str:
    """`"1 x NVIDIA H100"`, or the processor with the number of threads that torch used."""
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    times = f"{processes} x " if processes > 1 else ""
    return f"{times}{processor()}, {threads} thread{'s' * (threads > 1)}"


def processor() -> str:
    """Its name, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
