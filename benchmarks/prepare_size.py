"""`pinrec prepare` at size, against DuckDB's own scan and sort of the same rows. `--rows 1e7` for the first alone.

The log is simulated (docs/simulator.md): 10^7 rows; 10^8 are ten copies of it, each with users of its own and one
catalogue. Both write parquet (zstd), with as many threads and as much memory for DuckDB; each runs in a process of its
own. Times are the processor's (user and system, all threads), which leave out what else runs on the cores; the
wall's are recorded beside.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from runs import RUNS, record

from pinrec_hf.data.duckdb_engine import MEMORY_LIMIT
from pinrec_hf.data.output import new_directory
from pinrec_hf.data.simulator.log import simulate

THREADS, COPIES, SEED = 2, 10, 0
WORK = RUNS / "prepare"

PREPARE = """
import os, sys
os.cpu_count = lambda: int(sys.argv[4])
from pinrec_hf.data.prepare import prepare
prepare(sys.argv[1], items=sys.argv[2], negative_outcomes=["hide"], output_dir=sys.argv[3])
"""
SORT = """
import duckdb, sys
log, items, output, threads, memory = sys.argv[1:]
con = duckdb.connect(config={"threads": int(threads), "memory_limit": memory, "temp_directory": output + ".spill"})
con.sql("SET enable_progress_bar = false")
con.sql(f"COPY (SELECT * FROM read_parquet('{log}/*.parquet') ORDER BY user_id, timestamp) "
        f"TO '{output}' (FORMAT parquet, COMPRESSION zstd)")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=["1e7", "1e8"], default=["1e7", "1e8"])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    for rows in args.rows:
        record("scale", [at_size(rows, args.rounds)], [SEED])


def log_of(rows: str) -> tuple[Path, Path]:
    """Folder of the log and file of the items, made unless they are there."""
    world = WORK / "world-1e7"
    if not world.exists():
        simulate(world, size=10_000_000, seed=SEED)
    if rows == "1e7":
        return world / "log", world / "items.parquet"
    copies = WORK / "log-1e8"
    if not copies.exists():
        with new_directory(copies) as folder:
            for copy in range(COPIES):
                for part in sorted((world / "log").glob("*.parquet")):
                    duckdb.sql(
                        f"COPY (SELECT * REPLACE (user_id || '-{copy}' AS user_id) FROM read_parquet('{part}')) "
                        f"TO '{folder}/{copy}-{part.name}' (FORMAT parquet)"
                    )
    return copies, world / "items.parquet"


def measured(script: str, log: Path, items: Path, output: Path) -> dict[str, float]:
    """Seconds and peak memory of a process that runs `script`; what it wrote is removed."""
    start = time.perf_counter()
    words = [log, items, output, THREADS, *([MEMORY_LIMIT] if script is SORT else [])]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"it ended with status {status}")
    wall = time.perf_counter() - start
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink()
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall, "peak_gib": usage.ru_maxrss / 2**20}


def at_size(rows: str, rounds: int) -> dict[str, Any]:
    log, items = log_of(rows)
    found: dict[str, list[dict[str, float]]] = {"prepare": [], "sort": []}
    for _ in range(rounds):
        found["sort"].append(measured(SORT, log, items, WORK / "sorted.parquet"))
        found["prepare"].append(measured(PREPARE, log, items, WORK / "data"))
    value: dict[str, Any] = {
        f"{who}_{name}": float(np.median([run[name] for run in runs]))
        for who, runs in found.items()
        for name in ("cpu_s", "wall_s")
    }
    value["times"] = value["prepare_cpu_s"] / value["sort_cpu_s"]
    value["peak_gib"] = max(run["peak_gib"] for run in found["prepare"])
    value |= {"rounds": rounds, "threads": THREADS, "load": os.getloadavg()[0]}
    return {
        "claim": f"prepare of 10^{rows[2:]} rows, {THREADS} threads, against DuckDB's own scan and sort of them",
        "target": "<= 3 x its time, peak <= 4 GiB",
        "value": value,
        "met": value["times"] <= 3 and value["peak_gib"] <= 4,
    }


if __name__ == "__main__":
    main()
