"""`pinrec demo`: a page on which dials are turned and candidates change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pinrec_hf.commands.console import add_command
from pinrec_hf.commands.retrieval import add_model, load_retriever


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        demo,
        "show an indexed model on a page: turn an outcome's dial, see the candidates change, and read why",
        "  pinrec demo --model pinrec-base --data data --compare two-tower",
    )
    add_model(parser)
    parser.add_argument("--data", help="folder that `pinrec prepare` wrote, whose users can be chosen")
    parser.add_argument("--compare", metavar="MODEL", help="folder of another model of the same data, to stand beside")
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")


def demo(args: argparse.Namespace) -> None:
    try:
        from pinrec_hf.demo.page import launch
    except ImportError as error:
        raise ImportError(f'{error}: `pip install ".[demo]"` in the clone first') from error
    from pinrec_hf.demo.visit import Demo
    from pinrec_hf.evaluation.ranker import load_model_ranker

    retriever = load_retriever(args)
    compare = load_model_ranker(args.compare) if args.compare else None
    launch(Demo(retriever, Path(args.model).name, args.data, compare), server_name=args.host, server_port=args.port)
