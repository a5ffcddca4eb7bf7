"""`pinrec trace`: where a user's interests came from, and where the model sees them go, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever, Retrieved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_ITEMS = 5_000
LABEL_WIDTH = 34


@dataclass(frozen=True)
class TracedEmbedding:
    """One generated embedding.

    Attributes:
        step: from 1. outcome: asked for, None = unspecified. offset: seconds after the request.
        share: of the request's slots. nearest: the eligible items nearest to it, best first.
        is_fed: whether the first of them was fed back as the next event; an item that the request may not be given,
            such as one that is not live, can be fed back too and is not shown.
    """

    step: int
    outcome: str | None
    offset: int
    share: float
    nearest: list[Candidate]
    is_fed: bool


def trace(
    retriever: PinRecRetriever, request: Mapping[str, Any], *, nearest: int = 3, columns: Sequence[str] = ()
) -> list[TracedEmbedding]:
    """What is generated for one request of the schema (`num_steps` in it), with the nearest items of each embedding.

    Raises:
        ValueError: as `PinRecRetriever.recommend`.
    """
    steps = request.get("num_steps") or retriever.num_steps
    ((rows, scores, by),) = retriever.lists([request], min(nearest + steps, len(retriever.index)), np.inf)
    for i, step in enumerate(by.steps):  # what was fed back before is behind
        new = ~np.isin(rows[i], by.fed_rows[: step - 1])
        order = np.argsort(~new, kind="stable")
        rows[i], scores[i] = np.where(new, rows[i], -1)[order], scores[i][order]
    rows, scores = rows[:, :nearest], scores[:, :nearest]
    names = [None, *retriever.model.config.outcomes]
    codes, numbers = (np.broadcast_to(values[:, None], rows.shape) for values in (by.outcomes, by.steps))
    candidates = retriever.candidates(Retrieved(rows, scores, codes, numbers, names), columns)
    fed = {(step, int(row)) for step, row in enumerate(by.fed_rows, start=1)}
    return [
        TracedEmbedding(
            step=int(by.steps[i]),
            outcome=names[by.outcomes[i]],
            offset=int(by.offsets[i]),
            share=float(by.weights[i]),
            nearest=candidates[i],
            is_fed=bool(candidates[i]) and (int(by.steps[i]), candidates[i][0].row) in fed,
        )
        for i in range(len(rows))
    ]


def plot_trace(
    retriever: PinRecRetriever,
    history_rows: np.ndarray,
    traced: Sequence[TracedEmbedding],
    title: str = "",
    *,
    small: bool = False,
) -> Figure:
    """The path of interests on a map of the catalogue, its two main directions (PCA of the item embeddings).

    Args:
        history_rows: int64 catalogue rows of the history's items, oldest first, those that the catalogue knows.
        small: points carry their step's number instead of titles, and there is no legend: for a page, which says
            both beside the map.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import offset_copy

    from pinrec_hf.evaluation.plots import Figure

    items = retriever.index.catalogue_embeddings()[:, : retriever.model.config.hidden_size]
    shown = items[np.random.default_rng(0).permutation(len(items))[:MAP_ITEMS]]
    centre = shown.mean(0)
    axes = np.linalg.svd(shown - centre, full_matrices=False)[2][:2].T

    def place(rows: Any) -> np.ndarray:
        return (items[np.asarray(rows, np.int64)] - centre) @ axes

    figure = Figure(figsize=(6, 4.2) if small else (11, 7), layout="constrained")
    ax = figure.subplots()
    background = (shown - centre) @ axes
    ax.scatter(
        background[:, 0],
        background[:, 1],
        s=5,
        color="#d4d4d8",
        linewidths=0,
        label="items",
        zorder=0,
        rasterized=small,
    )
    if len(history_rows):
        past = place(history_rows)
        ax.plot(*past.T, color="#a1a1aa", linewidth=0.8, zorder=1)
        colours = np.column_stack([np.full((len(past), 3), 0.3), np.linspace(0.2, 1, len(past))])
        ax.scatter(past[:, 0], past[:, 1], s=34, c=colours, linewidths=0, zorder=2, label="history, older is fainter")
    outcomes = list(dict.fromkeys(one.outcome for one in traced))
    path = [one.nearest[0].row for one in traced if one.is_fed]
    if len(history_rows) and path:
        line = np.concatenate([past[-1:], place(path)])
        ax.plot(*line.T, color="#18181b", linewidth=1.4, linestyle=(0, (4, 2)), zorder=3, label="fed back")
    for number, outcome in enumerate(outcomes):
        own = [one for one in traced if one.outcome == outcome and one.nearest]
        points = place([one.nearest[0].row for one in own])
        colour = outcome_colour(outcome, retriever.model.config.positive_outcomes)
        if small:  # outcomes that point at the same item stand side by side
            beside = offset_copy(ax.transData, figure, x=13 * (number - (len(outcomes) - 1) / 2), units="points")
            for one, (x, y) in reversed(list(zip(own, points.tolist(), strict=True))):  # early steps on top
                layer = 5 - one.step / 99
                ax.scatter(x, y, s=210, color=colour, edgecolors="white", transform=beside, zorder=layer)
                number_style: dict[str, Any] = {
                    "color": "white",
                    "weight": "bold",
                    "ha": "center",
                    "va": "center_baseline",
                }
                ax.text(x, y, str(one.step), fontsize=10.5, transform=beside, zorder=layer, **number_style)
            continue
        ax.scatter(
            points[:, 0], points[:, 1], s=70, color=colour, edgecolors="white", zorder=4, label=outcome or "any outcome"
        )
        for one, point in zip(own, points, strict=True):
            name = str(one.nearest[0].title or one.nearest[0].item_id)
            text = f"{one.step}  {name if len(name) <= LABEL_WIDTH else name[: LABEL_WIDTH - 1] + '…'}"
            label = ax.annotate(text, point, xytext=(7, 4 - 11 * number), textcoords="offset points", fontsize=9)
            label.set(color=colour, path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=6)
    ax.set(title=title, xticks=[], yticks=[])
    ax.margins(0.05 if small else 0.12)
    ax.spines[:].set_visible(False)
    if not small:
        ax.legend(loc="best", frameon=False, fontsize=9)
    return figure


def outcome_colour(outcome: str | None, outcomes: Sequence[str]) -> str:
    """An outcome's colour by its place among the model's positive `outcomes`; unspecified is dark grey."""
    from pinrec_hf.evaluation.plots import COLOURS

    return "#3f3f46" if outcome is None else COLOURS[list(outcomes).index(outcome) % len(COLOURS)]
