"""What the benchmarks share: trained models that are not trained twice, and rows of claims."""

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pinrec_hf.data.public import prepare_public
from pinrec_hf.evaluation.baselines import ARCHITECTURES
from pinrec_hf.evaluation.evaluate import Comparison, Evaluation, evaluate
from pinrec_hf.evaluation.protocol import Requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.evaluation.report import without_nan
from pinrec_hf.retrieval.pretrained import load_pretrained, weights_hash

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmark"
RESULTS = ROOT / "benchmarks" / "results"
# one thread, and large allocations from the heap: see docs/benchmarks.md
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def read_plan(name: str) -> dict[str, Any]:
    """`benchmarks/<name>.yaml`."""
    plan: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / f"{name}.yaml").read_text())
    return plan


def public_data() -> Path:
    """Where the public sets lie: `PINREC_DATA`, by default ../shared/data."""
    return Path(os.environ.get("PINREC_DATA", ROOT.parent / "shared" / "data"))


def prepared(name: str, folder: str, work: str | None = None, **options: Any) -> Path:
    """A public set's sequences dataset in runs/benchmark/<work>/data, made unless it is there."""
    output = RUNS / (work or name) / "data"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        prepare_public(name, public_data() / folder, output, **options)
    return output


def pretrained(output: Path, architecture: str, plan: Mapping[str, Any], data: Path, trial: Mapping[str, Any],
               seed: int) -> Path:  # fmt: skip
    """`output`, trained by training/pretrain.py unless it is there; a killed run goes on where it was."""
    config = {**plan["config"], **plan["architectures"][architecture], **trial.get("config", {})}
    arguments = {
        "architecture": architecture,
        "config_overrides": json.dumps(config),
        "metric_for_best_model": f"eval_{plan['metric']}",
        **plan["arguments"],
        **trial.get("arguments", {}),
    }
    return run_script("pretrain", output, data, seed, arguments)


def run_script(script: str, output: Path, data: Path, seed: int, arguments: Mapping[str, Any]) -> Path:
    """`output`, as a script of training/ makes it, unless it is there already of the same arguments and base.

    `<output>.benchmark.json` beside it says which commits trained it, and from what weights. Runs that are older than
    such files have none, and are taken as they are.
    """
    given = {"data": data, "output_dir": output, "seed": seed, "disable_tqdm": True, "use_cpu": True, **arguments}
    begun = output.with_name(f"{output.name}.training")
    known = training_of(output) if output.exists() or begun.exists() else {}
    base = weights_hash(given["model"]) if "model" in given else None
    if known.get("base", base) != base:
        found = output if output.exists() else begun
        sys.exit(f"{found} was trained from other weights than {given['model']} holds: remove it to train it again")
    if output.exists():
        words = shlex.split(json.loads((output / "training.json").read_text())["command"])[3:]
        recorded = dict(zip(words[::2], words[1::2], strict=True))
        wanted = {f"--{key}": str(value) for key, value in given.items()}
        paths = {"--data", "--output_dir", "--model"}  # a folder of runs may be moved
        if changed := sorted({key for key, _ in recorded.items() ^ wanted.items()} - paths):
            sys.exit(f"{output} was trained with other arguments ({', '.join(changed)}): remove it to train it again")
        return output
    given["resume"] = begun.exists()
    if known or not begun.exists():  # before the work: a killed run may go on by other code
        commits = list(dict.fromkeys([*known.get("commits", ()), commit()]))
        write_json(training_record(output), {"commits": commits, "base": base})
    command = [sys.executable, str(ROOT / "training" / f"{script}.py")]
    command += [text for key, value in given.items() for text in (f"--{key}", str(value))]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
    return output


def training_record(model: Path) -> Path:
    return model.with_name(f"{model.name}.benchmark.json")


def training_of(model: Path) -> dict[str, Any]:
    """What `run_script` wrote of a model, empty if it was trained before that was written."""
    path = training_record(model)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known


def trained_commit(models: Sequence[Path]) -> str:
    """The commits of the code that trained them, `unknown` among them if one was trained before that was kept."""
    return ", ".join(sorted({name for model in models for name in training_of(model).get("commits", ["unknown"])}))


def fingerprint(*parts: bytes) -> str:
    """12 hex digits, others where any part differs: for names of folders that are made once."""
    return hashlib.blake2b(b"".join(parts), digest_size=6).hexdigest()


def measured(folder: Path, requests: Requests, architecture: str, **ranking: Any) -> Evaluation:
    """A trained model on requests, ranked by one embedding."""
    model, tokenizer = load_pretrained(folder, model_class=ARCHITECTURES[architecture][1])
    ranker = ModelRanker(model, tokenizer, **ranking)
    return evaluate(ranker, requests, tokenizer.catalogue, name=architecture, progress=False)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(without_nan(value), indent=1, default=str) + "\n")
    os.replace(temporary, path)


def commit() -> str:
    """Of the code that runs, `-dirty` where it differs from the commit."""
    code = ("pinrec_hf", "modeling", "training", "benchmarks", ":!benchmarks/results")
    head, changes = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", *code))
    )
    return head + "-dirty" * bool(changes)


def record(results: str, rows: list[dict[str, Any]], seeds: list[int], models: Sequence[Path] = ()) -> None:
    """Puts rows into benchmarks/results/<results>.json, in the place of those that make the same claim.

    `commit` is that of the code that measures; `trained_commit` that of the code that trained `models`, if any.
    A row may bring its own `commit`, where its figures were measured before. One without a target has `met` None.
    """
    path = RESULTS / f"{results}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    packages = ("torch", "transformers", "datasets", "accelerate", "peft", "faiss-cpu", "duckdb")
    about = {
        "command": "python " + " ".join([os.path.relpath(os.path.realpath(sys.argv[0]), ROOT), *sys.argv[1:]]),
        "seed": seeds,
        "commit": commit(),
        **({"trained_commit": trained_commit(models)} if models else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    new = [{**about, **row} for row in rows]
    claims = {row["claim"] for row in new}
    write_json(path, [row for row in old if row["claim"] not in claims] + new)
    for row in new:
        how = {True: "met", False: "missed", None: "measured"}[row["met"]]
        print(how, row["claim"], row["target"], json.dumps(row["value"]))


def gain(comparison: Comparison, metric: str, group: tuple[str, str] | None = None) -> dict[str, Any]:
    """A relative difference in percent, its interval, and the smallest that this data could have shown.

    Args:
        group: kind and name, of all requests by default.
    """
    d = (comparison.metrics if group is None else comparison.groups[group[0]][group[1]])[metric]
    if not d.b:  # a peer that finds nothing has no ratio
        return dict.fromkeys(("percent", "low", "high", "detectable"))
    figures = {"percent": d.relative_percent, "low": d.relative_low, "high": d.relative_high}
    # as much longer or shorter as the relative interval is than the absolute one
    scale = (d.relative_high - d.relative_low) / (d.high - d.low) if d.high > d.low else math.nan
    return {**figures, "detectable": d.minimum_detectable_effect * scale}
