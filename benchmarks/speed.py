"""The figures of docs/performance.md: benchmarks/results/speed.json, a row a claim.

    make benchmark-speed                                  # rows that are not measured yet
    python benchmarks/speed.py --row loader --again       # one of them, once more

One thread. A run and its peer's take turns (A B A B ...), and the medians are compared. Seconds are the processor's
(user and system), because whatever else the machine does counts less there. RecTools lives in an environment of its
own, `.venv-peers`, and is asked through a pipe (benchmarks/peers/rectools_speed.py).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from runs import ENVIRONMENT, RESULTS, public_data, record
from timing import (
    BATCH,
    LENGTH,
    PLAN,
    Steps,
    gpt2,
    hashed,
    loader_of,
    movielens,
    p50,
    peer,
    pinrec_steps,
    random_batches,
    random_model,
    random_requests,
    random_tokenizer,
    seconds,
    take_turns,
    token_ids,
)

from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.encode import generate_requests, reading_fingerprint
from pinrec_hf.retrieval.history_cache import HistoryCache
from pinrec_hf.retrieval.retriever import PinRecRetriever

Value = dict[str, Any]


def per_second(found: dict[str, float]) -> Value:
    return {f"{name}: sequences/s": 1 / taken for name, taken in found.items()}


def training_sampled() -> tuple[Value, bool]:
    run = movielens("sampled")
    with peer(run, loss="sampled_softmax", n_negatives=PLAN["negatives"]) as rectools:
        found = take_turns(pinrec=pinrec_steps(run).run, rectools=rectools.seconds_a_sequence)
    ratio = found["rectools"] / found["pinrec"]
    return {**per_second(found), "ratio": ratio}, ratio >= target("training_sampled")


def training_full() -> tuple[Value, bool]:
    run = movielens("full")
    model = gpt2(run.config.num_items)
    peer_steps = Steps(loader_of(run, token_ids), model, lambda batch: model(**batch).loss)
    with peer(run, loss="softmax") as rectools:
        found = take_turns(pinrec=pinrec_steps(run).run, gpt2=peer_steps.run, rectools=rectools.seconds_a_sequence)
    ratios = {name: found[name] / found["pinrec"] for name in ("gpt2", "rectools")}
    wanted = target("training_full")
    return {**per_second(found), "ratio": ratios}, all(ratios[name] >= wanted[name] for name in ratios)


def loader() -> tuple[Value, bool]:
    run = movielens("sampled")
    steps, batches = pinrec_steps(run), iter(loader_of(run))
    batch = next(batches)
    found = take_turns(
        loader=lambda: seconds(lambda: next(batches)) / BATCH, step=lambda: seconds(lambda: steps.step(batch)) / BATCH
    )
    ratio = found["step"] / found["loader"]
    return {**per_second(found), "ratio": ratio}, ratio >= target("loader")


def step_size() -> tuple[Value, bool]:
    runs: dict[str, Callable[[], float]] = {}
    for items in PLAN["rows"]["step_size"]["items"]:
        tokenizer = random_tokenizer(items, LENGTH + 1)
        model = random_model(tokenizer, **PLAN["model"], **hashed(items))
        steps = Steps(random_batches(tokenizer, 4 * PLAN["repeats"]), model, lambda batch, m=model: m(**batch).loss)
        runs[str(items)] = lambda steps=steps: seconds(lambda: steps.step(next(steps.batches)))
    found = take_turns(**runs)
    few, many = found.values()
    return {"seconds a step": found, "ratio": many / few}, many / few <= target("step_size")


def encoding() -> tuple[Value, bool]:
    tokenizer = random_tokenizer(3_416, LENGTH + 1)
    model = random_model(tokenizer, **PLAN["model"]).eval()
    retriever = PinRecRetriever.build(model, tokenizer)
    (request,) = random_requests(3_416, LENGTH, 1)
    batch = tokenizer([request["history"]], surface="homefeed", timestamp=request["timestamp"])
    other, ids = gpt2(3_416).eval().transformer, [0, *request["history"]["item_id"]]

    @torch.inference_mode()
    def ours() -> None:
        model.get_user_features(**batch, last_event_only=True)

    @torch.inference_mode()
    def theirs() -> None:
        other(torch.tensor([ids]), use_cache=False).last_hidden_state[:, -1].numpy()

    run = movielens("full")
    with peer(run, loss="softmax") as rectools:
        found = take_turns(
            pinrec=p50(ours),
            pinrec_recommend=p50(lambda: retriever.search([request], 10)),
            gpt2=p50(theirs),
            rectools=lambda: statistics.median(rectools.ask(do="encode", times=20)["seconds"]),
            rectools_recommend=lambda: statistics.median(rectools.ask(do="recommend", times=1)["seconds"]),
        )
    value = {f"{name}: ms": 1e3 * taken for name, taken in found.items()}
    return value, found["pinrec"] <= min(found["gpt2"], found["rectools"])


def returning(preset: str = "small", times: int = 5) -> tuple[Value, bool]:
    tokenizer = random_tokenizer(10_000, 1_024)
    model, cache = random_model(tokenizer, preset).eval(), HistoryCache(1 << 28)
    (whole,) = random_requests(10_000, 1_000, 1)
    lengths = iter(range(512, 1_000))  # each time one event more

    def request(events: int) -> Value:
        return {**whole, "history": {name: values[:events] for name, values in whole["history"].items()}}

    def back() -> None:
        generate_requests(model, tokenizer, [request(next(lengths))], histories=cache, fingerprint=cache_key)

    cache_key, same = reading_fingerprint(model, tokenizer), request(513)
    found = take_turns(
        returning=p50(back, times),
        recomputed=p50(lambda: generate_requests(model, tokenizer, [same]), times),
        tokenizer=p50(lambda: tokenizer([same["history"]], surface="homefeed", timestamp=same["timestamp"]), 5),
    )
    ratio = found["recomputed"] / found["returning"]
    return {**{f"{name}: ms": 1e3 * taken for name, taken in found.items()}, "ratio": ratio}, ratio >= target(
        "returning"
    )


def returning_base() -> tuple[Value, bool]:
    return returning("base", times=1)


def steps() -> tuple[Value, bool]:
    tokenizer = random_tokenizer(10_000, 256)
    model = random_model(tokenizer).eval()
    requests = random_requests(10_000, 200, 1)
    items = torch.randn(10_000, model.config.embedding_size)
    both = [{**requests[0], "outcome_budget": {"save": 0.5, "click": 0.5}}]
    found = take_turns(
        one=p50(lambda: generate_requests(model, tokenizer, requests), 10),
        many=p50(lambda: generate_requests(model, tokenizer, both, num_steps=6, item_embeddings=items), 10),
    )
    ratio = found["many"] / found["one"]
    value = {"1 x 1: ms": 1e3 * found["one"], "6 x 2: ms": 1e3 * found["many"], "ratio": ratio}
    return value, ratio <= target("steps")


def peak(items: int, ids: str) -> float:
    """GiB that a process of its own needs at most, two training steps long; the catalogue is a file, as ever."""
    with tempfile.TemporaryDirectory() as folder:
        Catalogue.build(np.arange(items)).save(f"{folder}/catalogue.safetensors")
        child = [sys.executable, __file__, "--peak", ids, f"{folder}/catalogue.safetensors"]
        answer = subprocess.run(child, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    return float(answer.stdout.split()[-1])


def print_peak(ids: str, catalogue: str) -> None:
    tokenizer = random_tokenizer(Catalogue.open(catalogue), LENGTH + 1)
    config = hashed(len(tokenizer.catalogue)) if ids == "hashed" else {}
    model = random_model(tokenizer, **config)
    work = Steps(random_batches(tokenizer, 2), model, lambda batch: model(**batch).loss)
    for batch in work.loader:
        work.step(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def memory() -> tuple[Value, bool]:
    """Full tables at 10^7 items need more than a small machine has: a line through two smaller sizes."""
    row = PLAN["rows"]["memory"]
    few, more = row["full_at"]
    low, high = peak(few, "full"), peak(more, "full")
    full = low + (high - low) * (row["items"] - few) / (more - few)
    found = peak(row["items"], "hashed")
    value = {"hashed: GiB": found, f"full at {few}: GiB": low, f"full at {more}: GiB": high,
             "full, extrapolated: GiB": full, "ratio": found / full}  # fmt: skip
    return value, found / full <= target("memory")


def importing() -> tuple[Value, bool]:
    code = "import time; from transformers import PreTrainedModel; s = time.process_time(); import pinrec_hf; "
    code += "print(time.process_time() - s)"

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    taken = take_turns(pinrec_hf=run)["pinrec_hf"]
    return {"seconds": taken}, taken <= target("importing")


ROWS = {
    f.__name__: f
    for f in (
        training_sampled,
        training_full,
        loader,
        step_size,
        encoding,
        returning,
        returning_base,
        steps,
        memory,
        importing,
    )
}


def target(name: str) -> Any:
    return PLAN["rows"][name]["target"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(ROWS), action="append", help="only this one; repeatable")
    parser.add_argument("--again", action="store_true", help="also rows that are measured already")
    parser.add_argument("--peak", nargs=2, metavar=("IDS", "CATALOGUE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print_peak(*args.peak)
        return
    path = RESULTS / "speed.json"
    done = {row["claim"] for row in json.loads(path.read_text())} if path.exists() and not args.again else set()
    measure([name for name in args.row or ROWS if PLAN["rows"][name]["claim"] not in done])


def measure(names: Iterable[str]) -> None:
    """Measures rows and records them; without public data those that need it are skipped, by name."""
    for name in names:
        if name in ("training_sampled", "training_full", "loader", "encoding") and not public_data().is_dir():
            print(f"skipped {name}: no public data in {public_data()}; set PINREC_DATA to the folder that holds it")
            continue
        value, met = ROWS[name]()
        row = {"claim": PLAN["rows"][name]["claim"], "target": target(name), "met": met}
        record("speed", [{**row, "value": {**value, "load": os.getloadavg()[0]}}], [0])


if __name__ == "__main__":
    main()
