"""What the benchmark of `pinrec serve` serves and asks: releases of random weights, requests, the offline answers."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import uvicorn

from pinrec_hf import PinRecConfig, PinRecModel, PinRecRetriever, PinRecTokenizer
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.serving.app import create_app
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.release import Releases

SURFACES, OUTCOMES = ["homefeed", "search", "related"], ["click", "save", "hide"]
NUM_ITEMS, NUM_REQUESTS, K, NOW = 100_000, 256, 100, 1_735_689_600
TIE = 2e-5
"""Scores closer than this may swap: a batch's float32 sums differ from a lone request's in the last digits."""

Expected = dict[str, tuple[str | None, float]]  # item to the outcome that brought it, and its score


def make_release(folder: Path, seed: int, num_items: int = NUM_ITEMS) -> None:
    rng = np.random.default_rng(0)  # the same catalogue in every release
    catalogue = Catalogue.build(
        [f"item-{n}" for n in range(num_items)], vectors=rng.normal(size=(num_items, 64)).astype(np.float32)
    )
    names = {"surfaces": SURFACES, "outcomes": OUTCOMES, "negative_outcomes": ["hide"]}
    tokenizer = PinRecTokenizer(catalogue=catalogue, model_max_length=256, **names)
    torch.manual_seed(seed)
    config = PinRecConfig.from_preset(
        "small",
        **names,
        num_items=num_items,
        content_size=64,
        catalogue_fingerprint=catalogue.fingerprint,
        outcome_budgets={surface: {"save": 0.6, "click": 0.4} for surface in SURFACES},
    )
    model = PinRecModel(config).eval()
    with torch.no_grad():  # untrained outcomes hardly differ, and would be merged into one search
        model.outcome_head.outcomes.weight *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_index(folder)


def make_requests() -> list[dict[str, Any]]:
    """Three surfaces, histories of 20 to 200 events."""
    rng = np.random.default_rng(1)
    requests = []
    for number in range(NUM_REQUESTS):
        length = int(rng.integers(20, 200))
        surface = SURFACES[number % 3]
        about = {"search": {"query": f"query {number}"}, "related": {"context_item_id": f"item-{number}"}}
        history = {
            "item_id": [f"item-{n}" for n in rng.integers(0, NUM_ITEMS, length)],
            "surface": [SURFACES[n] for n in rng.integers(0, 3, length)],
            "outcomes": [[OUTCOMES[n]] for n in rng.integers(0, 3, length)],
            "timestamp": np.sort(rng.integers(NOW - 10**6, NOW, length)).tolist(),
        }
        requests.append({"history": history, "surface": surface, "timestamp": NOW, "k": K, **about.get(surface, {})})
    return requests


def offline(folder: Path, requests: list[dict[str, Any]]) -> list[Expected]:
    retriever = PinRecRetriever.from_pretrained(folder)
    found = retriever.candidates(retriever.search(requests, K))
    return [{c.item_id: (c.outcome, c.score) for c in candidates} for candidates in found]


@dataclass
class Checked:
    """Counts answers that are the offline ones of the release that gave them, to item, outcome and order; those that
    differ only where scores are a near tie, which changed places or let another item in at the end; and wrong ones."""

    expected: dict[str, list[Expected]]
    identical: int = 0
    near_ties: int = 0
    wrong: int = 0
    largest_difference: float = 0.0  # of the scores of one item
    releases: set[str] = field(default_factory=set)

    def __call__(self, number: int, answer: dict[str, Any]) -> None:
        right = self.expected[answer["release"]][number]
        self.releases.add(answer["release"])
        found = {c["item_id"]: (c["outcome"], c["score"]) for c in answer["candidates"]}
        last = dict(right.values())  # an outcome's lowest score: an item that is not among the right ones has no more
        own = [right.get(item, (outcome, last.get(outcome, math.inf))) for item, (outcome, _) in found.items()]
        pairs = [*zip(own, found.values(), strict=True), *zip(right.values(), found.values(), strict=False)]
        whole = len(answer["candidates"]) == len(found) == len(right)
        if not whole or any(outcome != other or abs(a - b) >= TIE for (outcome, a), (other, b) in pairs):
            self.wrong += 1
            return
        same = (abs(right[item][1] - score) for item, (_, score) in found.items() if item in right)
        self.largest_difference = max(self.largest_difference, *same, 0.0)
        if list(right) == list(found):
            self.identical += 1
        else:
            self.near_ties += 1

    def counts(self) -> dict[str, int]:
        return {"identical": self.identical, "near_ties": self.near_ties, "wrong": self.wrong}


class Recording:
    """A retriever's tokenizer, and what it and `generate` made last."""

    def __init__(self, retriever: PinRecRetriever) -> None:
        self.tokenizer, self.generate = retriever.tokenizer, retriever.generate
        retriever.tokenizer, retriever.generate = self, self.generated
        self.batch: dict[str, torch.Tensor] = {}
        self.embeddings = np.zeros(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.tokenizer(*args, **kwargs)
        self.batch = dict(batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def generated(self, requests: Any) -> Any:
        written = self.generate(requests)
        self.embeddings = np.concatenate([by.embeddings for by in written])
        return written


def parity(folder: Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Each request alone through the HTTP app, in a thread of this process, and offline by another retriever."""
    metrics, port = Metrics(), free_port()
    releases, here = Releases(folder, metrics), PinRecRetriever.from_pretrained(folder)
    server = uvicorn.Server(uvicorn.Config(create_app(releases, metrics), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    through, offline = Recording(releases.current.retriever), Recording(here)
    tensors = candidates = 0
    alone, difference = [], 0.0
    for request in requests:
        body = urllib.request.Request(f"http://127.0.0.1:{port}/v1/recommend", orjson.dumps(request))
        body.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(body) as answer:
            answered = [(c["item_id"], c["outcome"], c["step"]) for c in json.load(answer)["candidates"]]
        (expected,) = here.candidates(here.search([request], request["k"]))
        tensors += through.batch.keys() == offline.batch.keys() and all(
            torch.equal(value, offline.batch[name]) for name, value in through.batch.items()
        )
        candidates += answered == [(c.item_id, c.outcome, c.step) for c in expected]
        difference = max(difference, float(np.abs(through.embeddings - offline.embeddings).max()))
        alone.append(offline.embeddings)
    server.should_exit = True
    thread.join()
    here.generate(requests)  # all at once: what a batch changes
    return {
        "requests": len(requests),
        "equal_tensors": tensors,
        "equal_candidates": candidates,
        "largest_embedding_difference": difference,
        "largest_in_a_batch": float(np.abs(offline.embeddings - np.concatenate(alone)).max()),
        "largest_entry": float(np.abs(offline.embeddings).max()),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """A server process: its port, and the process."""
    port = free_port()
    command = [sys.executable, "-m", "pinrec_hf", "serve", "--model", str(model), "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not ready(port):
            if process.poll() is not None:
                raise RuntimeError("the server does not start; run it by hand: " + " ".join(command))
            time.sleep(0.2)
        yield port, process
    finally:
        process.kill()
        process.wait()


def ready(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return json.load(answer)["release"]
    except OSError:
        return None
