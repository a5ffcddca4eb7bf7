"""The short rows of what has been measured, once more: none may have become worse.

    make benchmark-short          # some ten minutes; exit code 1, and which row, where one is worse

Models are trained anew, in a folder of this run's own, for as many steps as before. A figure is worse where it falls
below the interval that benchmarks/results/ holds of it on validation; a time, where it has grown by a half against what
it was measured beside, since machines differ and have other work.
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
    """Amazon Beauty, as many steps as its row of two minutes took: how many a machine makes of a minute is its own."""
    plan = public_sets.PLAN["beauty"]
    claim = f"{plan['title']}: recall@10 after {plan['quick']['minutes']} minutes of training on one core"
    before = rows_of(COMMITTED, "public")[claim]["value"]
    public = public_sets.PUBLIC_SETS["beauty"]
    log, items = public.load(runs.public_data() / plan["folder"])
    data = public_sets.prepared("beauty", log, items, name="beauty", license=public.license)
    arguments = {**plan["arguments"], "max_steps": before["steps"]}
    found = public_sets.run("beauty", data, {**plan, "arguments": arguments}, 0, None, "hidden")
    low, now = (value["validation, seen removed"] for value in (before, found))
    if now["recall@10"] < low["low"]:
        yield f"{claim}: {now['recall@10']:.4f} on validation after as many steps, below {low['low']:.4f}"


def worse_times() -> Iterator[str]:
    before, now = rows_of(COMMITTED, "speed"), rows_of(runs.RESULTS, "speed")
    for name, cost in SPEED.items():
        claim = speed.PLAN["rows"][name]["claim"]
        if claim in now and (grown := cost(now[claim]["value"]) / cost(before[claim]["value"])) > GROWN:
            yield f"{claim}: {grown:.2f} times what it was, {json.dumps(now[claim]['value'])}"


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    worse: list[str] = []
    if runs.public_data().is_dir():
        worse += worse_figures()
    else:
        print(f"skipped Amazon Beauty: no public data in {runs.public_data()}; set PINREC_DATA")
    torch.set_num_threads(1)
    speed.measure(SPEED)
    worse += worse_times()
    if worse:
        sys.exit("worse than what was measured before:\n" + "\n".join(worse))
    print("nothing is worse than what was measured before")


if __name__ == "__main__":
    main()
