"""The index at size: 10^6 vectors against faiss flat, 10^7 in memory and time. `--rows 1e6 --kinds ivf` for some of it.

Vectors of 64 dimensions, norms log-normal: `clustered` around 2,000 centres, or `hard`, without any structure. Kinds
are `ivf`, the default at these sizes, and at 10^6 also `hnsw`. The setting is chosen on queries of its own, to reach
the recall also where half of the items pass a filter. One thread, one query at a time; flat and the index take turns,
so that neither finds its vectors in the cache.
Times are the thread's own (CPU), which leave out what else runs on the core; the wall's, which show waiting for the
disk as well, are recorded beside.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from runs import RUNS, record, write_json

from pinrec_hf.retrieval.faiss_index import choose_kind
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.tune import measure_point, tune

DIMENSION, QUERIES, K, SEED = 64, 500, 100, 0
ROUNDS = 5
BLOCK = 250_000
KEYS = {"encoder_fingerprint": "benchmark", "catalogue_fingerprint": "benchmark"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=["1e6", "1e7"], default=["1e6", "1e7"])
    parser.add_argument("--kinds", nargs="+", choices=["ivf", "hnsw"], default=["ivf", "hnsw"], help="of 10^6")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    if "1e6" in args.rows:
        for name in ("clustered", "hard"):
            for kind in args.kinds:
                record("index", [against_flat(name, kind)], [SEED])
    if "1e7" in args.rows:
        record("index", [at_size()], [SEED])


def vectors(name: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, mapped from a file that is made once; queries to tune by, and others to report."""
    centres = np.random.default_rng(SEED).standard_normal((2_000, DIMENSION), dtype=np.float32)

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        noise = rng.standard_normal((n, DIMENSION), dtype=np.float32)
        return noise if name == "hard" else centres[rng.integers(0, len(centres), n)] + 0.5 * noise

    path = RUNS / "index" / f"{name}-{size}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        items = np.lib.format.open_memmap(partial, "w+", np.float32, (size, DIMENSION))
        for start in range(0, size, BLOCK):
            rng = np.random.default_rng([SEED, start])
            block = draw(rng, min(BLOCK, size - start))
            items[start : start + BLOCK] = block * np.exp(0.2 * rng.standard_normal((len(block), 1), dtype=np.float32))
        del items
        partial.replace(path)
    tuning, queries = np.split(draw(np.random.default_rng(SEED + 1), 2 * QUERIES), 2)
    return np.load(path, mmap_mode="r"), tuning, queries


def built(
    items: np.ndarray, tuning: np.ndarray, queries: np.ndarray, folder: Path, kind: str, recall: float
) -> tuple[ItemIndex, dict[str, Any]]:
    """An index, saved and loaded, at the smallest setting that reaches a recall of the tuning queries; its figures on
    the others."""
    building = folder.with_suffix(".json")  # what a killed run built is not built again
    if not building.exists():
        start = time.thread_time()
        ItemIndex.build(items, kind=kind, **KEYS).save(folder)
        write_json(building, {"build_cpu_s": time.thread_time() - start, "build_peak_gib": peak_gib()})
    index = ItemIndex.load(folder, **KEYS)
    frontier = tune(index, tuning, recall, clock=time.thread_time)[1]
    figures = measure_point(index, queries, K, clock=time.thread_time)
    gib = (folder / "index.faiss").stat().st_size / 2**30
    return index, {**figures, **json.loads(building.read_text()), "index_gib": gib, "frontier": frontier}


def peak_gib() -> float:
    """Of this process so far, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def against_flat(name: str, kind: str) -> dict[str, Any]:
    items, tuning, queries = vectors(name, 1_000_000)
    index, figures = built(items, tuning, queries, RUNS / "index" / f"{name}-{kind}", kind, 0.95)
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(items)
    searches = {"flat": flat.search, kind: index.search}
    clocks = {"cpu": time.thread_time, "wall": time.perf_counter}
    medians: dict[str, list[float]] = {f"{who}_{clock}_ms": [] for who in searches for clock in clocks}
    for part in np.array_split(queries, ROUNDS):
        seconds: dict[str, list[float]] = {key: [] for key in medians}
        for query in part:
            for who, search in searches.items():
                starts = {which: clock() for which, clock in clocks.items()}
                search(query[None], K)
                for which, clock in clocks.items():
                    seconds[f"{who}_{which}_ms"].append(clock() - starts[which])
        for key, times in seconds.items():
            medians[key].append(1000 * float(np.median(times)))
    took = {key: float(np.median(times)) for key, times in medians.items()}
    faster = took["flat_cpu_ms"] / took[f"{kind}_cpu_ms"]
    default = choose_kind(len(items), DIMENSION, 8) == kind  # what a user gets, whom the target is for
    return {
        "claim": f"search, 10^6 x 64 {name} vectors, recall@100 >= .95, one thread, against faiss flat: {kind}",
        "target": ">= 10 x faster" if default else "none",
        "value": {"times_faster": faster, **took, **figures},
        "met": faster >= 10 and figures["recall"] >= 0.95 if default else None,
    }


def at_size() -> dict[str, Any]:
    items, tuning, queries = vectors("clustered", 10_000_000)
    index, figures = built(items, tuning, queries, RUNS / "index" / "ten-million", "ivf", 0.9)
    wall = []
    for query in queries:
        start = time.perf_counter()
        index.search(query[None], K)
        wall.append(time.perf_counter() - start)
    figures["wall_p50_ms"] = 1000 * float(np.median(wall))
    peak = max(peak_gib(), figures["build_peak_gib"])
    return {
        "claim": "an index of 10^7 x 64 clustered vectors",
        "target": "built and searched under 8 GiB, recall@100 >= .9, p50 <= 5 ms",
        "value": {"peak_gib": peak, **figures},
        "met": peak < 8 and figures["recall"] >= 0.9 and figures["p50_ms"] <= 5,
    }


if __name__ == "__main__":
    main()
