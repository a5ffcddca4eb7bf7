"""`pinrec monitor`: yesterday's log and the model that served it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pinrec_hf.commands.console import add_adapter, add_command, parse_adapters, print_json, table


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "monitor",
        monitor,
        "report what a served model did with the last days of a log: freshness, budgets, coverage, norms, recall",
        "  pinrec monitor --model pinrec-base --data data --json > today.json\n"
        "  pinrec monitor --model pinrec-base --data data --before yesterday.json",
    )
    parser.add_argument("--model", required=True, help="folder or Hub repo of an indexed model")
    parser.add_argument("--revision", help="of a Hub repo")
    add_adapter(parser)
    parser.add_argument("--data", required=True, help="`pinrec prepare` of a log that ends with the days in question")
    parser.add_argument("--before", help="what --json said of another day, to stand beside")
    parser.add_argument("-k", type=int, default=10, help="slots a request (default: %(default)s)")
    parser.add_argument("--max-users", type=int, help="a random sample of this many users (default: all)")


def monitor(args: argparse.Namespace) -> None:
    from pinrec_hf.evaluation.monitor import daily_figures
    from pinrec_hf.retrieval.pretrained import find_folder
    from pinrec_hf.retrieval.retriever import PinRecRetriever

    before = json.loads(Path(args.before).read_text("utf-8")) if args.before else {}
    if not isinstance(before, dict):
        raise ValueError(f"--before {args.before} holds no figures: give what `pinrec monitor --json` printed")
    folder = find_folder(args.model, args.revision)
    retriever = PinRecRetriever.from_pretrained(folder, adapters=parse_adapters(args.adapter))
    figures = daily_figures(retriever, folder, args.data, k=args.k, max_users=args.max_users)
    if args.json:
        print_json(figures)
        return
    columns = ["", "now", "before"] if before else ["", "now"]
    print(table(columns, [[name, *(_shown(f.get(name)) for f in (figures, before) if f)] for name in figures]))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    if isinstance(value, list):
        return "{:.4f} [{:.4f}, {:.4f}]".format(*value)
    return "unknown" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
