"""Write evaluations as JSON, as a readable table, and as one self-contained page with plots (extra
`report`)."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinrec_hf.data.output import new_directory
from pinrec_hf.evaluation.bootstrap import Difference, Interval
from pinrec_hf.evaluation.evaluate import Comparison, Evaluation

if TYPE_CHECKING:
    from pinrec_hf.evaluation.plots import Figure

KINDS = ("surface", "outcome", "history length", "item popularity")
READING = (
    "Brackets are 95 % intervals, from resampling users. Recall is a mean over targets: the share of the "
    "items that users went on to act on that were in the list; items that they had acted on before are in "
    "neither. Differences are paired by user (and training seed); “could have shown” is the smallest true "
    "difference that this data would have found significant with 80 % probability. Where nothing or "
    "everything was hit, resampling cannot tell how sure that is, and the interval has no width."
)


@dataclass(frozen=True)
class Table:
    """A titled table of text, which becomes markdown or HTML."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.grid()}\n"

    def grid(self) -> str:
        """The markdown of the table itself; columns padded, so that it reads well as plain text too."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in [self.header, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def html(self) -> str:
        def line(tag: str, row: list[str]) -> str:
            # an interval stands below its figure, or five systems would not fit side by side
            cells = (html.escape(cell).replace(" [", "<br>[") for cell in row)
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line("td", row) for row in self.rows)
        head = f"<thead>{line('th', self.header)}</thead>"
        return f"<h2>{html.escape(self.title)}</h2><table>{head}<tbody>{body}</tbody></table>"


def write_report(
    output_dir: str | Path,
    evaluations: Evaluation | Sequence[Evaluation],
    *,
    comparisons: Sequence[Comparison] = (),
    trainer_state: str | Path | None = None,
    title: str = "PinRec evaluation",
    source: dict[str, Any] | None = None,
) -> Path:
    """Write `evaluation.json`, `evaluation.md` and `report.html` into a new directory.

    Args:
        output_dir: must not exist; it appears when everything is written.
        evaluations: one a system, the one in question first, baselines after it; they appear side by side.
        comparisons: from `compare`.
        trainer_state: a checkpoint's trainer_state.json, whose `log_history` gives the learning curve.
        title: of the page.
        source: what the figures come from, kept in evaluation.json for a model card: `weights`, a list of
            `weights_hash`, and `command`.

    Returns:
        The directory.

    Raises:
        FileExistsError: `output_dir` exists.
        ModuleNotFoundError: matplotlib is not installed; nothing is written.
        ValueError: nothing to report, two systems of one name, or a trainer state without a log.
    """
    systems = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    names = [system.name for system in systems]
    if not systems or len(set(names)) < len(names):
        raise ValueError(
            f"the systems are called {names}: give at least one, each with a name of its own (evaluate(name=...))"
        )
    history = None if trainer_state is None else read_log_history(trainer_state)
    from pinrec_hf.evaluation.plots import plot_groups, plot_learning_curve

    figures = [
        (f"Recall by {kind}", plot_groups(systems, kind))
        for kind in KINDS
        if any(kind in system.groups for system in systems)
    ]
    if history is not None:
        figures.append(("Learning curve", plot_learning_curve(history)))
    tables = report_tables(systems, comparisons)
    with new_directory(output_dir) as folder:
        content = {
            "format": 1,
            "source": source or {},
            "evaluations": [system.to_dict() for system in systems],
            "comparisons": [comparison.to_dict() for comparison in comparisons],
        }
        text = json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        markdown = [f"# {title}\n", _about(systems) + "\n", READING + "\n", *(t.markdown() for t in tables)]
        (folder / "evaluation.md").write_text("\n".join(markdown), encoding="utf-8")
        (folder / "report.html").write_text(_page(title, systems, tables, figures), encoding="utf-8")
    return Path(output_dir)


def report_tables(systems: Sequence[Evaluation], comparisons: Sequence[Comparison] = ()) -> list[Table]:
    """The tables of a report: overall, the comparisons, then recall by group."""
    metrics = list(dict.fromkeys(name for system in systems for name in system.metrics))
    wide = list(dict.fromkeys(name for system in systems for name in system.coverage))
    items = f"of {len(systems[0].requests.item_counts):,}"
    rows = [[name, *(_figure(system.metrics.get(name)) for system in systems)] for name in metrics]
    rows += [[f"{name} {items}", *(f"{s.coverage[name]:,}" for s in systems)] for name in wide]
    rows.append(["embeddings per request", *(str(system.embeddings) for system in systems)])
    for name in dict.fromkeys(name for system in systems for name in system.slots):
        slots = [system.slots.get(name, {}) for system in systems]
        rows.append(
            [
                f"slots per request ({name})",
                *(", ".join(f"{k}: {n}" for k, n in s.items()) or "-" for s in slots),
            ]
        )
    names = [system.name for system in systems]
    tables = [Table("Overall", ["", *names], rows)]
    for comparison in comparisons:
        groups = [("", comparison.metrics)] + [
            (f"{kind} {group}: ", figures)
            for kind in KINDS[:2]
            for group, figures in comparison.groups.get(kind, {}).items()
        ]
        seeds = f", {comparison.seeds} seeds" if comparison.seeds > 1 else ""
        tables.append(
            Table(
                f"{comparison.a} minus {comparison.b}{seeds}",
                ["", comparison.a, comparison.b, "difference", "relative", "could have shown", "users"],
                [difference_row(group + name, d) for group, figures in groups for name, d in figures.items()],
            )
        )
    for kind in dict.fromkeys(kind for system in systems for kind in system.groups):
        found = list(dict.fromkeys(group for system in systems for group in system.groups.get(kind, {})))
        rows = []
        for group in found:
            figures = [system.groups.get(kind, {}).get(group, {}) for system in systems]
            for metric in dict.fromkeys(name for figure in figures for name in figure):
                users = max(figure[metric].users for figure in figures if metric in figure)
                rows.append([group, metric, f"{users:,}", *(_figure(figure.get(metric)) for figure in figures)])
        tables.append(Table(f"Recall by {kind}", [kind, "", "users", *names], rows))
    return tables


def read_log_history(trainer_state: str | Path) -> list[dict[str, Any]]:
    """The `log_history` of a checkpoint's trainer_state.json.

    Raises:
        ValueError: the file is no trainer state, or holds no log.
    """
    try:
        history = json.loads(Path(trainer_state).read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{trainer_state} is no trainer state ({type(error).__name__}: {error}); give a checkpoint's "
            "trainer_state.json"
        ) from error
    if not any("step" in entry and ("loss" in entry or "eval_loss" in entry) for entry in history):
        raise ValueError(f"{trainer_state} holds no losses: train with logging_steps above 0")
    entries: list[dict[str, Any]] = history
    return entries


def _about(systems: Sequence[Evaluation]) -> str:
    """What was evaluated, in a sentence or two."""
    facts = systems[0].to_dict()
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in facts["dropped_targets"].items() if n)
    return (
        f"Split `{facts['split']}`: {facts['num_targets']:,} targets in {facts['num_requests']:,} requests "
        f"of {facts['num_users']:,} users; full ranking of {facts['catalogue_size']:,} items. "
        f"Positive events that are no targets: {dropped or 'none'}."
    )


def _figure(figure: Interval | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "-"
    return f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"


def difference_row(name: str, d: Difference) -> list[str]:
    """Cells: name, a, b, difference, relative, smallest detectable effect, users."""
    relative = f"{d.relative_percent:+.1f} % [{d.relative_low:+.1f}, {d.relative_high:+.1f}]"
    return [
        name,
        f"{d.a:.4f}",
        f"{d.b:.4f}",
        f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
        "-" if math.isnan(d.relative_percent) else relative,
        "-" if math.isnan(d.minimum_detectable_effect) else f"{d.minimum_detectable_effect:.4f}",
        f"{d.users:,}",
    ]


def without_nan(value: Any) -> Any:
    """The value for JSON, which has no NaN: null says that there was nothing to count."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _page(
    title: str, systems: Sequence[Evaluation], tables: Sequence[Table], figures: Sequence[tuple[str, Figure]]
) -> str:
    """One HTML page that needs nothing else: plots are embedded."""
    plots = []
    for caption, figure in figures:
        picture = io.BytesIO()
        figure.savefig(picture, format="svg")
        data = base64.b64encode(picture.getvalue()).decode("ascii")
        alt = html.escape(caption)
        plots.append(f'<h2>{alt}</h2><img alt="{alt}" src="data:image/svg+xml;base64,{data}">')
    overall, *rest = (table.html() for table in tables)
    about = html.escape(_about(systems)).replace("`", "")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
initial-scale=1"> <title>{html.escape(title)}</title><style> body {{ font: 15px/1.5 system-ui, sans-serif;
color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }} h1 {{ font-size: 1.7rem; }} h2 {{
font-size: 1.15rem; margin-top: 2.2rem; }} img {{ max-width: 100%; }} table {{ border-collapse: collapse;
font-variant-numeric: tabular-nums; font-size: .85rem; display: block;
  overflow-x: auto; }}
th, td {{ text-align: left; padding: .25rem .8rem; border-bottom: 1px solid #ddd;
  vertical-align: top; white-space: nowrap; }}
thead th {{ white-space: normal; }} thead th {{ border-bottom: 2px solid #222; }}
</style></head><body>
<h1>{html.escape(title)}</h1><p>{about}</p><p>{html.escape(READING)}</p>
{overall}
{"".join(plots)}
{"".join(rest)}
</body></html>
"""
