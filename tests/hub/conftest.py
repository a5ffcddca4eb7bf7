"""A Hub on loopback, and clients in processes of their own that are online to it alone."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

HERE = Path(__file__).resolve().parent


class Loopback:
    """The server, and what a client needs to speak to it."""

    def __init__(self, port: int, homes: Path) -> None:
        self.url, self.homes = f"http://127.0.0.1:{port}", homes

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def files(self, repo: str, revision: str = "main") -> dict[str, int]:
        """Path and size of all that a repo holds, but for what its creation put there."""
        kind = "datasets" if repo.startswith("datasets/") else "models"
        entries = self.get(f"/api/{kind}/{repo.removeprefix('datasets/')}/tree/{revision}")
        return {entry["path"]: entry["size"] for entry in entries if entry["path"] != ".gitattributes"}

    def accident(self, **what: list) -> None:
        """See `Hub` in loopback.py; also forgets the requests that were made so far."""
        urllib.request.urlopen(f"{self.url}/test/accident", json.dumps(what).encode()).close()

    def client(self, script: str, *args: object, home: str, offline: bool = False):
        """Run a script; returns what it prints last, as JSON. `home` names its cache, empty at first."""
        environment = {
            **os.environ,
            "HF_HOME": str(self.homes / home),
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopback",
            "NO_PROXY": "127.0.0.1",
        }
        words = [sys.executable, "-c", script, *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def loopback(tmp_path_factory):
    command = [sys.executable, str(HERE / "loopback.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield Loopback(int(server.stdout.readline()), tmp_path_factory.mktemp("homes"))
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def trained(saved_model, tiny_data, make_model, tokenizer, tmp_path_factory) -> Path:
    """An indexed model's folder with its code, as pretraining leaves it, and with what must never be pushed."""
    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("trained") / "pinrec-tiny")
    with pytest.MonkeyPatch.context() as patch:  # registering writes into the classes
        for cls, auto in ((PinRecConfig, "AutoConfig"), (PinRecModel, "AutoModel"), (PinRecTokenizer, "AutoTokenizer")):
            patch.setattr(cls, "_auto_class", auto)
        PinRecModel.from_pretrained(saved_model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copyfile(tiny_data / "metadata.json", folder / "data.json")
    (folder / "checkpoint-9").mkdir()
    for name in ("checkpoint-9/model.safetensors", "model.safetensors.partial-1", "notes.txt", ".env", "log.parquet"):
        (folder / name).write_text("secret")
    return folder
