"""Read `evaluation.json` back: figures with intervals, for whoever shows them again."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinrec_hf.evaluation.bootstrap import Difference, Interval

FORMAT = 1


@dataclass(frozen=True)
class SavedEvaluation:
    """One system of an evaluation.json; the attributes are those of `Evaluation`, without its arrays."""

    name: str
    split: str
    ks: tuple[int, ...]
    metrics: dict[str, Interval]
    groups: dict[str, dict[str, dict[str, Interval]]]
    coverage: dict[str, int]
    embeddings: int
    num_requests: int
    num_targets: int
    num_users: int
    catalogue_size: int


@dataclass(frozen=True)
class SavedComparison:
    """System a minus system b; `metrics` are the overall differences."""

    a: str
    b: str
    metrics: dict[str, Difference]


@dataclass(frozen=True)
class SavedReport:
    """An evaluation.json: systems, the one in question first, their comparisons, and where the figures come from."""

    systems: list[SavedEvaluation]
    comparisons: list[SavedComparison]
    source: dict[str, Any]


def read_evaluation(path: str | os.PathLike[str]) -> SavedReport:
    """Read what `pinrec evaluate` wrote.

    Args:
        path: of evaluation.json, or of the folder that holds it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no evaluation.json of this format.
    """
    file = Path(path) / "evaluation.json" if os.path.isdir(path) else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        systems = [_system(entry) for entry in content["evaluations"]]
        comparisons = [
            SavedComparison(c["a"], c["b"], {name: Difference(**_numbers(d)) for name, d in c["metrics"].items()})
            for c in content["comparisons"]
        ]
        return SavedReport(systems, comparisons, content.get("source", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no evaluation.json that this version reads ({type(error).__name__}: {error}); make it by "
            "`pinrec evaluate`"
        ) from error


def _system(entry: dict[str, Any]) -> SavedEvaluation:
    return SavedEvaluation(
        name=entry["name"],
        split=entry["split"],
        ks=tuple(entry["ks"]),
        metrics=_intervals(entry["metrics"]),
        groups={
            kind: {group: _intervals(figures) for group, figures in groups.items()}
            for kind, groups in entry["groups"].items()
        },
        coverage=entry["coverage"],
        embeddings=entry["embeddings_per_request"],
        num_requests=entry["num_requests"],
        num_targets=entry["num_targets"],
        num_users=entry["num_users"],
        catalogue_size=entry["catalogue_size"],
    )


def _intervals(figures: dict[str, dict[str, Any]]) -> dict[str, Interval]:
    return {name: Interval(**_numbers(figure)) for name, figure in figures.items()}


def _numbers(figure: dict[str, Any]) -> dict[str, Any]:
    """null was NaN: nothing to count."""
    return {name: math.nan if value is None else value for name, value in figure.items()}
