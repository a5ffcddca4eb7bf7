"""The built wheel, away from any checkout: push a base and two adapters, load all three by name, serve them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_adapters import write_adapter

from pinrec_hf import PinRecModel, PinRecRetriever

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"homefeed": "org/pinrec-homefeed", "search": "org/pinrec-search"}
HISTORY = {"item_id": ["p1", "p7"], "outcomes": [["save"], ["click"]], "surface": ["homefeed", "search"]}
REQUESTS = [
    {"history": HISTORY, "surface": "homefeed", "k": 8},
    {"history": HISTORY, "surface": "search", "query": "blue sofa", "k": 8},
    {"history": HISTORY, "surface": "related", "context_item_id": "p3", "k": 8},
]
PUSH = """
import json, sys
from pinrec_hf.cli import main
for folder, name in json.loads(sys.argv[1]):
    if name != "org/pinrec-base":
        assert main(["card", "--model", folder, "--base", "org/pinrec-base", "--repo", name]) == 0
    assert main(["push", "--model", folder, "--repo", name]) == 0
print("null")
"""
LOAD = """
import json, sys
import pinrec_hf
requests, names = map(json.loads, sys.argv[1:])
retriever = pinrec_hf.PinRecRetriever.from_pretrained("org/pinrec-base", adapters=names)
found = retriever.candidates(retriever.search(requests, 8))
print(json.dumps([pinrec_hf.__file__, [[c.item_id for c in candidates] for candidates in found]]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel was installed into; the only one that processes find the package in."""
    folder, pip = tmp_path_factory.mktemp("wheel"), [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, "wheel", *options, str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "site"))
        patch.chdir(folder)
        yield folder / "site"


def recommend(url: str, request: dict) -> list[str]:
    asked = urllib.request.Request(f"{url}/v1/recommend", json.dumps(request).encode())
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked) as answer:
        return [candidate["item_id"] for candidate in json.load(answer)["candidates"]]


def test_pushed_loaded_by_name_and_served(installed, loopback, trained, tmp_path):
    adapters = {
        surface: write_adapter(PinRecModel.from_pretrained(trained), tmp_path / surface, surface, seed=seed)
        for seed, surface in enumerate(NAMES)
    }
    retriever = PinRecRetriever.from_pretrained(trained, adapters=adapters)
    expected = [[c.item_id for c in found] for found in retriever.candidates(retriever.search(REQUESTS, 8))]
    base = PinRecRetriever.from_pretrained(trained)
    plain = [[c.item_id for c in found] for found in base.candidates(base.search(REQUESTS, 8))]
    assert [ours == other for ours, other in zip(expected, plain, strict=True)] == [False, False, True]

    pushed = [[str(trained), "org/pinrec-base"], *([str(adapters[surface]), NAMES[surface]] for surface in NAMES)]
    loopback.client(PUSH, json.dumps(pushed), home="wheel-author")
    file, found = loopback.client(LOAD, json.dumps(REQUESTS), json.dumps(NAMES), home="wheel-reader")
    assert Path(file).is_relative_to(installed)
    assert found == expected

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "pinrec_hf", "serve", "--model", "org/pinrec-base", "--drain", "0"]
    words += ["--port", str(port)]
    words += [word for surface, name in NAMES.items() for word in ("--adapter", f"{surface}={name}")]
    url, environment = f"http://127.0.0.1:{port}", loopback.environment("wheel-server")
    with subprocess.Popen(words, env={**os.environ, **environment}) as server:
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"{url}/readyz").close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            assert [recommend(url, request) for request in REQUESTS] == expected
        finally:
            server.terminate()
