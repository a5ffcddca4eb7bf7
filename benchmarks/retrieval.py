"""The figures of docs/benchmarks.md: benchmarks/results/retrieval.json, a row a claim.

    make benchmark-retrieval                              # everything; what is done already is not run again
    python benchmarks/retrieval.py --row kuairand         # one data set
    python benchmarks/retrieval.py --row memory           # peak memory on 10^7 simulated rows; needs no public data

Models and prepared data lie in runs/benchmark/; a killed run goes on where it was. What a trial gave on validation is
kept in benchmarks/results/<set>-trials.json: it is not trained again unless its plan changed.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from runs import (
    ENVIRONMENT,
    RESULTS,
    ROOT,
    RUNS,
    gain,
    measured,
    prepared,
    pretrained,
    public_data,
    read_plan,
    write_json,
)
from runs import record as record_rows

from pinrec_hf.data.dataset_folder import build_tokenizer
from pinrec_hf.evaluation.evaluate import Evaluation, compare
from pinrec_hf.evaluation.popularity import best_popularity
from pinrec_hf.evaluation.protocol import load_requests

PLAN = read_plan("retrieval")


def run_dataset(name: str) -> dict[str, Any]:
    """Tries, chooses on validation, trains the seeds, reads test once; returns the evaluations by system."""
    plan = PLAN[name]
    data = prepared(name, plan["folder"])

    def train(architecture: str, trial: dict[str, Any], seed: int) -> Path:
        return pretrained(RUNS / name / f"{architecture}-{trial['name']}-{seed}", architecture, plan, data, trial, seed)

    hide_time = plan["arguments"].get("time_dropout", 0) >= 1
    catalogue = build_tokenizer(data, model_max_length=plan["config"]["max_position_embeddings"]).catalogue
    requests = {split: load_requests(data, split, catalogue) for split in ("validation", "test")}
    systems: dict[str, list[Evaluation]] = {}
    models: list[Path] = []
    path = RESULTS / f"{name}-trials.json"
    trials = json.loads(path.read_text())["trials"] if path.exists() else []
    for architecture, own in plan["architectures"].items():
        tried = []
        for trial in plan["trials"]:
            about = {
                "architecture": architecture,
                "trial": trial,
                "arguments": plan["arguments"],
                "config": {**plan["config"], **own},
            }
            known = [t for t in trials if all(t.get(key) == value for key, value in about.items())]
            if not known:
                folder = train(architecture, trial, plan["seeds"][0])
                result = measured(folder, requests["validation"], architecture, hide_time=hide_time)
                state = json.loads((folder / "trainer_state.json").read_text())
                validation = {metric: m.value for metric, m in result.metrics.items()}
                known = [{**about, "steps": state["global_step"], "validation": validation}]
                trials = [t for t in trials if (t["architecture"], t["trial"]["name"]) != (architecture, trial["name"])]
                trials += known
                write_json(path, {"trials": trials})
            tried += known
        chosen = max(tried, key=lambda t: t["validation"][plan["metric"]])["trial"]
        folders = [train(architecture, chosen, seed) for seed in plan["seeds"]]
        models += folders
        systems[architecture] = [measured(f, requests["test"], architecture, hide_time=hide_time) for f in folders]
        curves = {f.name: json.loads((f / "trainer_state.json").read_text())["log_history"] for f in folders}
        write_json(RESULTS / f"{name}-{architecture}-curves.json", {"trial": chosen, "log_history": curves})
    return {"systems": systems, "models": models, "requests": requests["test"], "catalogue": catalogue, "data": data}


def record(rows: list[dict[str, Any]], seeds: list[int], models: Sequence[Path] = ()) -> None:
    record_rows("retrieval", rows, seeds, models)


def kuairand() -> None:
    run = run_dataset("kuairand")
    systems, seeds = run["systems"], PLAN["kuairand"]["seeds"]
    popularity, frozen = (
        best_popularity(
            prepared("kuairand", PLAN["kuairand"]["folder"]),
            run["catalogue"],
            requests=run["requests"],
            rolling=rolling,
        ).evaluation
        for rolling in (None, False)
    )
    means = {
        name: {m: sum(e.metrics[m].value for e in runs) / len(runs) for m in ("recall@10", "recall@50", "ndcg@10")}
        for name, runs in {**systems, "popularity": [popularity], "frozen popularity": [frozen]}.items()
    }
    coverage = [evaluation.coverage["coverage@10"] for evaluation in systems["pinrec"]]
    rows = []
    for peer, runs, targets in (
        ("decayed popularity", [popularity], {"recall@50": 70, "recall@10": 55}),
        ("decayed popularity frozen at the cut", [frozen], {"recall@50": 70, "recall@10": 55}),
        ("SASRec", systems["sasrec"], {"recall@10": 25, "recall@50": 15}),
        ("two-tower", systems["two_tower"], {"recall@50": 3}),
    ):
        comparison = compare(systems["pinrec"], runs)
        for metric, target in targets.items():
            found = gain(comparison, metric)
            rows.append(
                {
                    "claim": f"KuaiRand test: PinRec against {peer}, {metric}",
                    "target": f">= +{target} %, interval above 0",
                    "value": {**found, "means": {n: m[metric] for n, m in means.items()}},
                    "met": found["percent"] >= target and found["low"] > 0,
                }
            )
    rows.append(
        {
            "claim": "KuaiRand test: distinct items in all top-10 lists",
            "target": ">= 1500 of 7583",
            "value": coverage,
            "met": min(coverage) >= 1500,
        }
    )
    record(rows, seeds, run["models"])


def ml1m() -> None:
    run = run_dataset("ml1m")
    systems, seeds = run["systems"], PLAN["ml1m"]["seeds"]
    found = gain(compare(systems["pinrec"], systems["two_tower"]), "recall@10")
    minutes = PLAN["ml1m"]["arguments"]["max_minutes"]  # of one core's time: a clock that other work does not move
    means = {name: {m: runs[0].metrics[m].value for m in ("recall@10", "ndcg@10")} for name, runs in systems.items()}
    record(
        [
            {
                "claim": "ML-1M leave-one-out: PinRec against pooled two-tower, recall@10",
                "target": ">= +30 %, interval above 0",
                "value": {**found, "means": means},
                "met": found["percent"] >= 30 and found["low"] > 0,
            },
            {
                "claim": "ML-1M leave-one-out, seen items removed, target's time hidden: recall@10 after 10 minutes",
                "target": ">= .315 in <= 10 minutes of one core",
                "value": {**means["pinrec"], "minutes": minutes},
                "met": means["pinrec"]["recall@10"] >= 0.315 and minutes <= 10,
            },
        ],
        seeds,
        run["models"],
    )


def memory() -> None:
    """Simulates, prepares and pretrains on a log of 10^7 rows; none of it stays."""
    plan = PLAN["memory"]
    RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        log, data = f"{folder}/log", f"{folder}/data"
        cli = [sys.executable, "-m", "pinrec_hf"]
        tables = ["--log", f"{log}/log", "--items", f"{log}/items.parquet", "--queries", f"{log}/queries.parquet"]
        commands = {
            "simulate": [*cli, "simulate", "--size", str(plan["rows"]), "--output-dir", log],
            "prepare": [*cli, "prepare", *tables, "--negative-outcome", "hide", "--output-dir", data],
            "pretrain": [sys.executable, str(ROOT / "training" / "pretrain.py"), "--data", data]
            + ["--output_dir", f"{folder}/model", "--disable_tqdm", "True", "--use_cpu", "True"]
            + [text for key, value in plan["arguments"].items() for text in (f"--{key}", str(value))],
        }
        # what is encoded goes with the folder
        value = {name: run_measured(command, {"HF_HOME": f"{folder}/cache"}) for name, command in commands.items()}
    record(
        [
            {
                "claim": "Pretraining's peak memory on a 10^7-row simulated log",
                "target": "<= 4 GiB",
                "value": value,
                "met": value["pretrain"]["peak_gib"] <= 4,
            }
        ],
        [0],
    )


def run_measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Runs a command; its seconds, and the most memory (GiB) that its processes held together, read every 50 ms."""
    print("$", " ".join(command), flush=True)
    start, peak = time.time(), 0
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, **environment})
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one ended while they were counted
            peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": round(time.time() - start, 1), "peak_gib": round(peak / 2**30, 3)}


ROWS = {"kuairand": kuairand, "ml1m": ml1m, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row",
        choices=sorted(ROWS),
        action="append",
        help="only this data set, or the measurement of memory; repeatable",
    )
    args = parser.parse_args()
    if args.row != ["memory"] and not public_data().is_dir():
        sys.exit(f"skipped: no public data in {public_data()}; set PINREC_DATA to the folder that holds it")
    start = time.time()
    for name in args.row or ROWS:
        ROWS[name]()
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
