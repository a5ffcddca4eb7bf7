"""Measured results as a card shows them: tables, sentences, and the metadata's `model-index`."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub import EvalResult

from pinrec_hf.evaluation.bootstrap import Interval
from pinrec_hf.evaluation.report import Table
from pinrec_hf.evaluation.saved import SavedReport

MISSING = "not measured"
FEWEST_USERS = 30  # fewer tell nothing about a group
READING = (
    "Brackets are 95\u00a0% intervals from resampling users. Recall@k is the share of the items that users went on to "
    "act on (and had not acted on before) among k candidates."
)


def figure(interval: Interval | None) -> str:
    """`0.215 [0.173, 0.259]`."""
    if interval is None or math.isnan(interval.value):
        return MISSING
    return f"{interval.value:.3f} [{interval.low:.3f},\u00a0{interval.high:.3f}]"


def headline(report: SavedReport | None) -> str:
    """The figure to remember, in a sentence."""
    if report is None:
        return f"Its recall is {MISSING} yet."
    system, k = report.systems[0], report.systems[0].ks[0]
    recall = system.metrics[f"recall@{k}"]
    text = (
        f"On the {system.split} split, {k} candidates of {system.catalogue_size:,} hold **{recall.value:.1%} "
        f"[{recall.low:.1%}, {recall.high:.1%}]** of the items that users went on to act on"
    )
    own = [c for c in report.comparisons if c.a == system.name and not c.b.startswith(f"{system.name}, ")]
    others = [(c.b, c.metrics[f"recall@{k}"]) for c in own]
    if not others:
        return text + "."
    name, best = max(others, key=lambda other: other[1].b)
    return f"{text}; {name} finds {best.b:.1%}."


def about(report: SavedReport | None) -> str:
    if report is None:
        return f"Recall, on any split: {MISSING}."
    system = report.systems[0]
    return (
        f"Split `{system.split}`: {system.num_targets:,} targets in {system.num_requests:,} requests of "
        f"{system.num_users:,} users, each ranked among all {system.catalogue_size:,} items. {READING}"
    )


def overall_table(report: SavedReport | None) -> str:
    """A row a system: recall at every depth, NDCG, coverage, and how the model compares with it."""
    if report is None:
        return ""
    ks = report.systems[0].ks
    names, ndcg = [f"recall@{k}" for k in ks], f"ndcg@{ks[0]}"
    first = report.systems[0].name
    differences = {c.b: c.metrics.get(names[0]) for c in report.comparisons if c.a == first}
    rows = []
    for system in report.systems:
        difference = differences.get(system.name)
        against = "" if difference is None else _relative(difference)
        name = f"**{system.name}**" if system is report.systems[0] else system.name
        recalls = [figure(system.metrics.get(metric)) for metric in names]
        wide = f"{system.coverage[f'coverage@{ks[0]}']:,}"
        rows.append([name, *recalls, figure(system.metrics.get(ndcg)).partition(" [")[0], wide, against])
    return Table("", ["", *names, ndcg, f"distinct items@{ks[0]}", f"{first} against it, {names[0]}"], rows).grid()


def group_table(report: SavedReport | None) -> str:
    """A row a surface, and one each of its outcomes: the model's recall."""
    if report is None:
        return ""
    system = report.systems[0]
    names = [f"recall@{k}" for k in system.ks]
    rows = []
    for surface, figures in system.groups.get("surface", {}).items():
        rows.append([surface, "any", f"{figures[names[0]].users:,}", *(figure(figures.get(name)) for name in names)])
        for group, both in system.groups.get("surface, outcome", {}).items():
            if group.startswith(f"{surface}, "):
                outcome = group.removeprefix(f"{surface}, ")
                rows.append(["", outcome, f"{both[names[0]].users:,}", *(figure(both.get(name)) for name in names)])
    return "By surface and outcome:\n\n" + Table("", ["surface", "outcome", "users", *names], rows).grid()


def limits(report: SavedReport | None) -> list[str]:
    """Where the model is weak, as measured."""
    k = 10 if report is None else report.systems[0].ks[0]
    system = None if report is None else report.systems[0]
    popularity = {} if system is None else system.groups.get("item popularity", {})
    lengths = {} if system is None else system.groups.get("history length", {})

    def recall(groups: dict[str, dict[str, Interval]], name: str | None) -> str:
        interval = groups.get(name or "", {}).get(f"recall@{k}")
        return figure(interval) + (f" ({interval.users:,} users)" if interval is not None else "")

    least, most, cold = "1 (least popular)", "4 (most popular)", "cold (not in train)"
    shortest = next((name for name, row in lengths.items() if row[f"recall@{k}"].users >= FEWEST_USERS), None)
    coverage = MISSING
    if system is not None:
        coverage = f"{system.coverage[f'coverage@{k}']:,} of {system.catalogue_size:,} items"
    events = (
        "short histories"
        if shortest is None
        else f"the shortest histories of {FEWEST_USERS} users or more, {shortest} events"
    )
    return [
        f"Recall@{k} of the least popular quarter of items: {recall(popularity, least)}; of the most popular quarter: "
        f"{recall(popularity, most)}; of items that training never saw: {recall(popularity, cold)}.",
        f"Recall@{k} with {events}: {recall(lengths, shortest)}.",
        f"All top-{k} lists together hold {coverage}.",
    ]


def eval_results(report: SavedReport | None, dataset: str) -> list[EvalResult]:
    """The entries of `model-index`: overall, by surface and by outcome."""
    if report is None:
        return []
    system = report.systems[0]
    groups: list[tuple[str | None, dict[str, Interval]]] = [(None, system.metrics)]
    for kind in ("surface", "outcome"):
        groups += system.groups.get(kind, {}).items()
    wanted = [*(f"recall@{k}" for k in system.ks), f"ndcg@{system.ks[0]}"]
    return [
        EvalResult(
            task_type="retrieval",
            task_name="Candidate retrieval",
            dataset_type=slug(dataset),
            dataset_name=dataset if group is None else f"{dataset} ({group})",
            dataset_config=group,
            dataset_split=system.split,
            metric_type=name.replace("@", "_at_"),
            metric_name=name,
            metric_value=round(figures[name].value, 6),
            metric_args={"interval_95": [round(figures[name].low, 6), round(figures[name].high, 6)]},
        )
        for group, figures in groups
        for name in wanted
        if name in figures and not math.isnan(figures[name].value)
    ]


def slug(text: str) -> str:
    """A name of letters, digits, dots and dashes.

    >>> slug("CC BY-SA 4.0")
    'cc-by-sa-4.0'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _relative(difference: Any) -> str:
    if math.isnan(difference.relative_percent):
        return MISSING
    d = difference
    return f"{d.relative_percent:+.0f}\u00a0% [{d.relative_low:+.0f},\u00a0{d.relative_high:+.0f}]"
