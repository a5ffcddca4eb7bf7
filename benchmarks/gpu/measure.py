"""`base` on a GPU: a training step, and requests that come at a rate. Skipped, by name, where there is no GPU.

    python benchmarks/gpu/measure.py                  # writes benchmarks/results/gpu.json
    python benchmarks/gpu/measure.py --rehearse       # `tiny` on the CPU for seconds, recorded nowhere: does it run?

Weights are random, since speed does not depend on training. Serving: 1,000 events, 6 steps, 3 outcomes, 80 requests a
second in Poisson arrivals, bf16; those that wait are answered together, by `generate_requests`, as `pinrec serve` does.
A latency is from arrival to embeddings, and the index another machine's, as in the paper (PinRec, arXiv 2504.10507: 40
and 65 ms). Training: rows of 1,000 events, sampled softmax, float32 (TF32 products) against bf16 autocast.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runs import record
from timing import random_model, random_requests, random_tokenizer

from pinrec_hf.data.collator import PretrainingCollator
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT
from pinrec_hf.modeling.tokenization_pinrec import EVENT_COLUMNS, EncodedRow
from pinrec_hf.retrieval.encode import generate_requests

EVENTS, STEPS, OUTCOMES, RATE, AT_ONCE = 1_000, 6, ("save", "click", "closeup"), 80, 16
ROWS, TRAINING_STEPS, SEED = 16, 20, 0
PAPER = {"p50_ms": 40, "p90_ms": 65}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def serving(device: str, preset: str, items: int, events: int, seconds: float) -> dict[str, Any]:
    """Percentiles of latency, in milliseconds, after a warm-up with every size of batch."""
    tokenizer = random_tokenizer(items, events + STEPS, OUTCOMES)
    model = random_model(tokenizer, preset).to(device, torch.bfloat16).eval()
    table = torch.randn(items, model.config.embedding_size, device=device, dtype=torch.bfloat16)
    budget = dict.fromkeys(OUTCOMES, 1 / len(OUTCOMES))
    requests = [{**request, "outcome_budget": budget} for request in random_requests(items, events, 64)]

    def answer(batch: list[dict[str, Any]]) -> None:
        # embeddings come back to the host, so that nothing is left running
        generate_requests(model, tokenizer, batch, num_steps=STEPS, item_embeddings=table, batch_size=AT_ONCE)

    for size in range(1, AT_ONCE + 1):
        answer(requests[:size])
    arrivals = np.random.default_rng(SEED).exponential(1 / RATE, int(RATE * seconds)).cumsum()
    latencies: list[float] = []
    sizes: list[int] = []
    start = time.perf_counter()
    while len(latencies) < len(arrivals):
        first = len(latencies)
        time.sleep(max(0.0, arrivals[first] - (time.perf_counter() - start)))
        waiting = int(np.searchsorted(arrivals, time.perf_counter() - start, side="right")) - first
        sizes.append(min(max(waiting, 1), AT_ONCE))
        answer([requests[(first + i) % len(requests)] for i in range(sizes[-1])])
        done = time.perf_counter() - start
        latencies += (done - arrivals[first : first + sizes[-1]]).tolist()
    p50, p90, p99 = (1e3 * float(np.percentile(latencies, q)) for q in (50, 90, 99))
    batch = statistics.mean(sizes)
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_batch": batch, "requests": len(latencies)}


def training(device: str, preset: str, items: int, events: int, steps: int) -> dict[str, Any]:
    """Sequences a second, forward, backward and fused AdamW, batches made beforehand."""
    tokenizer = random_tokenizer(items, events + 1)
    rng = np.random.default_rng(SEED)
    collator = PretrainingCollator(
        tokenizer, np.full(items + FIRST_ITEM, 1 / items, np.float32), uniform_negatives=1_024 // ROWS
    )
    batches = []
    for number in range(4):
        rows = []
        for user in range(ROWS):
            row: EncodedRow = {name: np.ones(events, kind) for name, kind in EVENT_COLUMNS.items()}
            row["types"] = np.full(events, ITEM_EVENT, np.int8)
            row["items"] = rng.integers(items, size=events) + FIRST_ITEM
            row["outcomes"], row["queries"] = np.full(events, 2), np.zeros(events, np.int64)
            row["features"] = np.zeros(events, np.int64)
            rows.append({**row, "key": np.array([number, user])})
        batches.append({name: value.to(device) for name, value in collator(rows).items()})
    found: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        model = random_model(tokenizer, preset).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(number: int, model: Any = model, optimizer: Any = optimizer, dtype: Any = dtype) -> None:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(**batches[number % len(batches)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for number in range(3):
            step(number)
        synchronise(device)
        start = time.perf_counter()
        for number in range(steps):
            step(number)
        synchronise(device)
        found[f"{name}: sequences/s"] = steps * ROWS / (time.perf_counter() - start)
    return {**found, "ratio": found["bf16: sequences/s"] / found["float32: sequences/s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="`tiny` on the CPU; nothing is recorded")
    if parser.parse_args().rehearse:
        print("rehearsal, serving:", serving("cpu", "tiny", items=1_000, events=50, seconds=2))
        print("rehearsal, training:", training("cpu", "tiny", items=1_000, events=50, steps=2))
        return
    if not torch.cuda.is_available():
        print("skipped serving and training of `base`: torch sees no GPU (--rehearse runs `tiny` on the CPU)")
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    machine = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    served = serving("cuda", "base", items=1_000_000, events=EVENTS, seconds=30)
    record("gpu", [{
        "claim": f"`base`, {EVENTS:,} events, {STEPS} steps, {len(OUTCOMES)} outcomes, {RATE} requests/s: p50 and p90",
        "target": f"below {PAPER['p50_ms']} and {PAPER['p90_ms']} ms",
        "value": {**served, **machine},
        "met": all(served[name] < PAPER[name] for name in PAPER),
    }], [SEED])  # fmt: skip
    trained = training("cuda", "base", items=100_000, events=EVENTS, steps=TRAINING_STEPS)
    record("gpu", [{
        "claim": f"training `base`, {ROWS} rows of {EVENTS:,} events a step: bf16 against float32",
        "target": "none",
        "value": {**trained, **machine},
        "met": None,
    }], [SEED])  # fmt: skip


if __name__ == "__main__":
    main()
