"""Warm start against retraining on KuaiRand, day by day: benchmarks/results/daily.json, and docs/daily.png.

    make benchmark-daily          # resumable: what is trained already is not trained again

Warm settings are chosen on an earlier day than those that are reported (benchmarks/daily.yaml). Models and prepared
data lie in runs/benchmark/daily/.
"""

import os
import shutil
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from runs import ENVIRONMENT, ROOT, RUNS, public_data, read_plan, record

from pinrec_hf.data.kuairand import load_kuairand
from pinrec_hf.evaluation.plots import plot_days
from pinrec_hf.evaluation.prequential import Plan, prequential

PLAN = read_plan("daily")
BEIJING = timezone(timedelta(hours=8))
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


def mean_difference(rows: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Recall@50 minus the longest cold model's, over all days' targets, with 95 % limits, days taken as independent."""
    share = np.array([row["targets"] for row in rows]) / sum(row["targets"] for row in rows)
    value, low, high = np.array([row["minus_first"][name]["recall@50"] for row in rows]).T
    mean, half = float(share @ value), float(np.sqrt(np.square(share * (high - low) / 2).sum()))
    return mean, mean - half, mean + half


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Warm training as a share of the cold one that reaches the same recall@50, by its time and by its steps.

    Between measured lengths a cold model's recall is taken to rise by straight lines. Where the warm one is better than
    the longest, or worse than the shortest, its share of that one is given, and `beyond` says so.
    """
    longest, *shorter = PLAN["cold"]
    differences = {name: mean_difference(rows, name) for name in (*shorter, "warm")}
    effort = {
        what: {name: sum(row["models"][name][what] for row in rows) / len(rows) for name in (longest, *shorter, "warm")}
        for what in ("train_cpu_seconds", "steps", "cpu_seconds")
    }
    recall = [*(differences[name][0] for name in reversed(shorter)), 0.0]
    shares = {
        what: [
            used["warm"] / float(np.interp(d, recall, [used[name] for name in (*reversed(shorter), longest)]))
            for d in differences["warm"]
        ]
        for what, used in effort.items()
    }
    warm = differences["warm"][0]
    return {
        "share": {what: {"value": v, "low": min(a, b), "high": max(a, b)} for what, (v, a, b) in shares.items()},
        "beyond": "longest" if warm > 0 else "shortest" if warm < recall[0] else None,
        "minus_longest": differences,
        **effort,
        "days": [{"day": row["day"], **{n: m["recall@50"] for n, m in row["models"].items()}} for row in rows],
    }


def main() -> None:
    if not public_data().is_dir():
        sys.exit(f"skipped: no public data in {public_data()}; set PINREC_DATA to the folder that holds it")
    os.environ.update(ENVIRONMENT)
    choose, report = dict(PLAN["choose"]), PLAN["report"]
    trials = choose.pop("trials")
    longest = next(iter(PLAN["cold"]))
    (tried,) = run("choose", {longest: PLAN["cold"][longest]}, trials, **choose)
    chosen = max(trials, key=lambda name: tried["models"][name]["recall@50"][0])
    seed = WORK / "report" / tried["day"]
    if not seed.exists():  # trained already: what warm models begin from
        shutil.copytree(WORK / "choose" / tried["day"], seed, ignore=shutil.ignore_patterns(*trials))
    for days in range(1, report["days"] + 1):
        rows = run("report", PLAN["cold"], {"warm": trials[chosen]}, **{**report, "days": days})
        found = {**figures(rows), "chosen": chosen, "tried": tried["models"]}
        share = max(found["share"][what]["high"] for what in ("train_cpu_seconds", "steps"))
        row = {
            "claim": "KuaiRand, day by day: warm training for equal recall@50 on the next day, against cold",
            "target": "<= 1/3 of the time, the interval included",
            "value": found,
            "met": found["beyond"] != "shortest" and share <= 1 / 3,
        }
        record("daily", [row], [0])
        named = [{**row, "day": f"{datetime.fromtimestamp(row['test_start'], BEIJING):%-d %B}"} for row in rows]
        plot_days(named, "train_cpu_seconds").savefig(ROOT / "docs" / "daily.png", dpi=120)


if __name__ == "__main__":
    main()
