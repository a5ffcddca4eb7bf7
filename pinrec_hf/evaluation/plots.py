"""The plots of reports: recall by group, the learning curve, recall over diversity, days. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pinrec_hf.evaluation.bootstrap import Interval

if TYPE_CHECKING:
    from pinrec_hf.evaluation.frontier import FrontierPoint

try:
    from matplotlib.figure import Figure  # no pyplot: no window, no global state
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the report\'s plots need matplotlib: install it with `pip install ".[report]"` in the clone',
        name="matplotlib",
    ) from error

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: safe for all eyes
MARKERS = "osD^vP"
FEWEST_USERS = 30  # a group of fewer says nothing, and its interval would flatten all others; it is in the tables
MOST_GROUPS = 12


class Measured(Protocol):
    """What is plotted of a system: an `Evaluation`, or a `SavedEvaluation`."""

    @property
    def name(self) -> str: ...
    @property
    def ks(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> dict[str, dict[str, dict[str, Interval]]]: ...


def plot_groups(systems: Sequence[Measured], kind: str) -> Figure:
    """Recall by the groups of one kind: a panel per depth, a line per group, a mark with its interval per
    system."""
    ks = systems[0].ks
    figures = {name: group for system in systems for name, group in system.groups.get(kind, {}).items()}
    users = {name: max(figure.users for figure in group.values()) for name, group in figures.items()}
    shown = [name for name in figures if users[name] >= min(FEWEST_USERS, max(users.values()))][:MOST_GROUPS]
    height = 1.5 + len(shown) * max(0.45, 0.2 * len(systems) + 0.15)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(1, len(ks), sharey=True, squeeze=False)[0]
    offsets = (np.arange(len(systems)) - (len(systems) - 1) / 2) * 0.7 / max(len(systems), 2)
    for ax, k in zip(axes, ks, strict=True):
        for number, system in enumerate(systems):
            group = [system.groups.get(kind, {}).get(name, {}).get(f"recall@{k}") for name in shown]
            there = [(place, interval) for place, interval in enumerate(group) if interval is not None]
            if not there:  # measured at other depths
                continue
            value = np.array([interval.value for _, interval in there])
            low, high = np.array([(interval.low, interval.high) for _, interval in there]).T
            ax.errorbar(
                value,
                np.array([place for place, _ in there]) + offsets[number],
                xerr=np.maximum([value - low, high - value], 0),
                fmt=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markersize=6,
                elinewidth=1.6,
                capsize=3,
                clip_on=False,  # whole marks at 0
                label=system.name,
            )
        ax.set_title(f"Recall@{k}", fontsize=11, loc="left")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        ax.set_yticks(range(len(shown)), [f"{_short(name)}\n{users[name]:,} users" for name in shown], fontsize=9)
        ax.set_ylim(len(shown) - 0.5, -0.5)  # the first group on top
        for line in range(1, len(shown)):
            ax.axhline(line - 0.5, color="#e4e4e4", linewidth=0.8, zorder=0)
        _bare(ax)
    axes[0].set_ylabel(kind)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 45 else min(len(labels), 3)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=10)
    return figure


def plot_learning_curve(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss, and recall on validation where it was measured, by training step, from a trainer's
    `log_history`."""
    recalls = sorted({name for entry in history for name in entry if name.startswith("eval_recall@")}, key=_depth)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if recalls else 1, sharex=True, squeeze=False)[0]
    for number, (name, label) in enumerate((("loss", "training"), ("eval_loss", "validation"))):
        _curve(axes[0], history, name, label, number)
    axes[0].set_title("Loss", fontsize=11, loc="left")
    if recalls:
        for number, name in enumerate(recalls):
            _curve(axes[1], history, name, name.removeprefix("eval_"), number)
        axes[1].set_title("On validation", fontsize=11, loc="left")
        axes[1].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("training step")
        ax.legend(frameon=False, fontsize=10)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _bare(ax)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    return figure


def plot_frontier(points: Sequence[FrontierPoint]) -> Figure:
    """Recall over intra-list diversity, a line a system through its settings, the last of them named, with intervals
    over users."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    ax = figure.subplots()
    for number, system in enumerate(dict.fromkeys(point.system for point in points)):
        own = [point for point in points if point.system == system]
        x, y = (
            np.array([[f.value, f.low, f.high] for f in part]).T
            for part in ([point.diversity for point in own], [point.recall for point in own])
        )
        ax.errorbar(
            x[0],
            y[0],
            xerr=np.maximum([x[0] - x[1], x[2] - x[0]], 0),
            yerr=np.maximum([y[0] - y[1], y[2] - y[0]], 0),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            linewidth=1.2,
            elinewidth=0.6,
            label=f"{system}: {', '.join(f'{point.knob:g}' for point in own)}",
        )
        ax.annotate(f"{own[-1].knob:g}", (x[0][-1], y[0][-1]), (5, 5), textcoords="offset points", fontsize=9)
    ax.set_xlabel(f"intra-list diversity@{points[0].k}")
    ax.set_ylabel(f"recall@{points[0].k}")
    figure.legend(loc="outside upper left", frameon=False, fontsize=10)
    _bare(ax)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    return figure


def plot_days(rows: Sequence[dict[str, Any]], effort: str = "train_seconds") -> Figure:
    """What `prequential` gives: recall of each day with intervals, and what training took, a line a model."""
    names = list(dict.fromkeys(name for row in rows for name in row["models"]))
    metric = max((name for name in rows[0]["models"][names[0]] if name.startswith("recall@")), key=_depth)
    figure = Figure(figsize=(10, 4), layout="constrained")
    recall, seconds = figure.subplots(1, 2, sharex=True)
    for number, name in enumerate(names):
        there = [(place, row["models"][name]) for place, row in enumerate(rows) if name in row["models"]]
        places = np.array([place for place, _ in there])
        value, low, high = np.array([model[metric] for _, model in there]).T
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}
        recall.errorbar(
            places + 0.06 * (number - (len(names) - 1) / 2),  # intervals side by side
            value,
            yerr=np.maximum([value - low, high - value], 0),
            linewidth=1.6,
            elinewidth=1,
            label=name,
            **style,
        )
        seconds.plot(places, [model[effort] for _, model in there], linewidth=1.6, **style)
    recall.set_title(f"Recall@{_depth(metric)} of the day", fontsize=11, loc="left")
    seconds.set_title(f"Training for it, {effort.removeprefix('train_').replace('_', ' ')}", fontsize=11, loc="left")
    seconds.set_ylim(bottom=0)
    for ax in (recall, seconds):
        ax.set_xticks(range(len(rows)), [row["day"] for row in rows], fontsize=9)
        _bare(ax)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    figure.legend(*recall.get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=10)
    return figure


def _curve(ax: Any, history: Sequence[dict[str, Any]], name: str, label: str, number: int) -> None:
    points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    if points:
        marker = "o" if len(points) <= 40 else None  # single measurements stay visible
        ax.plot(*zip(*points, strict=True), color=COLOURS[number], marker=marker, markersize=4, label=label)


def _bare(ax: Any) -> None:
    """Only the lines that help reading."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=0, pad=7)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)


def _depth(name: str) -> int:
    return int(name.rsplit("@", 1)[1])


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
