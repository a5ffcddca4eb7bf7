"""`pinrec prequential`: models that go on from the day before beside those that begin anew, day by day."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pinrec_hf.commands.console import add_command, print_json, table


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "prequential",
        prequential,
        "day by day, train on all days before and test on that day: models that go on, and models that begin anew",
        "  pinrec prequential --plan daily.yaml --output-dir prequential",
    )
    parser.add_argument(
        "--plan", required=True, help="YAML: the log, the days, and how models are trained (docs/daily.md)"
    )
    parser.add_argument("--output-dir", required=True, help="folder for prequential.json and .png, and for each day")


def prequential(args: argparse.Namespace) -> None:
    from pinrec_hf.evaluation.plots import plot_days  # missed now, if it is
    from pinrec_hf.evaluation.prequential import Plan
    from pinrec_hf.evaluation.prequential import prequential as run

    rows = run(Plan.read(args.plan), args.output_dir)
    plot_days(rows).savefig(Path(args.output_dir) / "prequential.png", dpi=120)
    if args.json:
        print_json(rows)
        return
    metrics = [name for name in next(iter(rows[0]["models"].values())) if name.startswith("recall@")]
    lines = [
        [row["day"], name, *(_shown(model[metric]) for metric in metrics),
         _shown(row["minus_first"][name][metrics[-1]], "+") if name in row["minus_first"] else "",
         f"{model['train_seconds']:,.0f}" + " (resumed)" * model["resumed"]]
        for row in rows for name, model in row["models"].items()
    ]  # fmt: skip
    first = next(iter(rows[0]["models"]))
    print(table(["day", "model", *metrics, f"{metrics[-1]} minus {first}", "train s"], lines, right=["train s"]))
    print(f"\nbrackets: 95 % intervals over users; {args.output_dir}/prequential.json and .png")


def _shown(figure: list[float], sign: str = "") -> str:
    return "{:{s}.4f} [{:{s}.4f}, {:{s}.4f}]".format(*figure, s=sign)
