"""The figures of `pinrec serve`: benchmarks/results/serving.json, a row a claim.

    make benchmark-serving                     # about five minutes
    python benchmarks/serving.py --seconds 600 # as the claims are worded

A `small` model of random weights and 100,000 synthetic items: speed does not depend on training. The server is a
process of its own and so is the load, on loopback; both share the machine with whatever else runs, and every row
says how busy it was.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import torch
from loopback_load import Connection, Tally, append_until_killed, ask, closed_loop, open_loop
from runs import record

from pinrec_hf import PinRecConfig, PinRecModel, PinRecRetriever, PinRecTokenizer
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.serving.histories import SQLiteHistories

SURFACES, OUTCOMES = ["homefeed", "search", "related"], ["click", "save", "hide"]
NUM_ITEMS, NUM_REQUESTS, CLIENTS, K, NOW = 100_000, 256, 64, 100, 1_735_689_600
TIE = 1e-3
"""Scores closer than this may swap: a batch's float32 sums differ from a lone request's in the last digits."""

Expected = dict[str, tuple[str | None, float]]  # item to the outcome that brought it, and its score


def make_release(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(0)  # the same catalogue in every release
    catalogue = Catalogue.build(
        [f"item-{n}" for n in range(NUM_ITEMS)], vectors=rng.normal(size=(NUM_ITEMS, 64)).astype(np.float32)
    )
    names = {"surfaces": SURFACES, "outcomes": OUTCOMES, "negative_outcomes": ["hide"]}
    tokenizer = PinRecTokenizer(catalogue=catalogue, model_max_length=256, **names)
    torch.manual_seed(seed)
    config = PinRecConfig.from_preset(
        "small",
        **names,
        num_items=NUM_ITEMS,
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


def compare(tally: Tally, expected: dict[str, list[Expected]]) -> dict[str, int]:
    """Answers that are the offline ones of the release that gave them, up to near ties, and wrong ones."""
    counts = {"identical": 0, "near_ties": 0, "wrong": 0}
    for number, answer in tally.answers:
        right = expected[answer["release"]][number]
        found = {c["item_id"]: (c["outcome"], c["score"]) for c in answer["candidates"]}
        gone, come = (sorted(a[item][1] for item in a.keys() - b.keys()) for a, b in ((right, found), (found, right)))
        pairs = [*zip(gone, come, strict=False)]
        pairs += [(right[i][1], found[i][1]) for i in right.keys() & found.keys() if right[i][0] == found[i][0]]
        if len(right) != len(found) or any(abs(a - b) > TIE for a, b in pairs):
            counts["wrong"] += 1
        elif list(right) == list(found):
            counts["identical"] += 1
        else:
            counts["near_ties"] += 1
    return counts


@contextmanager
def served(model: Path, *options: str):
    """A server process: its port, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def milliseconds(latencies: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(latencies) * 1e3, [50, 90, 99]) if latencies else [float("nan")] * 3
    return {f"p{p}_ms": round(float(v), 1) for p, v in zip((50, 90, 99), values, strict=True)}


def report(claim: str, target: str, value: dict[str, Any], met: bool) -> None:
    busy = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    record("serving", [{"claim": claim, "target": target, "value": {**value, **busy}, "met": bool(met)}], [0, 1])


def measure(work: Path, seconds: float) -> None:
    first, second = work / "first", work / "second"
    for seed, folder in enumerate((first, second)):
        make_release(folder, seed)
    requests = make_requests()
    bodies = [orjson.dumps(request) for request in requests]
    expected = {folder.name: offline(folder, requests) for folder in (first, second)}

    def load(port: int, clients: int = CLIENTS, duration: float = seconds) -> Tally:
        return asyncio.run(closed_loop(port, bodies, clients, duration))

    # batching against none, taking turns so that other work on the machine disturbs both alike
    rates: dict[str, list[float]] = {"batched": [], "single": []}
    latencies: list[float] = []
    compared = dict.fromkeys(("identical", "near_ties", "wrong"), 0)
    lost = 0
    with served(first) as (port, process), served(first, "--max-batch", "1", "--max-wait", "0") as (single_port, _):
        load(port, duration=2), load(single_port, duration=2)
        memory = [psutil.Process(process.pid).memory_info().rss]
        for _ in range(4):
            for name, target in (("batched", port), ("single", single_port)):
                start = time.perf_counter()
                tally = load(target, duration=seconds / 4)
                rates[name].append(len(tally.answers) / (time.perf_counter() - start))
                lost += tally.lost + tally.failed + len(tally.refusals)
                for what, count in compare(tally, expected).items():
                    compared[what] += count
                if name == "batched":
                    latencies += tally.latencies
            memory.append(psutil.Process(process.pid).memory_info().rss)
        throughput = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
        report(
            "64 clients, mixed surfaces: wrong or lost answers",
            "0 in 10 minutes",
            {**compared, "lost": lost, "seconds": seconds, "answers": len(latencies), **milliseconds(latencies)},
            compared["wrong"] == lost == 0 and seconds >= 600,
        )
        gain = throughput["batched"] / throughput["single"]
        report(
            "batching against batches of one, 64 clients, requests a second",
            ">= 3 x",
            {**throughput, "times": round(gain, 2)},
            gain >= 3,
        )

        http, alone = asyncio.run(lone(port, PinRecRetriever.from_pretrained(first), requests))
        share = 1 - float(np.median(alone) / np.median(http))
        report(
            "the HTTP layer's share of a lone request's time at p50",
            "<= 20 %",
            {"percent": round(100 * share, 1), "http": milliseconds(http), "offline": milliseconds(alone)},
            share <= 0.2,
        )

        calm = milliseconds(load(port, duration=seconds / 4).latencies)
        over = asyncio.run(open_loop(port, bodies, 3 * throughput["batched"], seconds / 2))
        memory.append(psutil.Process(process.pid).memory_info().rss)
        time.sleep(1)
        after = milliseconds(load(port, duration=seconds / 4).latencies)
        accepted, refused = milliseconds(over.latencies), milliseconds(over.refusals)
        report(
            "3 x overload: refusals, accepted requests, recovery",
            "refused within 50 ms (p99), accepted p99 within 2 x",
            {
                "accepted": {"requests": len(over.latencies), **accepted},
                "refused": {"requests": len(over.refusals), **refused},
                "64 clients before": calm,
                "64 clients after": after,
                "lost": over.lost + over.failed,
                "wrong": compare(over, expected)["wrong"],
            },
            refused["p99_ms"] <= 50 and accepted["p99_ms"] <= 2 * calm["p99_ms"] and over.lost + over.failed == 0,
        )
        growth = memory[-1] / memory[0] - 1
        answers = len(latencies) + len(over.latencies)
        report(
            "resident memory after 10^6 requests",
            "flat within 5 %",
            {"percent": round(100 * growth, 1), "requests": answers, "MiB": [m >> 20 for m in memory]},
            growth <= 0.05 and answers >= 10**6,
        )

    current = work / "current"
    current.symlink_to(first)
    with served(current) as (port, process):
        tally = asyncio.run(swapped(port, process, bodies, work, seconds / 2))
        releases = {answer["release"] for _, answer in tally.answers}
        counts = {"lost": tally.lost + tally.failed + len(tally.refusals), "mixed": compare(tally, expected)["wrong"]}
        report(
            "release swapped twice, then SIGTERM, under 64 clients",
            "0 lost, 0 mixed answers",
            {**counts, "answers": len(tally.answers), "releases": len(releases), "exit_code": process.wait(30)},
            not any(counts.values()) and len(releases) == 2,
        )

    histories = work / "events.sqlite"
    with served(first, "--histories", str(histories)) as (port, process):
        acknowledged = asyncio.run(killed(port, process, min(seconds / 4, 10)))
    store = SQLiteHistories(str(histories))
    stored = [len(store.read(f"killed-{n}").get("item_id", ())) for n in range(len(acknowledged))]
    missing = sum(max(0, a - s) for a, s in zip(acknowledged, stored, strict=True))
    report(
        "SIGKILL while events are appended: acknowledged events lost",
        "0",
        {"lost": missing, "acknowledged": sum(acknowledged)},
        missing == 0 and sum(acknowledged) > 0,
    )


async def lone(
    port: int, retriever: PinRecRetriever, requests: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Seconds of each request alone, over HTTP and in Python, in turns."""
    connection, tally, offline = Connection(port), Tally(), []
    for number, request in enumerate(requests):
        await ask(connection, tally, number, orjson.dumps(request))
        start = time.perf_counter()
        retriever.candidates(retriever.search([request], K))
        offline.append(time.perf_counter() - start)
    connection.close()
    return tally.latencies[1:], offline[1:]  # the first opens the connection


async def swapped(port: int, process: subprocess.Popen, bodies: list[bytes], work: Path, seconds: float) -> Tally:
    clients = asyncio.create_task(closed_loop(port, bodies, CLIENTS, seconds * 10))
    for name in ("second", "first"):
        await asyncio.sleep(seconds / 3)
        (work / "next").symlink_to(work / name)
        os.replace(work / "next", work / "current")
        process.send_signal(signal.SIGHUP)
        while await asyncio.to_thread(ready, port) != name:
            await asyncio.sleep(0.1)
    await asyncio.sleep(seconds / 3)
    process.send_signal(signal.SIGTERM)
    return await clients


async def killed(port: int, process: subprocess.Popen, seconds: float) -> list[int]:
    kills = [process.kill, None, None, None]
    return await asyncio.gather(*(append_until_killed(port, n, kill, seconds) for n, kill in enumerate(kills)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="of load in the main rows (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.seconds)
