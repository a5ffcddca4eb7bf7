"""Writes docs/ablations.md from benchmarks/results/surfaces.json. Run by benchmarks/surfaces.py after every row."""

import json
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

Numbers beside the marks are the settings; crosses are 95 % intervals over users."""

HEAD = """# Ablations: surfaces, outcomes, steps

Made by `make benchmark-surfaces` from `benchmarks/results/surfaces.json`; do not edit. Percentages are relative,
brackets are 95 % intervals over users (paired by user and seed), `detectable` is the smallest difference that the
data would have shown with a power of 80 %. Simulated worlds: one seed each, all figures in
`benchmarks/results/worlds.json`. A claim that is missed or null is listed as such. Rows are of the commit that they
name; what was corrected since, and may move them: [benchmarks.md](benchmarks.md#surfaces-outcomes-and-steps).
"""


def write_ablations() -> None:
    """docs/ablations.md, whole."""
    rows = json.loads((RESULTS / "surfaces.json").read_text())
    lines = [HEAD, "## Beside the paper", "", "| the paper (v7) | reports | here |", "|---|---|---|"]
    for what, reported, prefixes in PAPER:
        ours = [row for row in rows if row["claim"].startswith(prefixes)]
        here = "<br>".join(f"{row['claim']}: {headline(row['value'])}" for row in ours) or "not measured"
        lines.append(f"| {what} | {reported} | {here} |")
    lines += ["", "## Claims", "", "| claim | target | met |", "|---|---|---|"]
    lines += [f"| {row['claim']} | {row['target']} | {'yes' if row['met'] else '**no**'} |" for row in rows]
    for row in rows:
        lines += [
            "",
            f"### {row['claim']}",
            "",
            f"Target: {row['target']}. {'Met.' if row['met'] else '**Missed.**'}",
            "",
        ]
        lines += [PICTURE] if row["claim"].endswith("intra-list diversity@10") else told(row["value"])
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


def told(value: Any, depth: int = 0) -> list[str]:
    """A value as a nested list."""
    indent = "  " * depth
    if not isinstance(value, dict):
        return [f"{indent}- {number_text(value)}"]
    lines = []
    for name, entry in value.items():
        if isinstance(entry, dict) and "percent" in entry:
            lines.append(f"{indent}- {name}: {gain_text(entry)}")
        elif isinstance(entry, dict) and {"difference", "low", "high"} <= entry.keys():
            lines.append(f"{indent}- {name}: {entry['difference']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}]")
        elif isinstance(entry, dict):
            lines += [f"{indent}- {name}:", *told(entry, depth + 1)]
        else:
            lines.append(f"{indent}- {name}: {number_text(entry)}")
    return lines


def number_text(value: Any) -> str:
    """A number, or a list of numbers or of pairs of them."""
    if isinstance(value, list):
        pairs = any(isinstance(entry, list) for entry in value)
        return (" -> " if pairs else ", ").join(number_text(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gain_text(gain: dict[str, Any]) -> str:
    numbers = [gain.get(name) for name in ("percent", "low", "high")]
    if None in numbers:
        return "nothing to compare"
    text = "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*numbers)
    return text + (f", detectable {gain['detectable']:.1f} %" if gain.get("detectable") is not None else "")


if __name__ == "__main__":
    write_ablations()
