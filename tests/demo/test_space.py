"""A Space of a pushed model, as the Hub runs it: its files from there, `python app.py`, a page over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

import pinrec_hf
from pinrec_hf.cli import main
from pinrec_hf.hub.files import list_files
from pinrec_hf.hub.space import write_space

PUSH = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
from pinrec_hf.cli import main
model, space = sys.argv[1:]
assert main(["push", "--model", model, "--repo", "org/pinrec-shown"]) == 0
shown = HfApi().repo_info("org/pinrec-shown").sha
assert main(["space", "--model", "org/pinrec-shown", "--output-dir", space]) == 0
assert main(["push", "--model", model, "--repo", "org/pinrec-shown", "--revision", "later"]) == 0
assert main(["push", "--model", space, "--repo", "org/pinrec-page"]) == 0
print(json.dumps([shown, snapshot_download("org/pinrec-page", repo_type="space")]))
"""


@pytest.mark.e2e
def test_a_space_starts_from_what_was_pushed(saved_model, loopback, tmp_path):
    shown, folder = loopback.client(PUSH, saved_model, tmp_path / "space", home="space-author")
    assert loopback.files("spaces/org/pinrec-page") == list_files(tmp_path / "space").sizes
    files = {name: (Path(folder) / name).read_text() for name in ("README.md", "requirements.txt", "app.py")}
    metadata = yaml.safe_load(files["README.md"].split("---")[1])
    assert {**metadata, "sdk_version": None} == {
        "title": "PinRec: pinrec-shown", "sdk": "gradio", "sdk_version": None, "python_version": "3.11",
        "app_file": "app.py", "models": ["org/pinrec-shown"],
    }  # fmt: skip
    assert f"pinrec-hf[demo]=={pinrec_hf.__version__}\n" in files["requirements.txt"]
    assert f'"org/pinrec-shown", revision="{shown}"' in files["app.py"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**loopback.environment("space"), "GRADIO_SERVER_PORT": str(port)}
    with subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment) as server:
        try:
            while server.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                        page = json.load(answer)
                    break
                except urllib.error.URLError:
                    time.sleep(0.2)
            assert server.poll() is None, "app.py has ended"
        finally:
            server.terminate()
    assert page["title"] == "PinRec: org/pinrec-shown"
    labels = [component["props"].get("label") for component in page["components"]]
    assert {"save, % of the slots", "click, % of the slots", "Add as hide"} <= {*labels} | {
        component["props"].get("value") for component in page["components"] if component["type"] == "button"
    }


def test_a_folder_of_this_machine_cannot_be_shown(saved_model, tmp_path, capsys):
    assert main(["space", "--model", str(saved_model), "--output-dir", str(tmp_path / "space")]) == 2
    assert "push it, and name the repo" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise HTTPError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(OSError, match="org/pinrec cannot be found on the Hub: no route"):
        write_space("org/pinrec", tmp_path / "space")
    assert not (tmp_path / "space").exists()
