"""Items that training never saw: a tenth of a public set's is withheld, then put into the index.

Run by `make benchmark-public ROW=cold`. In training's histories a withheld item is the unknown item; it is neither
target nor negative there. Then catalogue and model grow by it (`add_items`), as they do when an item is new. Models
(ids, content, both) and the nearest neighbours of the history's mean content vector rank all items, seen ones removed;
recall is that of the test targets which were withheld (cold), and of the others (warm). One number is chosen, on the
validation item: the boost of new items, the smallest that gives them the plan's share of warm recall.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from runs import run_script, trained_commit

from pinrec_hf.data.prepare import prepare
from pinrec_hf.evaluation.evaluate import Evaluation, compare, evaluate
from pinrec_hf.evaluation.protocol import Requests, load_requests, only_targets
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.eligible import seen_rows
from pinrec_hf.retrieval.pretrained import load_pretrained

BOOSTS = [step / 4 for step in range(13)]
WARM_REQUESTS = 4_000  # of validation, drawn by the seed, for choosing a boost


class ContentNeighbours:
    """Ranks by cosine to the mean of the history's content vectors, each of length 1; seen items removed."""

    def __init__(self, catalogue: Catalogue) -> None:
        vectors = catalogue.vectors(np.arange(len(catalogue)))
        self.catalogue = catalogue
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def rank(self, requests: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        seen = [seen_rows(request, self.catalogue) for request in requests]
        scores = np.stack([self.vectors[rows].mean(0) for rows in seen]) @ self.vectors.T
        for score, rows in zip(scores, seen, strict=True):
            score[rows] = -np.inf
        best = np.argpartition(-scores, k, axis=1)[:, :k]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)


def withheld_items(count: int, share: float, seed: int) -> np.ndarray:
    """Which of `count` items training does not see: bool `(count,)`, exactly that share of them."""
    withheld = np.zeros(count, bool)
    withheld[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return withheld


def grown(catalogue: Catalogue, items: pa.Table) -> Catalogue:
    """The catalogue with more items, its own rows where they were."""
    columns = {name: items[column] for name, column in (("vectors", "embedding"), ("features", "features"))
               if column in items.column_names}  # fmt: skip
    return catalogue.append(items["item_id"].to_pylist(), **columns)


def split_targets(data: Path, split: str, catalogue: Catalogue, known: int) -> dict[str, Requests]:
    """Requests of the targets that are new (cold), and of the others (warm)."""
    requests = load_requests(data, split, catalogue)
    return {"cold": only_targets(requests, requests.item_row >= known),
            "warm": only_targets(requests, requests.item_row < known)}  # fmt: skip


def smallest_boost(
    model: PinRecModel, tokenizer: PinRecTokenizer, data: Path, known: int, share: float, seed: int
) -> float:
    """The least of `BOOSTS` with which new items reach that share of warm recall@10 on the validation item."""
    requests = split_targets(data, "validation", tokenizer.catalogue, known)
    chosen = np.random.default_rng(seed).random(len(requests["warm"])) < WARM_REQUESTS / len(requests["warm"])
    requests["warm"] = only_targets(requests["warm"], chosen)

    def reached(boost: float) -> float:
        ranker = ModelRanker(with_items(model, tokenizer.catalogue, boost), tokenizer, hide_time=True)
        found = {group: ranked(ranker, requests[group], tokenizer.catalogue) for group in requests}
        print("boost", boost, {group: found[group].metrics["recall@10"].value for group in found}, flush=True)
        return ratio(found["cold"], found["warm"])

    return BOOSTS[min(bisect_left(BOOSTS, share, key=reached), len(BOOSTS) - 1)]


def with_items(model: PinRecModel, catalogue: Catalogue, boost: float) -> PinRecModel:
    model = copy.deepcopy(model)
    model.add_items(catalogue, boost)
    return model


def figures(found: Evaluation) -> dict[str, float]:
    recall = found.metrics["recall@10"]
    return {
        "recall@10": recall.value, "low": recall.low, "high": recall.high,
        "recall@50": found.metrics["recall@50"].value, "ndcg@10": found.metrics["ndcg@10"].value,
        "targets": len(found.rank_of_target),
    }  # fmt: skip


def measure(log: pa.Table, data: Path, plan: Mapping[str, Any], seed: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Cold and warm figures of every model of `plan["models"]` and of the content neighbours; what is there so far.

    Args:
        log: of the set. data: its sequences dataset, with content vectors. seed: of what is withheld, and of training.
        minutes: of training, each model.
    """
    items = pq.read_table(data / "items.parquet")
    withheld = withheld_items(items.num_rows, plan["share"], seed)
    work = data.parent / f"cold-{seed}"
    results: dict[str, Any] = {}
    for name, model_plan in plan["models"].items():
        known = items.select(model_plan.get("columns", items.column_names))
        folder = work / "-".join(["data", *model_plan.get("columns", [])])
        if not folder.exists():
            work.mkdir(exist_ok=True)
            prepare(log, items=known.filter(pa.array(~withheld)), output_dir=folder, leave_one_out=True)
        trained = run_script("pretrain", work / f"{name}-{minutes:g}-minutes", folder, seed, {
            "config_overrides": json.dumps(model_plan.get("config", {})), "time_dropout": 1.0,
            "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
            "max_minutes": minutes, "num_train_epochs": 1000,
        })  # fmt: skip
        model, tokenizer = load_pretrained(trained)
        before, tokenizer.catalogue = tokenizer.catalogue, grown(tokenizer.catalogue, known.filter(pa.array(withheld)))
        boost = 0.0
        if before.content_size and model.config.item_id_embedding == "full":
            boost = smallest_boost(model, tokenizer, data, len(before), plan["of_warm"], seed)
        model.add_items(tokenizer.catalogue, boost)
        requests = split_targets(data, "test", tokenizer.catalogue, len(before))
        measured = {group: ranked(ModelRanker(model, tokenizer, hide_time=True), requests[group], tokenizer.catalogue)
                    for group in requests}  # fmt: skip
        state = json.loads((trained / "trainer_state.json").read_text())
        results[name] = {
            **{group: figures(found) for group, found in measured.items()},
            "cold over warm": ratio(measured["cold"], measured["warm"]),
            "boost": boost,
            "epochs": state["epoch"],
            "trained_commit": trained_commit([trained]),
        }
        if name == plan["checked"]:
            without = ModelRanker(model, tokenizer, hide_time=True)
            without.items[len(before) :] = 0  # the index before they were put into it: at the first bias, which
            without.items[len(before) :, model.config.hidden_size] = -1e9  # a request asks for with 1, far below all
            difference = compare(measured["warm"], ranked(without, requests["warm"], tokenizer.catalogue))
            change = difference.metrics["recall@10"]
            results[name]["warm, index with them minus without"] = {
                "difference": change.difference, "low": change.low, "high": change.high, "without": change.b,
            }  # fmt: skip
            neighbours = {group: ranked(ContentNeighbours(tokenizer.catalogue), requests[group], tokenizer.catalogue)
                          for group in requests}  # fmt: skip
            results["content neighbours"] = {
                **{group: figures(found) for group, found in neighbours.items()},
                "cold over warm": ratio(neighbours["cold"], neighbours["warm"]),
            }
            against = compare(measured["cold"], neighbours["cold"]).metrics["recall@10"]
            results[name]["cold, minus content neighbours"] = {
                "difference": against.difference, "low": against.low, "high": against.high,
            }  # fmt: skip
        yield results


def ranked(ranker: Any, requests: Requests, catalogue: Catalogue) -> Evaluation:
    return evaluate(ranker, requests, catalogue, progress=False)


def ratio(cold: Evaluation, warm: Evaluation) -> float:
    return cold.metrics["recall@10"].value / warm.metrics["recall@10"].value
