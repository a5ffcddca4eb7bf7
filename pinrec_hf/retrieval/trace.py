"""`pinrec trace`: where a user's interests came from, and where the model sees them go, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever, Retrieved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_ITEMS, MAP_EVENTS = 5_000, 20
LABEL_WIDTH = 34
MARK_POINTS = 14.5


@dataclass(frozen=True)
class TracedEmbedding:
    """One generated embedding.

    Attributes:
        step: from 1. outcome: asked for, None = unspecified. offset: seconds after the request.
        share: of the request's slots. nearest: the eligible items nearest to it, best first.
        is_fed: whether the first of them was fed back as the next event.
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
        history_rows: int64 catalogue rows of the history's items, oldest first, those that the catalogue knows; the
            last `MAP_EVENTS` are drawn.
        small: the map alone, for a page that says beside it what each step points at.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from pinrec_hf.evaluation.plots import Figure

    items = retriever.index.catalogue_embeddings()[:, : retriever.model.config.hidden_size]
    shown = items[np.random.default_rng(0).permutation(len(items))[:MAP_ITEMS]]
    centre = shown.mean(0)
    axes = np.linalg.svd(shown - centre, full_matrices=False)[2][:2].T

    def place(rows: Any) -> np.ndarray:
        return (items[np.asarray(rows, np.int64)] - centre) @ axes

    figure = Figure(figsize=(6, 4.2) if small else (11, 5.4), layout="constrained")
    ax = figure.subplots() if small else figure.subplots(1, 2, width_ratios=(5, 3))[0]
    background = (shown - centre) @ axes
    ax.scatter(background[:, 0], background[:, 1], s=5, color="#d4d4d8", linewidths=0, zorder=0, rasterized=small)
    history_rows = history_rows[-MAP_EVENTS:]
    if len(history_rows):
        past = place(history_rows)
        ax.plot(*past.T, color="#a1a1aa", linewidth=0.8, zorder=1)
        colours = np.column_stack([np.full((len(past), 3), 0.3), np.linspace(0.2, 1, len(past))])
        ax.scatter(past[:, 0], past[:, 1], s=34, c=colours, linewidths=0, zorder=2)
    ax.set(title=title, xticks=[], yticks=[])
    ax.margins(0.05)
    ax.spines[:].set_visible(False)
    if not small:
        ax.set_xlabel(
            f"grey: the last {MAP_EVENTS} items of the history, older is fainter; dashed, ↩: what is fed back"
        )
        _list_steps(figure.axes[1], traced, retriever.model.config.positive_outcomes)
    pointing = [one for one in traced if one.nearest]
    if pointing:
        figure.draw_without_rendering()  # only then it is known where on the paper a place lies
        ax.autoscale(False)
        paper = ax.transData.transform(place([one.nearest[0].row for one in pointing]))
        marks = ax.transData.inverted().transform(spread(paper, MARK_POINTS * figure.dpi / 72))
        path = [mark for one, mark in zip(pointing, marks, strict=True) if one.is_fed]
        if len(history_rows) and path:
            ax.plot(*np.array([past[-1], *path]).T, color="#18181b", linewidth=1.4, linestyle=(0, (4, 2)), zorder=3)
        for one, (x, y) in zip(pointing, marks, strict=True):
            colour = outcome_colour(one.outcome, retriever.model.config.positive_outcomes)
            ax.scatter(x, y, s=MARK_POINTS**2, color=colour, edgecolors="white", zorder=4)
            style: dict[str, Any] = {"color": "white", "weight": "bold", "ha": "center", "va": "center_baseline"}
            ax.text(x, y, str(one.step), fontsize=10.5, zorder=5, **style)
    return figure


def spread(points: np.ndarray, distance: float, rounds: int = 500) -> np.ndarray:
    """Points float64 `(n, 2)`, pushed apart until next to none are nearer to each other than `distance`."""
    points = points + 1e-3 * np.arange(len(points))[:, None]  # equal ones need a direction
    for _ in range(rounds):
        gaps = points[:, None] - points
        lengths = np.linalg.norm(gaps, axis=-1)
        np.fill_diagonal(lengths, np.inf)
        if lengths.min() >= 0.99 * distance:
            break
        points = points + 0.25 * (gaps * (np.maximum(distance - lengths, 0) / lengths)[..., None]).sum(1)
    return points


def _list_steps(ax: Any, traced: Sequence[TracedEmbedding], outcomes: Sequence[str]) -> None:
    """What each step points at, in words."""
    pointing = [one for one in traced if one.nearest]
    for line, one in enumerate(pointing):
        name = str(one.nearest[0].title or one.nearest[0].item_id)
        name = name if len(name) <= LABEL_WIDTH else name[: LABEL_WIDTH - 1] + "…"
        style = {"fontsize": 9, "va": "center"}
        if line == 0 or one.step != pointing[line - 1].step:
            ax.text(0, -line, str(one.step), weight="bold", **style)
        ax.text(0.07, -line, one.outcome or "any", color=outcome_colour(one.outcome, outcomes), weight="bold", **style)
        ax.text(0.27, -line, name + ("  ↩" if one.is_fed else ""), **style)
    ax.set(xlim=(0, 1), ylim=(-max(len(pointing), 12) + 0.5, 0.5))
    ax.axis("off")


def outcome_colour(outcome: str | None, outcomes: Sequence[str]) -> str:
    """An outcome's colour by its place among the model's positive `outcomes`; unspecified is dark grey."""
    from pinrec_hf.evaluation.plots import COLOURS

    return "#3f3f46" if outcome is None else COLOURS[list(outcomes).index(outcome) % len(COLOURS)]
