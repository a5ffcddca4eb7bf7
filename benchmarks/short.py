"""The short rows of what has been measured, once more: none may have become worse.

    make benchmark-short          # some ten minutes; exit code 1, and which row, where one is worse

Models are trained anew, in a folder of this run's own. A figure is worse where it falls below the interval that
benchmarks/results/ holds of it; a ratio or a time, which has none and depends on what else the machine does, where it
met its target and no longer does.
"""

import json
import shutil
import sys
from typing import Any

import runs

COMMITTED = runs.RESULTS
WORK = runs.RUNS / "short"
runs.RUNS, runs.RESULTS = WORK, WORK / "results"  # before the benchmarks read them

import public_sets  # noqa: E402
import speed  # noqa: E402
import torch  # noqa: E402

SPEED = ("importing", "encoding", "steps", "returning", "training_sampled", "loader")


def rows_of(folder: Any, results: str) -> dict[str, dict[str, Any]]:
    path = folder / f"{results}.json"
    return {row["claim"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def worse(results: str) -> list[str]:
    """Why each row that was measured now is worse than the committed one, if it is."""
    before, found = rows_of(COMMITTED, results), []
    for claim, row in rows_of(runs.RESULTS, results).items():
        figure = row["value"].get("test, seen removed")
        if claim not in before:
            found.append(f"{claim}: {results}.json holds no such row")
        elif figure is not None:
            low = before[claim]["value"]["test, seen removed"]["low"]
            if figure["recall@10"] < low:
                found.append(f"{claim}: {figure['recall@10']:.4f}, below {low:.4f}")
        elif before[claim]["met"] and not row["met"]:
            found.append(f"{claim}: {row['target']} is no longer met by {json.dumps(row['value'])}")
    return found


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    if runs.public_data().is_dir():
        public_sets.row("beauty", public_sets.PLAN["beauty"]["quick"]["minutes"], ["hidden"])
    else:
        print(f"skipped Amazon Beauty: no public data in {runs.public_data()}; set PINREC_DATA")
    torch.set_num_threads(1)
    speed.measure(SPEED)
    if found := [*worse("public"), *worse("speed")]:
        sys.exit("worse than what was measured before:\n" + "\n".join(found))
    print("nothing is worse than what was measured before")


if __name__ == "__main__":
    main()
