"""The figures of `pinrec serve`: benchmarks/results/serving.json, a row a claim.

    make benchmark-serving                       # about ten minutes on two idle cores
    python benchmarks/serving.py --row load --seconds 600      # under load for as long as the claim says
    python benchmarks/serving.py --row hostile --row memory    # 10,000 bad calls, 10^6 good ones

A `small` model of random weights and 100,000 synthetic items: speed does not depend on training. The server is a
process of its own and so is the load, on loopback; both share the machine with whatever else runs, and every row
says how busy it was.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import torch
from loopback_load import Connection, Tally, append_until_killed, ask, closed_loop, open_loop
from runs import record
from serving_hostile import hostile
from serving_world import Checked, K, make_release, make_requests, offline, parity, ready, served

from pinrec_hf import PinRecRetriever
from pinrec_hf.serving.histories import SQLiteHistories

CLIENTS = 64
MILLION = 10**6


def milliseconds(latencies: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(latencies) * 1e3, [50, 90, 99]) if latencies else [float("nan")] * 3
    return {f"p{p}_ms": round(float(v), 1) for p, v in zip((50, 90, 99), values, strict=True)}


def report(claim: str, target: str, value: dict[str, Any], met: bool) -> None:
    busy = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    record("serving", [{"claim": claim, "target": target, "value": {**value, **busy}, "met": bool(met)}], [0, 1])


def memory_of(process: subprocess.Popen) -> int:
    """Resident MiB."""
    return int(psutil.Process(process.pid).memory_info().rss) >> 20


class World:
    """Two releases, the requests, and what they answer offline."""

    def __init__(self, work: Path, seconds: float) -> None:
        self.work, self.seconds = work, seconds
        self.first, self.second = work / "first", work / "second"
        for seed, folder in enumerate((self.first, self.second)):
            make_release(folder, seed)
        self.requests = make_requests()
        self.bodies = [orjson.dumps(request) for request in self.requests]
        self.expected = {folder.name: offline(folder, self.requests) for folder in (self.first, self.second)}

    def load(self, port: int, check: Checked, seconds: float) -> Tally:
        return asyncio.run(closed_loop(port, self.bodies, CLIENTS, seconds, check))


def load(world: World) -> None:
    """Batching against none, taking turns so that other work on the machine disturbs both alike.

    What is compared is requests a second of the server's core: of the wall's seconds a busy machine gives it few.
    """
    patient = "--deadline", "120"  # on a busy machine a late answer is late, not lost
    rates: dict[str, list[float]] = {"batched": [], "single": []}
    latencies: list[float] = []
    check, lost, seconds, answered = Checked(world.expected), 0, world.seconds, 0.0
    with (
        served(world.first, *patient) as (port, process),
        served(world.first, *patient, "--max-batch", "1", "--max-wait", "0") as (single_port, single),
    ):
        for warm in (port, single_port):
            world.load(warm, Checked(world.expected), 2)
        for _ in range(5):
            for name, server, target, share in (("batched", process, port, 5), ("single", single, single_port, 20)):
                start, since = cpu_seconds(server), time.perf_counter()
                tally = world.load(target, check, seconds / share)
                rates[name].append(len(tally.latencies) / (cpu_seconds(server) - start))
                lost += tally.lost + tally.failed + len(tally.refusals)
                if name == "batched":
                    latencies += tally.latencies
                    answered += time.perf_counter() - since
    counts = {**check.counts(), "lost": lost, "largest_score_difference": check.largest_difference}
    report(
        "64 clients, mixed surfaces: wrong or lost answers",
        "0 in 10 minutes",
        {
            **counts,
            "seconds": seconds,
            "answers": len(latencies),
            "a second": round(len(latencies) / answered, 1),
            **milliseconds(latencies),
        },
        check.wrong == lost == 0 and seconds >= 600,
    )
    throughput = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
    gain = throughput["batched"] / throughput["single"]
    report(
        "batching against batches of one, 64 clients, requests a second",
        ">= 3 x",
        {**throughput, "times": round(gain, 2), "seconds": "of the server's CPU"},
        gain >= 3,
    )


def cpu_seconds(process: subprocess.Popen) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def http(world: World) -> None:
    with served(world.first) as (port, _):
        http, alone = asyncio.run(lone(port, PinRecRetriever.from_pretrained(world.first), world.requests))
    share = 1 - float(np.median(alone) / np.median(http))
    report(
        "the HTTP layer's share of a lone request's time at p50",
        "<= 20 %",
        {"percent": round(100 * share, 1), "http": milliseconds(http), "offline": milliseconds(alone)},
        share <= 0.2,
    )


def overload(world: World) -> None:
    """Three times the rate of 64 clients who ask again when they are answered."""
    check, seconds = Checked(world.expected), min(world.seconds, 60)
    with served(world.first) as (port, _):
        world.load(port, Checked(world.expected), 2)
        calm_load = world.load(port, check, seconds / 4)
        rate = 3 * len(calm_load.latencies) / (seconds / 4)
        over = asyncio.run(open_loop(port, world.bodies, rate, seconds / 2, check))
        time.sleep(1)
        after = milliseconds(world.load(port, check, seconds / 4).latencies)
    calm = milliseconds(calm_load.latencies)
    accepted, refused = milliseconds(over.latencies), milliseconds(over.refusals)
    lost = over.lost + over.failed
    report(
        "3 x overload: refusals, accepted requests, recovery",
        "refused within 50 ms (p99), accepted p99 within 2 x",
        {
            "accepted": {"requests": len(over.latencies), **accepted},
            "refused": {"requests": len(over.refusals), **refused},
            "64 clients before": calm,
            "64 clients after": after,
            "lost": lost,
            "wrong": check.wrong,
        },
        refused["p99_ms"] <= 50 and accepted["p99_ms"] <= 2 * calm["p99_ms"] and lost == check.wrong == 0,
    )


async def lone(
    port: int, retriever: PinRecRetriever, requests: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Seconds of each request alone, over HTTP and in Python, in turns."""
    connection, tally, offline = Connection(port), Tally(lambda *_: None), []
    for number, request in enumerate(requests):
        await ask(connection, tally, number, orjson.dumps(request))
        start = time.perf_counter()
        retriever.candidates(retriever.search([request], K))
        offline.append(time.perf_counter() - start)
    connection.close()
    return tally.latencies[1:], offline[1:]  # the first opens the connection


def equal_to_offline(world: World) -> None:
    found = parity(world.first, world.requests)
    report(
        "parity: the same row offline and through the server",
        "bit-equal tokenizer tensors, embeddings to 1e-6, equal candidates",
        found,
        found["equal_tensors"] == found["equal_candidates"] == found["requests"]
        and found["largest_embedding_difference"] <= 1e-6,
    )


def memory(world: World) -> None:
    """10^6 requests that are cheap, or it would take hours: 1,000 items, the last event, one outcome, k = 5; of eleven
    requests ten come in calls of 64. The row is written after each tenth."""
    make_release(world.work / "light", 0, num_items=1_000)
    cheap = {"k": 5, "outcome_budget": {"save": 1}}
    light = [
        {**request, **cheap, "history": {name: values[-1:] for name, values in request["history"].items()}}
        for request in world.requests
    ]
    alone = [("/v1/recommend", orjson.dumps(request)) for request in light]
    together = [orjson.dumps({"requests": light[start : start + 64]}) for start in range(0, len(light), 64)]
    calls = [("/v1/recommend/batch", body) for body in together] * 10 + alone
    with served(world.work / "light", "--max-pending", "1000") as (port, process):
        sizes, done, failed = [memory_of(process)], 0, 0
        while done < MILLION and not failed:
            for _ in range(36):
                failed += asyncio.run(post_all(port, calls))
                done += 11 * len(light)
            sizes.append(memory_of(process))
            growth = sizes[-1] / sizes[1] - 1  # since the first tenth: allocators have what they need
            report(
                "resident memory after 10^6 requests",
                "flat within 5 %",
                {
                    "percent": round(100 * growth, 1),
                    "requests": done,
                    "failed": failed,
                    "MiB at the start and after each tenth": sizes,
                    "what": "1,000 items, 1 event, 1 outcome, k = 5; of 11 requests 10 come in calls of 64",
                },
                growth <= 0.05 and done >= MILLION and not failed,
            )


async def post_all(port: int, calls: list[tuple[str, bytes]], clients: int = 8) -> int:
    """How many of the calls were not answered with 200."""
    left, statuses = iter(calls), []

    async def client() -> None:
        connection = Connection(port)
        for route, body in left:
            statuses.append((await connection.post(route, body))[0])
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(calls) - statuses.count(200)


def release(world: World) -> None:
    current = world.work / "current"
    current.symlink_to(world.first)
    check = Checked(world.expected)
    with served(current) as (port, process):
        tally = asyncio.run(swapped(port, process, world, check, min(world.seconds, 60) / 2))
        counts = {"lost": tally.lost + tally.failed + len(tally.refusals), "mixed": check.wrong}
        report(
            "release swapped twice, then SIGTERM, under 64 clients",
            "0 lost, 0 mixed answers",
            {
                **counts,
                "answers": len(tally.latencies),
                "releases": len(check.releases),
                "exit_code": process.wait(30),
            },
            not any(counts.values()) and len(check.releases) == 2,
        )


async def swapped(port: int, process: subprocess.Popen, world: World, check: Checked, seconds: float) -> Tally:
    clients = asyncio.create_task(closed_loop(port, world.bodies, CLIENTS, seconds * 100, check))
    for name in ("second", "first"):
        await asyncio.sleep(seconds / 3)
        (world.work / "next").symlink_to(world.work / name)
        os.replace(world.work / "next", world.work / "current")
        process.send_signal(signal.SIGHUP)
        while await asyncio.to_thread(ready, port) != name:
            await asyncio.sleep(0.1)
    await asyncio.sleep(seconds / 3)
    process.send_signal(signal.SIGTERM)
    return await clients


def kill(world: World) -> None:
    histories = world.work / "events.sqlite"
    with served(world.first, "--histories", str(histories)) as (port, process):
        acknowledged = asyncio.run(killed(port, process, min(world.seconds / 4, 10)))
    store = SQLiteHistories(str(histories))
    stored = [len(store.read(f"killed-{n}").get("item_id", ())) for n in range(len(acknowledged))]
    missing = sum(max(0, a - s) for a, s in zip(acknowledged, stored, strict=True))
    report(
        "SIGKILL while events are appended: acknowledged events lost",
        "0",
        {"lost": missing, "acknowledged": sum(acknowledged)},
        missing == 0 and sum(acknowledged) > 0,
    )


async def killed(port: int, process: subprocess.Popen, seconds: float) -> list[int]:
    kills = [process.kill, None, None, None]
    return await asyncio.gather(*(append_until_killed(port, n, kill, seconds) for n, kill in enumerate(kills)))


def withstands(world: World) -> None:
    with served(world.first, "--histories", str(world.work / "hostile.sqlite")) as (port, process):
        found = hostile(port, world.bodies)
        alive = process.poll() is None
    report(
        "schemathesis over the OpenAPI document, 10,000 cases; 1,000 malformed bodies",
        "no 5xx, no hang",
        found,
        alive and found["5xx"] == found["hung"] == 0 and found["cases"] >= 10_000 and found["malformed"] >= 1_000,
    )


ROWS: dict[str, Callable[[World], None]] = {
    "parity": equal_to_offline,
    "load": load,
    "http": http,
    "overload": overload,
    "release": release,
    "kill": kill,
    "hostile": withstands,
    "memory": memory,
}
QUICK = ("parity", "load", "http", "overload", "release", "kill")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="of load in the main rows (default: %(default)s)")
    parser.add_argument("--row", choices=ROWS, action="append", help=f"(default: {', '.join(QUICK)})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), arguments.seconds)
        for name in arguments.row or QUICK:
            ROWS[name](world)
