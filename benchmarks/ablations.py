"""Writes docs/ablations.md from benchmarks/results/surfaces.json. Run by benchmarks/surfaces.py after every row."""

import json
from collections.abc import Iterator
from typing import Any

from runs import RESULTS, ROOT

PAPER = (
    ("no surface or outcome condition", "-7.5 to -12.6 %", ("KuaiRand: surface cond", "KuaiRand: outcome cond")),
    ("finetuning on a surface's impressions", "+2.0 to +4.5 %", ("KuaiRand: finetuning", "simulator: finetuned")),
    ("impressions as negatives", "about +0.4 %", ("KuaiRand: impression negatives",)),
    ("16 steps against 1, unordered recall", "up to +71 %", ("ML-1M, next 10", "simulator: several steps")),
)
"""What arXiv 2504.10507 v7 reports (its abstract page and summaries), and which of our claims stand beside it."""

PICTURE = """[![Recall against intra-list diversity, a line a system through its settings](frontier.png)](frontier.png)

A line goes through its settings in the order of the legend, the last is named; crosses are 95 % intervals."""

HEAD = """# Ablations: surfaces, outcomes, steps

Made by `make benchmark-surfaces` from `benchmarks/results/surfaces.json`; do not edit. In words:
[benchmarks.md](benchmarks.md#surfaces-outcomes-and-steps). Differences are relative, in percent, with 95 % intervals
over users (paired by user and seed); `detectable` is the smallest that the data would have shown with a power of
80 %. Simulated worlds: one seed each, all figures in `benchmarks/results/worlds.json`. A claim that is missed or null
is listed as such.
"""
BESIDE = """## Beside the paper

What the paper reports is taken from the abstract page and summaries of its v7, not checked against its tables. It
counts unordered recall, which more embeddings raise by themselves; ours of steps is at equal slots.
"""
ORDER = ("KuaiRand", "ML-1M", "simulator", "adapters")


def write_ablations() -> None:
    """docs/ablations.md, whole."""
    rows = json.loads((RESULTS / "surfaces.json").read_text())
    rows.sort(key=lambda row: (ORDER.index(row["claim"].partition(":")[0].partition(",")[0]), row["claim"]))
    claims = [row for row in rows if row["target"] != "drawn"]
    lines = [HEAD, BESIDE, "| the paper (v7) | reports | here |", "|---|---|---|"]
    for what, reported, prefixes in PAPER:
        ours = [row for row in rows if row["claim"].startswith(prefixes)]
        here = "<br>".join(f"{row['claim']}: {headline(row['value'])}" for row in ours) or "not measured"
        lines.append(f"| {what} | {reported} | {here} |")
    lines += ["", "## Claims", "", "| claim | target | met |", "|---|---|---|"]
    lines += [f"| {row['claim']} | {row['target']} | {'yes' if row['met'] else '**no**'} |" for row in claims]
    for row in rows:
        lines += ["", f"### {row['claim']}", ""]
        if row in claims:
            lines += [f"Target: {row['target']}. {'Met.' if row['met'] else '**Missed.**'}", "", *told(row["value"])]
        else:
            lines.append(PICTURE)
        commits = ", ".join(f"`{commit[:7]}`" for commit in row["commit"].split(", "))
        lines += ["", f"`{row['command']}`, seeds {row['seed']}, commit {commits}."]
    (ROOT / "docs" / "ablations.md").write_text("\n".join(lines) + "\n")


def headline(value: Any) -> str:
    """The first gain that a value holds, or how many worlds hold it."""
    if isinstance(value, dict):
        if "percent" in value:
            return gain_text(value)
        if "worlds above 0" in value:
            mean = f", mean {value['mean percent']:+.1f} %" if "mean percent" in value else ""
            return f"above 0 in {value['worlds above 0']} of {len(value['worlds'])} worlds{mean}"
        for entry in value.values():
            if text := headline(entry):
                return text
    return ""


def told(value: Any) -> list[str]:
    """A value as tables: of gains, of gains a world, of a matrix condition x outcome, of a dial a world; and lines."""
    if not isinstance(value, dict):
        return [f"- {number_text(value)}"]
    if "monotone" in value:
        return dial_table(value)
    if "worlds" in value:
        value = {"all": value, **{name: entry for name, entry in value.items() if name != "worlds"}}
    entries = dict(flat(value))
    worlds = {name: entry for name, entry in entries.items() if isinstance(entry, dict) and "worlds" in entry}
    gains = {name: entry for name, entry in entries.items() if isinstance(entry, dict) and "worlds" not in entry}
    matrix = {name: entry for name, entry in entries.items() if " under " in name}
    lines: list[str] = []
    if worlds:
        seeds = list(next(iter(worlds.values()))["worlds"])
        lines += header(["", "above 0 in", "mean", *(f"world {seed}" for seed in seeds)])
        for name, entry in worlds.items():
            mean = f"{entry['mean percent']:+.1f} %" if "mean percent" in entry else ""
            mean += f", at least {entry['lower end']:+.1f} %" if entry.get("lower end") is not None else ""
            cells = [short_text(entry["worlds"][seed]) for seed in seeds]
            lines.append("| " + " | ".join([name, f"{entry['worlds above 0']} of {len(seeds)}", mean, *cells]) + " |")
        lines.append("")
    if gains:
        lines += header(["", "difference", "detectable"])
        lines += [f"| {name} | {short_text(entry)} | {detectable_text(entry)} |" for name, entry in gains.items()]
        lines.append("")
    if matrix:
        outcomes, conditions = (list(dict.fromkeys(n.split(" under ")[i] for n in matrix)) for i in (0, 1))
        found = {tuple(name.split(", ")[-1].split(" under ")): entry for name, entry in matrix.items()}
        outcomes = [name.split(", ")[-1] for name in outcomes]
        lines += header(["recall@10 of targets", *(f"asked for {c}" for c in conditions)])
        for outcome in dict.fromkeys(outcomes):
            lines.append(f"| {outcome} | " + " | ".join(f"{found[outcome, c]:.4f}" for c in conditions) + " |")
        lines.append("")
    rest = entries.keys() - worlds.keys() - gains.keys() - matrix.keys()
    lines += [f"- {name}: {number_text(entries[name])}" for name in entries if name in rest and name != "validation"]
    return lines[:-1] if lines and not lines[-1] else lines


def flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dicts, down to gains and to gains a world; counts of the latter come with them."""
    for name, entry in value.items():
        leaf = not isinstance(entry, dict) or entry.keys() & {"percent", "difference", "worlds"}
        if leaf and name not in ("worlds above 0", "mean percent"):
            yield f"{prefix}{name}", entry
        elif not leaf:
            yield from flat(entry, f"{prefix}{name}, ")


def dial_table(value: dict[str, Any]) -> list[str]:
    lines = header(["world", "saves rise, clicks fall", "saves gained a click lost", "popularity's dial", "two-tower's",
                    "saves a request, from all-click to all-save", "clicks"])  # fmt: skip
    for seed, world in value["worlds"].items():
        saves, clicks = zip(*world["saves and clicks a request, from all-click to all-save"]["pinrec"], strict=True)
        prices = world["saves gained per click lost"]
        cells = ["yes" if world["monotone"] else "no", *(number_text(prices[n]) for n in prices)]
        cells += [", ".join(f"{figure:.3f}" for figure in figures) for figures in (saves, clicks)]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    counts = f"Monotone in {value['monotone']}, better than the other dials in {value['better than the other dials']}."
    return [*lines, "", counts]


def header(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def number_text(value: Any) -> str:
    """A number, or a list of numbers or of lists of them."""
    if isinstance(value, list):
        lists = any(isinstance(entry, list) for entry in value)
        return ("; " if lists else ", ").join(number_text(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_text(gain: dict[str, Any]) -> str:
    if "percent" not in gain:
        return f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
    numbers = [gain.get(name) for name in ("percent", "low", "high")]
    return "-" if None in numbers else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*numbers)


def detectable_text(gain: dict[str, Any]) -> str:
    return f"{gain['detectable']:.1f}" if gain.get("detectable") is not None else "-"


def gain_text(gain: dict[str, Any]) -> str:
    numbers = [gain.get(name) for name in ("percent", "low", "high")]
    if None in numbers:
        return "nothing to compare"
    text = "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*numbers)
    return text + (f", detectable {gain['detectable']:.1f} %" if gain.get("detectable") is not None else "")


if __name__ == "__main__":
    write_ablations()
