"""The figures of docs/ablations.md: surfaces, outcomes, steps; benchmarks/results/surfaces.json, a row a claim.

    make benchmark-surfaces                             # everything; what is done already is not run again
    python benchmarks/surfaces.py --row worlds          # or another of ROWS

Models lie in runs/benchmark/, the figures of each world in benchmarks/results/worlds.json; a killed run goes on where
it was.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ablations import write_ablations
from apart import OwnHistory, one_surface
from mixed import mixed_rows
from runs import (
    RESULTS,
    ROOT,
    RUNS,
    gain,
    measured,
    prepared,
    pretrained,
    public_data,
    read_plan,
    record,
    run_script,
)
from world_rows import NO_WORSE, row, world_rows
from worlds import Asking, BySurface, Slots, World, run_world, step_spread

from pinrec_hf.evaluation.evaluate import Evaluation, compare, evaluate
from pinrec_hf.evaluation.frontier import MMRRanker, measure_frontier
from pinrec_hf.evaluation.plots import plot_frontier
from pinrec_hf.evaluation.protocol import Requests, load_requests, only_surfaces
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.retrieval.pretrained import load_pretrained, weights_hash
from pinrec_hf.retrieval.retriever import PinRecRetriever

PLAN, RETRIEVAL = read_plan("surfaces"), read_plan("retrieval")


def chosen_models(name: str, seeds: Sequence[int]) -> list[Path]:
    """PinRec of benchmarks/retrieval.py's chosen trial, with every seed."""
    plan = RETRIEVAL[name]
    trial = json.loads((RESULTS / f"{name}-pinrec-curves.json").read_text())["trial"]
    data = prepared(name, plan["folder"])
    return [
        pretrained(RUNS / name / f"pinrec-{trial['name']}-{seed}", "pinrec", plan, data, trial, seed) for seed in seeds
    ]


# -- KuaiRand: conditions, a model a surface, finetuning ------------------------------------------------------------


def kuairand() -> None:
    """Without a condition; a model a surface. Each row is recorded as soon as it is known."""
    plan, seeds = PLAN["kuairand"], PLAN["kuairand"]["seeds"]
    models = chosen_models("kuairand", seeds)
    data = prepared("kuairand", RETRIEVAL["kuairand"]["folder"])
    requests = load_requests(data, "test", load_pretrained(models[0])[1].catalogue)
    base = [measured(folder, requests, "pinrec") for folder in models]
    trial = json.loads((RESULTS / "kuairand-pinrec-curves.json").read_text())["trial"]
    for signal, signals in plan["without"].items():
        without = {"name": f"no-{signal}", **trial, "config": {**trial.get("config", {}), "signals": signals}}
        folders = [
            pretrained(
                RUNS / "kuairand" / f"pinrec-no-{signal}-{seed}", "pinrec", RETRIEVAL["kuairand"], data, without, seed
            )
            for seed in seeds
        ]
        comparison = compare([measured(folder, requests, "pinrec") for folder in folders], base)
        value = {metric: gain(comparison, metric) for metric in ("recall@10", "recall@50")}
        found, most = value["recall@10"], {"surface": -12}.get(signal, 0)
        target = f"R@10 <= {most} %, interval below 0"
        met = found["percent"] <= most and found["high"] < 0
        claim = f"KuaiRand: {signal} condition and input removed"
        record("surfaces", [row(claim, target, value, met)], seeds, [*models, *folders])
    alone = [one_surface_models(data, trial, seed) for seed in seeds]
    apart = [folder for by_surface in alone for folder in by_surface.values()]
    record("surfaces", [apart_row(models, alone, requests)], seeds, [*models, *apart])


def finetuning() -> None:
    """KuaiRand finetuned per surface, whole or by LoRA, with impression negatives or without; recorded seed by seed."""
    plan, seeds = PLAN["kuairand"], PLAN["kuairand"]["seeds"]
    models = chosen_models("kuairand", seeds)
    data = prepared("kuairand", RETRIEVAL["kuairand"]["folder"])
    requests = load_requests(data, "test", load_pretrained(models[0])[1].catalogue)
    sampled = [with_sampled_softmax(folder) for folder in models]  # under the full one impressions say nothing
    base: list[Evaluation] = []
    used: list[Path] = []
    runs: dict[tuple[str, bool], list[Evaluation]] = {(v, n): [] for v in plan["finetune"] for n in (True, False)}
    for seed, pretrained_folder, folder in zip(seeds, models, sampled, strict=True):
        base.append(measured(pretrained_folder, requests, "pinrec"))
        used.append(pretrained_folder)
        for (variant, negatives), found in runs.items():
            own = finetuned_models(folder, data, variant, negatives, seed)
            found.append(finetuned(folder, own, requests, variant))
            used += own.values()
        record("surfaces", finetuning_rows(base, runs), seeds[: len(base)], used)
        write_ablations()


def finetuning_rows(base: Sequence[Evaluation], runs: Mapping[tuple[str, bool], Sequence[Evaluation]]) -> list[Any]:
    names = {"full": "full", "adapters": "LoRA"}
    rows = []
    for (variant, negatives), found in runs.items():
        comparison = compare(found, base)
        pooled = {metric: gain(comparison, metric) for metric in ("recall@10", "recall@50")}
        known = [surface for surface in PLAN["kuairand"]["surfaces"] if surface in comparison.groups["surface"]]
        each = {f"tab {surface}": gain(comparison, "recall@50", ("surface", surface)) for surface in known}
        how = f"{names[variant]}, {'with' if negatives else 'without'} impression negatives"
        claim = f"KuaiRand: finetuning per surface ({how}) over pretraining, pooled"
        met = pooled["recall@50"]["percent"] >= 2 and pooled["recall@50"]["low"] > 0
        rows.append(row(claim, "R@50 >= +2 %, interval above 0", {"pooled": pooled, **each}, met))
    for variant, name in names.items():
        comparison = compare(runs[variant, True], runs[variant, False])
        value = {metric: gain(comparison, metric) for metric in ("recall@10", "recall@50")}
        claim = f"KuaiRand: impression negatives in finetuning ({name}), pooled"
        rows.append(row(claim, "R@50 above 0", value, value["recall@50"]["low"] > 0))
    return rows


def one_surface_models(data: Path, trial: Mapping[str, Any], seed: int) -> dict[str, Path]:
    """A model of each surface, trained on its events alone as long as the one of all surfaces on all."""
    models = {}
    for surface in PLAN["kuairand"]["surfaces"]:
        own = one_surface(data, surface, data.with_name(f"data-{surface}"))
        folder = RUNS / "kuairand" / f"pinrec-apart-{surface}-{seed}"
        models[surface] = pretrained(folder, "pinrec", RETRIEVAL["kuairand"], own, trial, seed)
    return models


def apart_row(models: Sequence[Path], alone: Sequence[Mapping[str, Path]], requests: Requests) -> dict[str, Any]:
    """One model for all surfaces against one a surface."""
    main, *others = PLAN["kuairand"]["surfaces"]
    apart = [{s: OwnHistory(*load_pretrained(folder)) for s, folder in by_surface.items()} for by_surface in alone]
    value = {}
    for name, kept in (("all but the main feed", others), ("the main feed", [main])):
        some = only_surfaces(requests, *kept)
        tokenizer = load_pretrained(models[0])[1]
        pair = [
            [evaluate(ranker, some, tokenizer.catalogue, name="", progress=False) for ranker in rankers]
            for rankers in ([ModelRanker(*load_pretrained(m)) for m in models], [BySurface(r) for r in apart])
        ]
        comparison = compare(*pair)
        value[name] = {metric: gain(comparison, metric) for metric in ("recall@10", "recall@50")}
    pooled, feed = (value[name]["recall@50"] for name in value)
    return row(
        "KuaiRand: one model for all surfaces against one a surface, same total budget",
        f"R@50 >= +20 % pooled over all tabs but the main feed, interval above 0; there its lower end >= {NO_WORSE} %",
        value,
        pooled["percent"] >= 20 and pooled["low"] > 0 and feed["low"] >= NO_WORSE,
    )


def with_sampled_softmax(base: Path) -> Path:
    """A copy of a pretrained model that is trained on by the sampled softmax; made unless it is there."""
    output = base.with_name(f"{base.name}-sampled")
    if output.exists() and weights_hash(output) != weights_hash(base):
        sys.exit(f"{output} is a copy of other weights than {base} holds: remove it to copy them again")
    if not output.exists():
        partial = output.with_name(f"{output.name}.partial")
        shutil.copytree(base, partial, dirs_exist_ok=True)
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps({**config, "softmax": "sampled"}, indent=2))
        partial.rename(output)
    return output


def finetuned_models(base: Path, data: Path, variant: str, negatives: bool, seed: int) -> dict[str, Path]:
    """Every surface finetuned from one base."""
    plan = PLAN["kuairand"]
    arguments = {**plan["arguments"], **plan["finetune"][variant], "impression_negatives": negatives}
    models = {}
    for surface in plan["surfaces"]:
        output = base.with_name(f"{base.name}-{variant}-{surface}{'' if negatives else '-no-negatives'}")
        models[surface] = run_script("finetune", output, data, seed, {"model": base, "surface": surface, **arguments})
    return models


def finetuned(base: Path, models: Mapping[str, Path], requests: Requests, variant: str) -> Evaluation:
    """Each request ranked by its surface's own; the others by the base."""
    rankers: dict[str | None, Any] = {}
    for surface, output in models.items():
        if variant == "adapters":
            model, tokenizer = load_pretrained(base, adapters={surface: output})
            rankers[surface] = ModelRanker(model.merge_and_unload(), tokenizer)
        else:
            rankers[surface] = ModelRanker(*load_pretrained(output))
    model, tokenizer = load_pretrained(base)
    other = ModelRanker(model, tokenizer)
    for surface in {request["surface"] for request in requests.requests}:
        rankers.setdefault(surface, other)
    return evaluate(BySurface(rankers), requests, tokenizer.catalogue, name="finetuned", progress=False)


# -- MovieLens-1M: the rating as outcome -----------------------------------------------------------------------------


def outcomes() -> None:
    seeds = PLAN["ml1m"]["seeds"]
    models = chosen_models("ml1m", seeds)
    requests = load_requests(
        prepared("ml1m", RETRIEVAL["ml1m"]["folder"]), "test", load_pretrained(models[0])[1].catalogue
    )
    by: dict[str | None, list[Evaluation]] = {
        condition: [measured(folder, requests, "pinrec", outcome=condition, hide_time=True) for folder in models]
        for condition in (None, "watch", "like", "love")
    }
    names = ("watch", "like", "love")
    matrix = {
        f"{outcome} under {condition or 'none'}": float(
            np.mean([run.groups["outcome"][outcome]["recall@10"].value for run in runs])
        )
        for condition, runs in by.items()
        for outcome in names
    }
    rows = []
    targets = (8, 20)  # percent, over none and over the other outcome
    for outcome, other in (("love", "watch"), ("watch", "love")):
        over = {c: gain(compare(by[outcome], by[c]), "recall@10", ("outcome", outcome)) for c in (None, other)}
        value = {f"over {c or 'none'}": found for c, found in over.items()}
        met = all(f["percent"] >= t and f["low"] > 0 for f, t in zip(over.values(), targets, strict=True))
        claim = f"ML-1M: {outcome}-targets under `{outcome}`, at equal slots"
        target = f">= +{targets[0]} % over none and >= +{targets[1]} % over `{other}`, intervals above 0"
        rows.append(row(claim, target, {**value, "matrix": matrix}, met))
    rates = [love_rates(folder, requests) for folder in models]
    rising = [bool((np.diff(rate) > 0).all()) for rate in rates]
    claim = "ML-1M: candidates' mean love rate in train, budget from all watch to all love in 5 steps"
    rates_of = [np.round(rate, 4).tolist() for rate in rates]
    rows.append(row(claim, "rises at every step, every seed", rates_of, all(rising)))
    record("surfaces", rows, seeds, models)


def love_rates(folder: Path, requests: Requests, k: int = 50) -> np.ndarray:
    """Mean share of `love` among the candidates' ratings in train, at budgets from all watch to all love."""
    retriever = PinRecRetriever.build(*load_pretrained(folder))
    rated, loved = item_ratings(folder.parent / "data", retriever)
    rate = loved / np.maximum(rated, 1)
    found = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        budget = {"watch": 1 - share, "love": share}
        asked = [{**request, "timestamp": None, "outcome_budget": budget} for request in requests.requests]
        found.append(rate[retriever.search(asked, k).rows].mean())
    return np.array(found)


def item_ratings(data: Path, retriever: PinRecRetriever) -> tuple[np.ndarray, np.ndarray]:
    """Ratings in train per catalogue row, all and `love`."""
    table = pq.read_table(data / "train", columns=["item_id", "outcomes"])
    items = [item for row in table["item_id"].to_pylist() for item in row]
    love = np.array(["love" in names for row in table["outcomes"].to_pylist() for names in row])
    rows = retriever.tokenizer.catalogue.rows(items)
    size = len(retriever.tokenizer.catalogue)
    return np.bincount(rows[rows >= 0], minlength=size), np.bincount(rows[(rows >= 0) & love], minlength=size)


# -- MovieLens-1M: several steps -------------------------------------------------------------------------------------


def steps() -> None:
    plan, ml1m = PLAN["steps"], RETRIEVAL["ml1m"]
    data = prepared("ml1m", ml1m["folder"], "ml1m-next10", num_targets=plan["num_targets"])
    ladders, several, peers = [], [], {"one step": [], "one + MMR": [], "noise copies": []}  # type: ignore[var-annotated]
    chosen: dict[str, Any] = {}
    models: list[Path] = []
    for seed in plan["seeds"]:
        folder = pretrained(RUNS / "ml1m-next10" / f"pinrec-{seed}", "pinrec", ml1m, data, plan["trial"], seed)
        models.append(folder)
        model, tokenizer = load_pretrained(folder)
        retriever, ranker = PinRecRetriever.build(model, tokenizer), ModelRanker(model, tokenizer, hide_time=True)
        splits = {
            split: hidden_time(load_requests(data, split, tokenizer.catalogue)) for split in ("validation", "test")
        }

        def figure(ranker: Any, split: str, splits: Any = splits, tokenizer: Any = tokenizer) -> Evaluation:
            return evaluate(ranker, splits[split], tokenizer.catalogue, name="", progress=False, resamples=300)

        ladder = {
            n: figure(Slots(retriever, n), "validation").metrics["user_recall@10"].value for n in (1, *plan["ladder"])
        }
        ladders.append(ladder)
        if not chosen:  # on the first seed's validation, for all
            chosen["steps"] = max(plan["ladder"], key=lambda n: ladder[n])
            mmr = {t: figure(MMRRanker(ranker, t), "validation") for t in plan["trade_offs"]}
            chosen["trade_off"] = max(mmr, key=lambda t: recall(mmr[t]))
            chosen["noise"] = step_spread(retriever, splits["validation"], chosen["steps"])
        several.append(figure(Slots(retriever, chosen["steps"]), "test"))
        peers["one step"].append(figure(Slots(retriever, 1), "test"))
        peers["one + MMR"].append(figure(MMRRanker(ranker, chosen["trade_off"]), "test"))
        peers["noise copies"].append(figure(Slots(retriever, chosen["steps"], chosen["noise"]), "test"))
    value = {f"over {name}": gain(compare(several, runs), "user_recall@10") for name, runs in peers.items()}
    over = value["over one step"]
    record(
        "surfaces",
        [
            row(
                "ML-1M, next 10 items, equal total slots: the best of 2-16 steps (chosen on validation) against 1",
                ">= +6 %, interval above 0",
                {**value, "chosen": chosen, "validation": ladders},
                over["percent"] >= 6 and over["low"] > 0,
            )
        ],
        plan["seeds"],
        models,
    )


def recall(evaluation: Evaluation) -> float:
    return evaluation.metrics["user_recall@10"].value


def hidden_time(requests: Requests) -> Requests:
    """The same, the time of the requests unknown."""
    return replace(requests, requests=[{**request, "timestamp": None} for request in requests.requests])


# -- simulated worlds ------------------------------------------------------------------------------------------------


def frontier() -> None:
    """What diversity costs in recall: knobs of PinRec, and MMR over one embedding of it and of the two-tower."""
    plan = PLAN["frontier"]
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch), "default", PLAN["worlds"]["seeds"][0])
        retriever = PinRecRetriever.build(world.model, world.tokenizer)
        one, tower = ModelRanker(world.model, world.tokenizer), ModelRanker(*world.pretrained("two_tower", world.data))
        merged = {
            similar: PinRecRetriever(retriever.model, retriever.tokenizer, retriever.index, similar=similar)
            for similar in plan["similar"]
        }
        systems = {
            "PinRec, number of steps": (lambda n: Slots(retriever, int(n)), plan["steps"]),
            "PinRec, 8 steps, cosine above which they merge": (lambda c: Slots(merged[c], 8), plan["similar"]),
            "PinRec, share of saves": (
                lambda share: Asking(retriever, {"save": share, "click": 1 - share}),
                plan["save_share"],
            ),
            "PinRec, one embedding + MMR": (lambda t: MMRRanker(one, t), plan["trade_off"]),
            "two-tower + MMR": (lambda t: MMRRanker(tower, t), plan["trade_off"]),
        }
        points = measure_frontier(systems, world.requests, world.tokenizer.catalogue, resamples=500, progress=False)
    claim = "simulator: recall@10 against intra-list diversity@10"
    record("surfaces", [row(claim, "drawn", [point.to_dict() for point in points], None)], [world.seed])
    plot_frontier(points).savefig(ROOT / "docs" / "frontier.png", dpi=120)


def worlds() -> None:
    """The worlds of the plan, one after the other; what is known so far is recorded after each."""
    plan = PLAN["worlds"]
    found: dict[int, dict[str, Any]] = {}
    null: dict[str, dict[str, Any]] = {}
    for seed in plan["seeds"]:
        found[seed] = run_world("default", seed)
        for kind in plan["null_worlds"] if seed == plan["seeds"][0] else ():
            null[kind] = run_world(kind, seed)
        record("surfaces", world_rows(found, null, plan["needed"]), list(found))
        write_ablations()


def adapters() -> None:
    record("surfaces", mixed_rows(PLAN["adapters"]), [0])


ROWS = {f.__name__: f for f in (kuairand, finetuning, outcomes, steps, frontier, worlds, adapters)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(ROWS), action="append", help="only this; repeatable")
    args = parser.parse_args()
    if set(args.row or ROWS) - {"worlds", "frontier", "adapters"} and not public_data().is_dir():
        sys.exit(f"skipped: no public data in {public_data()}; set PINREC_DATA, or run --row worlds")
    start = time.time()
    for name in args.row or ROWS:
        ROWS[name]()
        write_ablations()
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
