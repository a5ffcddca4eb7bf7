"""One simulated world: trained, finetuned, controlled, and tested online; its figures stand in worlds.json."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from apart import OwnHistory, one_surface
from peft import PeftModel
from runs import RESULTS, commit, gain, read_plan, write_json

from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.simulator import OUTCOMES, SURFACES, simulate
from pinrec_hf.data.simulator.parameters import DAY, WorldParameters
from pinrec_hf.evaluation.ab import compare_answers
from pinrec_hf.evaluation.evaluate import Evaluation, compare, evaluate
from pinrec_hf.evaluation.frontier import MMRRanker
from pinrec_hf.evaluation.online_walk import OnlineWorld
from pinrec_hf.evaluation.popularity import DecayedPopularity, best_popularity
from pinrec_hf.evaluation.protocol import Requests, load_requests
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.evaluation.response_model import ResponseModel
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.eligible import seen_rows
from pinrec_hf.retrieval.merge import allocate_slots, round_robin
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.training import finetune, pretrain
from pinrec_hf.training.arguments import (
    DataArguments,
    FinetuningArguments,
    FinetuningTrainingArguments,
    ModelArguments,
    PinRecTrainingArguments,
)

PLAN = read_plan("surfaces")["worlds"]
BASE = ("rows", "test_days", "config", "pretrain")
SECTIONS = {
    "finetuning": (*BASE, "finetune", "apart"),
    "outcomes": BASE,
    "steps": (*BASE, "ladder", "trade_offs"),
    "online": (*BASE, "candidates"),
}
"""What of the plan a section's figures depend on, besides the world's kind and seed; each is a method of `World`."""
POSITIVE = ("save", "click")
DIAL = tuple({"save": share, "click": 1 - share} for share in (0.0, 0.25, 0.5, 0.75, 1.0))


def run_world(kind: str, seed: int) -> dict[str, Any]:
    """The figures of a world by section, and `commits`, by section too; those that worlds.json has of the same plan are
    not measured again."""
    path = RESULTS / "worlds.json"
    known = json.loads(path.read_text()) if path.exists() else {"plans": {}, "worlds": {}}
    for section, names in SECTIONS.items():
        plan = {name: PLAN[name] for name in names}
        if known["plans"].get(section) != plan:
            known["plans"][section] = plan
            for world in known["worlds"].values():
                world.pop(section, None)
    own = known["worlds"].setdefault(f"{kind}-{seed}", {})
    todo = [section for section in SECTIONS if section not in own]
    if todo:
        with tempfile.TemporaryDirectory() as scratch:
            world = World(Path(scratch), kind, seed)
            for section in todo:
                start = time.time()
                figures = getattr(world, section)()
                own[section] = {"commit": commit(), "seconds": round(time.time() - start), "figures": figures}
                write_json(path, known)
    commits = {section: own[section]["commit"] for section in SECTIONS}
    return {**{section: own[section]["figures"] for section in SECTIONS}, "commits": commits}


class BySurface:
    """Each request ranked by its surface's own ranker."""

    def __init__(self, rankers: Mapping[str, Any]) -> None:
        self.rankers = rankers

    def rank(self, requests: Sequence[dict[str, Any]], k: int) -> np.ndarray:
        ranked = np.full((len(requests), k), -1, np.int64)
        for surface, ranker in self.rankers.items():
            own = [i for i, request in enumerate(requests) if request["surface"] == surface]
            if own:
                ranked[own] = ranker.rank([requests[i] for i in own], k)
        return ranked


class Slots:
    """Lists of several embeddings in turns at equal total slots: the steps of a model, or copies with noise."""

    def __init__(self, retriever: PinRecRetriever, steps: int, noise: float | None = None) -> None:
        self.retriever, self.steps, self.noise = retriever, steps, noise

    def rank(self, requests: Sequence[dict[str, Any]], k: int) -> np.ndarray:
        asked = [{**r, "outcome_budget": {None: 1.0}, "num_steps": 1 if self.noise else self.steps} for r in requests]
        if self.noise is None:
            return self.retriever.search(asked, k).rows
        rng = np.random.default_rng(0)
        ranked = np.full((len(requests), k), -1, np.int64)
        vectors = self.retriever.index.catalogue_embeddings()
        for i, (by, request) in enumerate(zip(self.retriever.generate(asked), requests, strict=True)):
            copies = np.repeat(by.embeddings, self.steps, 0)
            size = self.retriever.model.config.hidden_size
            copies[1:, :size] += rng.normal(scale=self.noise, size=(self.steps - 1, size))
            scores = copies @ vectors.T
            scores[:, seen_rows(request, self.retriever.tokenizer.catalogue)] = -np.inf
            rows = np.argsort(-scores, axis=1)[:, :k]
            slots = allocate_slots(np.ones(self.steps), k)
            ranked[i] = round_robin(rows, np.take_along_axis(scores, rows, 1), slots, k)[0]
        return ranked


def step_spread(retriever: PinRecRetriever, requests: Requests, steps: int) -> float:
    """Standard deviation, a dimension, of the steps' embeddings around the first: the noise of the copies."""
    some = [requests.requests[i] for i in range(min(200, len(requests)))]
    found = retriever.generate([{**r, "outcome_budget": {None: 1.0}, "num_steps": steps} for r in some])
    vectors = [by.embeddings[:, : retriever.model.config.hidden_size] for by in found]
    return float(np.sqrt(np.mean([np.square(one[1:] - one[0]).mean() for one in vectors])))


def next_requests(requests: Requests, most: int = 10) -> Requests:
    """The requests that bring no query and no subject item, each with the next `most` items that its user acts on from
    then to the end of the split, whatever their surface."""
    starts = np.searchsorted(requests.request_index, np.arange(len(requests)))
    open_ended = [i for i in range(len(requests)) if not requests.requests[i].keys() & {"query", "context_item_id"}]
    place = np.concatenate([np.arange(starts[i], min(starts[i] + most, len(requests.user))) for i in open_ended])
    index = np.repeat(np.arange(len(open_ended)), [min(most, len(requests.user) - starts[i]) for i in open_ended])
    own = requests.user[place] == requests.user[starts[open_ended]][index]
    place, index = place[own], index[own]
    arrays = {name: getattr(requests, name)[place] for name in ("item_row", "user", "history_length")}
    lists = {name: [getattr(requests, name)[i] for i in place] for name in ("surface", "outcomes")}
    asked = [requests.requests[i] for i in open_ended]
    return replace(requests, requests=asked, request_index=index, **arrays, **lists)


class World:
    """A world's data and models, in a folder that goes away."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self.folder, self.kind, self.seed = folder, kind, seed
        simulate(folder / "world", size=PLAN["rows"], seed=seed, world=kind)
        self.end = WorldParameters.create(PLAN["rows"], seed, kind).end
        self.data = self.prepared()
        self.model, self.tokenizer = self.pretrained("pinrec", self.data)
        self.requests = load_requests(self.data, "test", self.tokenizer.catalogue)
        self.base = self.measured(ModelRanker(self.model, self.tokenizer))

    def prepared(self) -> Path:
        output = self.folder / "data"
        prepare(
            self.folder / "world" / "log",
            items=self.folder / "world" / "items.parquet",
            queries=self.folder / "world" / "queries.parquet",
            negative_outcomes=["hide"],
            output_dir=output,
            validation_start=self.end - (PLAN["test_days"] + 1) * DAY,
            test_start=self.end - PLAN["test_days"] * DAY,
        )
        return output

    def only(self, surface: str) -> Path:
        return one_surface(self.data, surface, self.folder / f"data-{surface}")

    def pretrained(self, architecture: str, data: Path, stage: str = "pretrain") -> tuple[PinRecModel, PinRecTokenizer]:
        data_args = DataArguments(data=str(data))
        model_args = ModelArguments(architecture=architecture, config_overrides=json.dumps(PLAN["config"]))
        training_args = PinRecTrainingArguments(**self.training(stage))
        run = pretrain.prepare_pretraining(data_args, model_args, training_args)
        return pretrain.train(run, data_args, training_args).model.eval(), run.tokenizer

    def finetuned(self, surface: str | None, lora: bool) -> ModelRanker:
        if not (self.folder / "base").exists():
            # the full one, which so small a catalogue is pretrained by, has every impression as a negative anyway
            self.model.config.softmax = "sampled"
            pretrain.save_model(self.model, self.tokenizer, self.folder / "base")
        data_args = DataArguments(data=str(self.data))
        args = FinetuningArguments(model=str(self.folder / "base"), surface=surface, lora=lora)
        training_args = FinetuningTrainingArguments(**self.training("finetune"))
        run = finetune.prepare_finetuning(data_args, args, training_args)
        model: Any = finetune.train(run, None, data_args, training_args).model
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        return ModelRanker(model.eval(), run.tokenizer)

    def training(self, stage: str) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "training"), "use_cpu": True, "disable_tqdm": True, "eval_strategy": "no",
            "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 10_000, "seed": self.seed,
            **PLAN[stage],
        }  # fmt: skip

    @cached_property
    def popularity(self) -> DecayedPopularity:
        """Decayed popularity per surface and outcome, which knows a dial; the best half-life on validation."""
        best = best_popularity(self.data, self.tokenizer.catalogue, requests=self.requests, progress=False)
        trials = [trial for trial in best.trials if trial["scope"] == "surface_outcome"]
        chosen = max(trials, key=lambda trial: trial["recall@50"])
        settings = {name: chosen[name] for name in ("scope", "half_life", "rolling")}
        return DecayedPopularity.fit(self.data, self.tokenizer.catalogue, "test", **settings)

    def measured(self, ranker: Any, requests: Requests | None = None) -> Evaluation:
        wanted = requests or self.requests
        return evaluate(ranker, wanted, self.tokenizer.catalogue, name="", progress=False, resamples=500)

    def finetuning(self) -> dict[str, Any]:
        """Per surface against pretraining, all-surface finetuning with equal updates, and models trained apart, for as
        many epochs on their surface as the base and its adapter together."""
        full = self.measured(BySurface({s: self.finetuned(s, lora=False) for s in SURFACES}))
        lora = self.measured(BySurface({s: self.finetuned(s, lora=True) for s in SURFACES}))
        together = self.measured(self.finetuned(None, lora=False))
        apart = self.measured(
            BySurface({s: OwnHistory(*self.pretrained("pinrec", self.only(s), "apart")) for s in SURFACES})
        )
        pairs = {
            "full against pretrained": (full, self.base),
            "full against all-surface": (full, together),
            "adapters against pretrained": (lora, self.base),
            "adapters against all-surface": (lora, together),
            "adapters against apart": (lora, apart),
        }
        return {
            name: {
                "all": gain(compare(a, b), "recall@10"),
                **{s: gain(compare(a, b), "recall@10", ("surface", s)) for s in SURFACES},
            }
            for name, (a, b) in pairs.items()
        }

    def outcomes(self) -> dict[str, Any]:
        """Condition x outcome at equal slots, and the same of decayed popularity, which has one list an outcome."""
        by: dict[str | None, Evaluation] = {
            c: self.measured(ModelRanker(self.model, self.tokenizer, outcome=c)) for c in (*POSITIVE, None)
        }
        plain = {c: self.measured(Asking(self.popularity, {c: 1.0})) for c in POSITIVE}
        return {
            "matrix": {f"{o} under {c or 'none'}": _recall(e, o) for c, e in by.items() for o in POSITIVE},
            "popularity": {f"{o} under {c}": _recall(e, o) for c, e in plain.items() for o in POSITIVE},
            **{
                f"{o} under {o} against {c}": gain(compare(by[o], by[c]), "recall@10", ("outcome", o))
                for o, c in (("save", "click"), ("click", "save"), ("save", None), ("click", None))
            },
            "beyond popularity": beyond(by, plain),
        }

    def steps(self) -> dict[str, Any]:
        """The next 10 positives at equal total slots: the best number of steps on validation against one."""
        retriever = PinRecRetriever.build(self.model, self.tokenizer)
        validation = next_requests(load_requests(self.data, "validation", self.tokenizer.catalogue))
        test = next_requests(self.requests)
        one, ranker = Slots(retriever, 1), ModelRanker(self.model, self.tokenizer)
        ladder = {
            n: self.measured(Slots(retriever, n), validation).metrics["user_recall@10"].value for n in PLAN["ladder"]
        }
        best = max(ladder, key=lambda n: ladder[n])
        noise = step_spread(retriever, validation, best)
        peers = {"one": one, "noise copies": Slots(retriever, best, noise)}
        mmr = {t: MMRRanker(ranker, t) for t in PLAN["trade_offs"]}
        peers["one + MMR"] = max(
            mmr.values(), key=lambda r: self.measured(r, validation).metrics["user_recall@10"].value
        )  # type: ignore[assignment]
        several = self.measured(Slots(retriever, best), test)
        return {
            "steps": best,
            "validation": {"1": self.measured(one, validation).metrics["user_recall@10"].value, **ladder},
            **{
                f"against {n}": gain(compare(several, self.measured(p, test)), "user_recall@10")
                for n, p in peers.items()
            },
        }

    def online(self) -> dict[str, Any]:
        """The users' true answers: a budget turned from click to save, and search against the two-tower."""
        tower = ModelRanker(*self.pretrained("two_tower", self.data))
        retriever = PinRecRetriever.build(self.model, self.tokenizer)
        rankers: list[Any] = [Asking(retriever, budget) for budget in DIAL]
        rankers += [Asking(self.popularity, budget) for budget in DIAL]
        rankers += [_TowerDial(tower, budget) for budget in DIAL]
        rankers += [ModelRanker(self.model, self.tokenizer), tower]
        world = OnlineWorld(self.folder / "world", self.data, self.tokenizer.catalogue)
        responses = ResponseModel.fit(self.data, self.tokenizer.catalogue, seed=0)
        answers = world.walk(rankers, responses, PLAN["candidates"], progress=False)
        each = np.array([a.expected[:, :2].mean(0) for a in answers])
        columns = [list(OUTCOMES).index(name) for name in POSITIVE]
        dials = {
            name: each[5 * i : 5 * i + 5, columns].round(5).tolist()
            for i, name in enumerate(("pinrec", "popularity", "two-tower"))
        }
        test = compare_answers(
            answers[-2], answers[-1], names=("PinRec", "two-tower"), k=PLAN["candidates"], design="paired", splits=100,
            resamples=500, seed=0, ranker_auc=responses.validation_auc,
        )  # fmt: skip
        saves = {s: test.figures[s]["save"] for s in ("all", *SURFACES)}
        return {
            "dial: saves and clicks a request": dials,
            "saves against two-tower": {
                s: {"percent": d.relative_percent, "low": d.relative_low, "high": d.relative_high}
                for s, d in saves.items()
            },
        }


class Asking:
    """A ranker whose every request asks for one budget."""

    def __init__(self, ranker: Any, budget: Mapping[str | None, float]) -> None:
        self.ranker, self.budget = ranker, budget

    def rank(self, requests: Sequence[dict[str, Any]], k: int) -> np.ndarray:
        asked = [{**request, "outcome_budget": dict(self.budget)} for request in requests]
        return self.ranker.rank(asked, k)  # type: ignore[no-any-return]


class _TowerDial:
    """A two-tower's dial: its conditioned lists take turns by budget, as PinRec's do."""

    def __init__(self, tower: ModelRanker, budget: Mapping[str, float]) -> None:
        self.budget = {name: share for name, share in budget.items() if share}
        self.towers = [ModelRanker(tower.model, tower.tokenizer, outcome=name) for name in self.budget]

    def rank(self, requests: Sequence[dict[str, Any]], k: int) -> np.ndarray:
        lists = np.stack([tower.rank(requests, k) for tower in self.towers], 1)
        slots = allocate_slots(np.array(list(self.budget.values())), k)
        return np.stack([round_robin(rows, np.zeros(rows.shape), slots, k)[0] for rows in lists])


def _recall(evaluation: Evaluation, outcome: str) -> float:
    return evaluation.groups["outcome"][outcome]["recall@10"].value


def beyond(by: Mapping[str | None, Evaluation], plain: Mapping[str, Evaluation]) -> dict[str, float]:
    """(right condition - wrong one) of the model minus that of popularity, mean over outcomes; interval over users."""
    requests = by["save"].requests
    value = np.zeros(len(requests.user))
    for outcome, other in (("save", "click"), ("click", "save")):
        of = np.array([outcome in names for names in requests.outcomes])
        hit = {k: [(e[c].rank_of_target >= 0) & (e[c].rank_of_target < 10) for c in (outcome, other)]
               for k, e in (("model", by), ("popularity", plain))}  # fmt: skip
        difference = sum(
            sign * (right.astype(float) - wrong) for sign, (right, wrong) in zip((1, -1), hit.values(), strict=True)
        )
        value += of * difference / of.sum() / 2
    user = np.unique(requests.user, return_inverse=True)[1]
    sums = np.bincount(user, value)
    weights = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 1_000)
    low, high = np.quantile(weights @ sums, [0.025, 0.975])
    return {"difference": float(sums.sum()), "low": float(low), "high": float(high)}
