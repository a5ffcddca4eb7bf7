"""The short rows of what has been measured, once more: none may have become worse.

    make benchmark-short          # some ten minutes; exit code 1, and which row, where one is worse

Models are trained anew, in a folder of this run's own. A figure is worse where it falls below the interval that
benchmarks/results/ holds of it on validation; a time, where it has grown by a half against what it was measured beside,
since machines differ and have other work.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import runs

COMMITTED = runs.RESULTS
WORK = runs.RUNS / "short"
runs.RUNS, runs.RESULTS = WORK, WORK / "results"  # before the benchmarks read them

import public_sets  # noqa: E402
import speed  # noqa: E402
import torch  # noqa: E402

SPEED: dict[str, Callable[[dict[str, float]], float]] = {
    "importing": lambda value: value["seconds"],
    "encoding": lambda value: value["pinrec: ms"] / value["gpt2: ms"],
    "steps": lambda value: value["ratio"],
    "returning": lambda value: 1 / value["ratio"],
    "training_sampled": lambda value: 1 / value["ratio"],
    "loader": lambda value: 1 / value["ratio"],
}
"""Rows of speed.json, and what of each must not grow."""
GROWN = 1.5


def rows_of(folder: Any, results: str) -> dict[str, dict[str, Any]]:
    path = folder / f"{results}.json"
    return {row["claim"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def worse_figures() -> Iterator[str]:
    before = rows_of(COMMITTED, "public")
    for claim, row in rows_of(runs.RESULTS, "public").items():
        low, now = (rows[claim]["value"]["validation, seen removed"] for rows in (before, {claim: row}))
        if now["recall@10"] < low["low"]:
            yield f"{claim}: {now['recall@10']:.4f} on validation, below {low['low']:.4f}"


def worse_times() -> Iterator[str]:
    before, now = rows_of(COMMITTED, "speed"), rows_of(runs.RESULTS, "speed")
    for name, cost in SPEED.items():
        claim = speed.PLAN["rows"][name]["claim"]
        if claim in now and (grown := cost(now[claim]["value"]) / cost(before[claim]["value"])) > GROWN:
            yield f"{claim}: {grown:.2f} times what it was, {json.dumps(now[claim]['value'])}"


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    if runs.public_data().is_dir():
        public_sets.row("beauty", public_sets.PLAN["beauty"]["quick"]["minutes"], ["hidden"])
    else:
        print(f"skipped Amazon Beauty: no public data in {runs.public_data()}; set PINREC_DATA")
    torch.set_num_threads(1)
    speed.measure(SPEED)
    if found := [*worse_figures(), *worse_times()]:
        sys.exit("worse than what was measured before:\n" + "\n".join(found))
    print("nothing is worse than what was measured before")


if __name__ == "__main__":
    main()
