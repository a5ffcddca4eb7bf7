"""Peers beside PinRec on public sets, by minutes of training on one core: RecTools' SASRec and eSASRec, and a GPT-2.

Run by `make benchmark-public ROW=peers`, which needs `make .venv-peers` (RecTools wants another numpy): a peer is a
process of its own; it gets the training sequences and the histories, and writes lists of items, seen ones removed.
Split, requests and metrics are PinRec's: full ranking, target's time hidden. Curves (docs/public-curves.png) are of the
validation item; the test item is read for the longest run of each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from runs import ENVIRONMENT, ROOT, fingerprint, run_script, trained_commit

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.evaluation.evaluate import Evaluation, evaluate
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.pretrained import load_pretrained

PEERS = ROOT / "benchmarks" / "peers"
PEERS_PYTHON = os.environ.get("PINREC_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))
SPLITS = ("validation", "test")
TITLES = {"pinrec": "PinRec", "sasrec": "RecTools SASRec", "esasrec": "RecTools eSASRec", "gpt2": "GPT-2"}


class Lists:
    """A ranker whose lists, for requests in order, another process wrote."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.given = rows, 0

    def rank(self, requests: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        self.given += len(requests)
        return self.rows[self.given - len(requests) : self.given, :k]


def write_inputs(data: Path, requests: Mapping[str, Requests], catalogue: Catalogue, output: Path) -> None:
    """train.npz (user, item) and, for validation and test, the histories of the requests: all as catalogue rows."""
    output.mkdir(parents=True, exist_ok=True)
    lists = pq.read_table(data / "train", columns=["item_id"])["item_id"].combine_chunks()
    user = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy()))
    rows = catalogue.rows(lists.flatten().to_pylist())
    known = rows >= 0
    np.savez(output / "train.npz", user=user[known], item=rows[known])
    for split in SPLITS:
        histories = [catalogue.rows(request["history"]["item_id"]) for request in requests[split].requests]
        offsets = np.cumsum([0, *map(len, histories)])
        np.savez(output / f"{split}.npz", offsets=offsets, items=np.concatenate(histories))


def run_peer(name: str, peer: Mapping[str, Any], work: Path, minutes: Sequence[float], items: int) -> Path:
    """The folder of its lists, made unless it is there for the same script, settings and inputs."""
    script = PEERS / ("gpt2_quality.py" if name == "gpt2" else "rectools_quality.py")
    python = sys.executable if name == "gpt2" else PEERS_PYTHON
    settings = {**peer, "items": items} if name == "gpt2" else peer
    train, *requests = (work / f"{split}.npz" for split in ("train", *SPLITS))
    read = (file.read_bytes() for file in (script, train, *requests))
    made_of = fingerprint(json.dumps(settings, sort_keys=True).encode(), *read)
    output = work / "-".join([name, *(f"{m:g}" for m in minutes), made_of])
    if output.exists():
        return output
    given = {"train": train, "output": output.with_name(output.name + ".partial"), **settings}
    command = [python, str(script), "--requests", *map(str, requests), "--minutes", *map(str, minutes)]
    for key, value in given.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
    output.with_name(output.name + ".partial").rename(output)
    return output


def figures(found: Evaluation) -> dict[str, float]:
    recall = found.metrics["recall@10"]
    return {
        "recall@10": recall.value, "low": recall.low, "high": recall.high,
        "ndcg@10": found.metrics["ndcg@10"].value, "coverage@10": found.coverage["coverage@10"],
    }  # fmt: skip


def measure_peers(data: Path, peers: Mapping[str, Any], minutes: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Figures of the peers so far: `{peer: {minutes: {"epochs", "validation", "test" of the last}}}`."""
    catalogue = build_catalogue(data)
    work = data.parent / "peers"
    requests = {split: load_requests(data, split, catalogue) for split in SPLITS}
    write_inputs(data, requests, catalogue, work)
    results: dict[str, Any] = {}
    for name, peer in peers.items():
        folder = run_peer(name, peer, work, minutes, len(catalogue))
        for mark in minutes:
            at: dict[str, Any] = {}
            for split in SPLITS if mark == max(minutes) else SPLITS[:1]:
                lists = np.load(folder / f"{split}-{mark:g}.npz")
                at["epochs"] = float(lists["epochs"])
                found = evaluate(Lists(lists["rows"]), requests[split], catalogue, name=name, progress=False)
                at[split] = figures(found)
            results.setdefault(name, {})[f"{mark:g}"] = at
        yield results


def measure_pinrec(data: Path, plan: Mapping[str, Any], minutes: Sequence[float], seed: int) -> dict[str, Any]:
    """PinRec's, as `measure_peers` gives those of a peer: a run for each of `minutes`, for its learning rate decays."""
    results: dict[str, Any] = {}
    for mark in minutes:
        folder = run_script("pretrain", data.parent / f"curve-{seed}-{mark:g}-minutes", data, seed, {
            "config_overrides": json.dumps(plan.get("config", {})), **plan.get("arguments", {}), "time_dropout": 1.0,
            "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
            "max_minutes": mark, "num_train_epochs": 1000,
        })  # fmt: skip
        model, tokenizer = load_pretrained(folder)
        ranker = ModelRanker(model, tokenizer, hide_time=True)
        at: dict[str, Any] = {
            "epochs": json.loads((folder / "trainer_state.json").read_text())["epoch"],
            "trained_commit": trained_commit([folder]),
        }
        for split in SPLITS if mark == max(minutes) else SPLITS[:1]:
            requests = load_requests(data, split, tokenizer.catalogue)
            at[split] = figures(evaluate(ranker, requests, tokenizer.catalogue, name="pinrec", progress=False))
        results[f"{mark:g}"] = at
        print("pinrec", mark, json.dumps(at), flush=True)
    return results


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Recall on the validation item against minutes, a panel a set: `{title: {system: {minutes: figures}}}`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(rows), figsize=(4.6 * len(rows), 3.6), layout="constrained", squeeze=False)
    for panel, (title, systems) in zip(panels[0], rows.items(), strict=True):
        for (name, label), colour in zip(TITLES.items(), ("C3", "C0", "C2", "C7"), strict=True):
            if name in systems:
                marks = sorted(systems[name], key=float)
                recall = [systems[name][mark]["validation"]["recall@10"] for mark in marks]
                panel.plot([float(mark) for mark in marks], recall, marker="o", color=colour, label=label)
        panel.set(title=title, xlabel="minutes of training, one core", ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylabel("recall@10, validation item")
    figure.savefig(path, dpi=130)
    plt.close(figure)
