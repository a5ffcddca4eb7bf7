"""What a finished training leaves beside its weights: for its card the command, the machine, the versions; for those
who watch it, how long its embeddings were."""

import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import generate_requests
from pinrec_hf.retrieval.request import readable

NAME = "training.json"
PACKAGES = ("torch", "transformers", "accelerate")
NORM_REQUESTS = 1_000


def record_embedding_norm(
    model: PinRecModel, tokenizer: PinRecTokenizer, requests: Sequence[Mapping[str, Any]]
) -> None:
    """Put into the config the mean length of embeddings as they are served, of at most `NORM_REQUESTS` requests."""
    some = requests[:: -(-len(requests) // NORM_REQUESTS)]
    written = generate_requests(model, tokenizer, readable(some, tokenizer))
    model.config.embedding_norm = float(np.mean([by.norm(model.config.hidden_size) for by in written]))


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
    >>> spelled_out(["--data", "data", "--resume", "--seed", "1"])
    ['--data', 'data', '--seed', '1']
    """
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        fields = yaml.safe_load(Path(argv[0]).read_text())
        argv = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    kept, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--resume":  # its value may be left out
            words = words[1:] if words and not words[0].startswith("--") else words
        elif not word.startswith("--resume="):
            kept.append(word)
    return kept


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
