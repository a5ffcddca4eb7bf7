"""`pinrec trace`: a user's history and the path of interests that the model generates from it."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pinrec_hf.commands.console import add_command, print_json, table
from pinrec_hf.commands.retrieval import add_model, add_request, history_table, load_retriever, request_fields
from pinrec_hf.data.output import replaced


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "trace",
        trace,
        "show where a user's interests came from and where the model sees them go, step by step",
        "  pinrec trace --model pinrec-base --data data --user u17 --surface homefeed --num-steps 6 --picture u17.png",
    )
    add_model(parser)
    parser.add_argument("--data", required=True, help="folder that `pinrec prepare` wrote")
    parser.add_argument("--user", required=True, help="user id in --data")
    parser.add_argument("--nearest", type=int, default=3, help="items shown a generated embedding (default: 3)")
    parser.add_argument("--picture", help="also draw the path on a map of the catalogue: a new .png or .svg file")
    add_request(parser)
    parser.set_defaults(num_steps=6)


def trace(args: argparse.Namespace) -> None:
    from pinrec_hf.retrieval.trace import plot_trace
    from pinrec_hf.retrieval.trace import trace as trace_request
    from pinrec_hf.retrieval.users import find_user

    if args.picture and os.path.lexists(args.picture):
        raise FileExistsError(f"{args.picture} exists: choose another --picture, or remove it first")
    if args.nearest < 1:
        raise ValueError(f"--nearest {args.nearest}: show at least 1 item")
    retriever = load_retriever(args)
    history, split = find_user(args.data, args.user, retriever.tokenizer)
    request = {"history": history, **request_fields(args, retriever)}
    titles = ["title"] if retriever.items is not None and "title" in retriever.items.names else []
    traced = trace_request(retriever, request, nearest=args.nearest, columns=titles)
    if args.picture:
        acted = [
            item
            for item, outcomes in zip(history["item_id"], history["outcomes"], strict=True)
            if item is not None and outcomes
        ]
        rows = retriever.tokenizer.catalogue.rows(acted)
        where = args.surface or "an unknown surface"
        figure = plot_trace(retriever, rows[rows >= 0], traced, f"{args.user} on {where}: {args.num_steps} steps ahead")
        with replaced(args.picture) as partial:
            figure.savefig(partial, format=Path(args.picture).suffix[1:] or "png", dpi=120)
    if args.json:
        asked = request_fields(args, retriever)
        print_json({"user": args.user, "split": split, "request": asked, "steps": [asdict(one) for one in traced]})
        return
    print(f"{args.user}: the last events up to the end of {split}\n\n{history_table(retriever, history)}\n")
    print(
        f"generated on {args.surface or 'an unknown surface'}, nearest items first; * is fed back as the next event\n"
    )
    lines = []
    for one in traced:
        for place, candidate in enumerate(one.nearest):
            head = [one.step, one.outcome or "any", f"{one.share:.0%}"] if not place else ["", "", ""]
            if retriever.model.config.time_offsets:
                head.append(f"+{one.offset} s" if not place else "")
            mark = "*" if one.is_fed and not place else ""
            lines.append([*head, mark, f"{candidate.score:.3f}", candidate.item_id, candidate.title or ""])
    header = ["step", "outcome", "share", *["offset"] * bool(retriever.model.config.time_offsets), "", "score", "item"]
    print(table([*header, "title" if titles else ""], lines, right=["step", "share", "offset", "score"]))
    if args.picture:
        print(f"\nthe map: {args.picture}")
