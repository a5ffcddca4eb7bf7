"""The figures of docs/benchmarks.md: from the raw files to benchmarks/results/retrieval.json, a row a claim.

    make benchmark-retrieval                              # everything; what is done already is not run again
    python benchmarks/retrieval.py --row kuairand         # one data set
    python benchmarks/retrieval.py --row memory           # peak memory on 10^7 simulated rows; needs no public data

Models, trials and prepared data lie in runs/benchmark/; a killed run goes on where it was.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from pinrec_hf.data.public import prepare_public
from pinrec_hf.evaluation.baselines import ARCHITECTURES
from pinrec_hf.evaluation.evaluate import Comparison, Evaluation, compare, evaluate
from pinrec_hf.evaluation.popularity import best_popularity
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.retrieval.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmark"
RESULTS = ROOT / "benchmarks" / "results"
PLAN: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / "retrieval.yaml").read_text())
# one thread, and large allocations from the heap: see docs/benchmarks.md
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def public_data() -> Path:
    """Where the public sets lie: `PINREC_DATA`, by default ../shared/data."""
    return Path(os.environ.get("PINREC_DATA", ROOT.parent / "shared" / "data"))


def prepared(name: str) -> Path:
    folder = RUNS / name / "data"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        prepare_public(name, public_data() / PLAN[name]["folder"], folder)
    return folder


def train(name: str, architecture: str, trial: dict[str, Any], seed: int) -> Path:
    """Trains one model unless that has been done; returns its folder."""
    plan = PLAN[name]
    output = RUNS / name / f"{architecture}-{trial['name']}-{seed}"
    if output.exists():
        return output
    config = {**plan["config"], **plan["architectures"][architecture], **trial.get("config", {})}
    arguments = {
        "data": prepared(name),
        "architecture": architecture,
        "output_dir": output,
        "seed": seed,
        "config_overrides": json.dumps(config),
        "metric_for_best_model": f"eval_{plan['metric']}",
        "disable_tqdm": True,
        "use_cpu": True,
        **plan["arguments"],
        **trial.get("arguments", {}),
        "resume": output.with_name(output.name + ".training").exists(),
    }
    command = [sys.executable, str(ROOT / "training" / "pretrain.py")]
    command += [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
    return output


def measured(folder: Path, requests: Requests, name: str, hide_time: bool) -> Evaluation:
    model, tokenizer = load_pretrained(folder, model_class=ARCHITECTURES[name][1])
    ranker = ModelRanker(model, tokenizer, hide_time=hide_time)
    return evaluate(ranker, requests, tokenizer.catalogue, name=name, progress=False)


def run_dataset(name: str) -> dict[str, Any]:
    """Tries, chooses on validation, trains the seeds, reads test once; returns the evaluations by system."""
    plan = PLAN[name]
    hide_time = plan["arguments"].get("time_dropout", 0) >= 1
    tokenizer = None
    systems: dict[str, list[Evaluation]] = {}
    trials = []
    requests: dict[str, Requests] = {}
    for architecture in plan["architectures"]:
        best: tuple[float, dict[str, Any]] | None = None
        for trial in plan["trials"]:
            folder = train(name, architecture, trial, plan["seeds"][0])
            if tokenizer is None:
                tokenizer = load_pretrained(folder, model_class=ARCHITECTURES[architecture][1])[1]
                requests = {s: load_requests(prepared(name), s, tokenizer.catalogue) for s in ("validation", "test")}
            result = measured(folder, requests["validation"], architecture, hide_time)
            state = json.loads((folder / "trainer_state.json").read_text())
            value = result.metrics[plan["metric"]].value
            trials.append(
                {"architecture": architecture, "trial": trial, "steps": state["global_step"],
                 "validation": {k: m.value for k, m in result.metrics.items()}}
            )  # fmt: skip
            if best is None or value > best[0]:
                best = (value, trial)
        assert best is not None  # a plan has trials
        chosen = best[1]
        folders = [train(name, architecture, chosen, seed) for seed in plan["seeds"]]
        systems[architecture] = [measured(f, requests["test"], architecture, hide_time) for f in folders]
        curves = {f.name: json.loads((f / "trainer_state.json").read_text())["log_history"] for f in folders}
        write_json(RESULTS / f"{name}-{architecture}-curves.json", {"trial": chosen, "log_history": curves})
    write_json(RESULTS / f"{name}-trials.json", {"trials": trials})
    return {"systems": systems, "requests": requests["test"], "catalogue": tokenizer.catalogue}  # type: ignore[union-attr]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)


def record(rows: list[dict[str, Any]], seeds: list[int]) -> None:
    """Puts rows into retrieval.json, in the place of those that make the same claim."""
    path = RESULTS / "retrieval.json"
    old = json.loads(path.read_text()) if path.exists() else []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = ("torch", "transformers", "datasets", "accelerate", "faiss-cpu", "duckdb")
    about = {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "seed": seeds,
        "commit": commit.strip(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    new = [{**row, **about} for row in rows]
    claims = {row["claim"] for row in new}
    write_json(path, [row for row in old if row["claim"] not in claims] + new)
    for row in new:
        print(("met   " if row["met"] else "missed"), row["claim"], row["target"], json.dumps(row["value"]))


def gain(comparison: Comparison, metric: str) -> dict[str, Any]:
    """A relative difference in percent, its interval, and the smallest that this data could have shown."""
    d = comparison.metrics[metric]
    figures = {"percent": d.relative_percent, "low": d.relative_low, "high": d.relative_high}
    return {**figures, "detectable": 100 * d.minimum_detectable_effect / d.b}


def kuairand() -> None:
    run = run_dataset("kuairand")
    systems, seeds = run["systems"], PLAN["kuairand"]["seeds"]
    popularity, frozen = (
        best_popularity(prepared("kuairand"), run["catalogue"], requests=run["requests"], rolling=rolling).evaluation
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
    record(rows, seeds)


def ml1m() -> None:
    run = run_dataset("ml1m")
    systems, seeds = run["systems"], PLAN["ml1m"]["seeds"]
    found = gain(compare(systems["pinrec"], systems["two_tower"]), "recall@10")
    chosen = json.loads((RESULTS / "ml1m-pinrec-curves.json").read_text())
    seconds = max(log[-1]["train_runtime"] for log in chosen["log_history"].values())
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
                "target": ">= .315 in <= 600 s on one core",
                "value": {**means["pinrec"], "train_seconds": seconds},
                "met": means["pinrec"]["recall@10"] >= 0.315 and seconds <= 600,
            },
        ],
        seeds,
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
