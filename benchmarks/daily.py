"""Warm start against retraining on KuaiRand, day by day: benchmarks/results/daily.json, and docs/daily.png.

    make benchmark-daily          # resumable: what is trained already is not trained again

Warm settings are chosen on an earlier day than those that are reported (benchmarks/daily.yaml). Models and prepared
data lie in runs/benchmark/daily/.
"""

import os
import shutil
import sys
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from runs import ENVIRONMENT, RUNS, public_data, read_plan

from pinrec_hf.data.kuairand import load_kuairand
from pinrec_hf.evaluation.prequential import Plan, prequential

PLAN = read_plan("daily")
WORK = RUNS / "daily"


def tables() -> dict[str, Any]:
    """The set as a team has it, two parquet files, of some of its users: arguments of `prepare`."""
    log, items = (WORK / f"{name}.parquet" for name in ("log", "items"))
    if not log.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        rows, table = load_kuairand(public_data() / "kuairand_pure")
        pq.write_table(table, items)
        every = PLAN["one_user_in"]
        users = rows["user_id"]
        drawn = pc.equal(pc.subtract(users, pc.multiply(pc.divide(users, every), every)), 0)
        pq.write_table(rows.filter(drawn), log)
    return {"log": str(log), "items": str(items), "negative_outcomes": ["hate"], "name": "kuairand"}


def run(name: str, cold: dict[str, Any], warm: dict[str, Any], **days: Any) -> list[dict[str, Any]]:
    """Rows of `prequential` in runs/benchmark/daily/<name>."""
    kuairand = read_plan("retrieval")["kuairand"]
    config = {"config_overrides": {**kuairand["config"], **kuairand["architectures"]["pinrec"]}}
    plan = Plan(
        prepare=tables(),
        cold={name: {**PLAN["arguments"], **config, **own} for name, own in cold.items()},
        warm={name: {**PLAN["arguments"], **own} for name, own in warm.items()},
        validation_hours=PLAN["validation_hours"],
        **days,
    )
    return prequential(plan, WORK / name)


def main() -> None:
    if not public_data().is_dir():
        sys.exit(f"skipped: no public data in {public_data()}; set PINREC_DATA to the folder that holds it")
    os.environ.update(ENVIRONMENT)
    choose = dict(PLAN["choose"])
    trials = choose.pop("trials")
    longest = next(iter(PLAN["cold"]))
    (tried,) = run("choose", {longest: PLAN["cold"][longest]}, trials, **choose)
    chosen = max(trials, key=lambda name: tried["models"][name]["recall@50"][0])
    seed = WORK / "report" / tried["day"]
    if not seed.exists():  # trained already: what warm models begin from
        shutil.copytree(WORK / "choose" / tried["day"], seed, ignore=shutil.ignore_patterns(*trials))
    for days in range(1, PLAN["report"]["days"] + 1):
        rows = run("report", PLAN["cold"], {"warm": trials[chosen]}, **{**PLAN["report"], "days": days})
        print(rows[-1])


if __name__ == "__main__":
    main()
