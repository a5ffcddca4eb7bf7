"""`pinrec`: the command line. Commands live in `pinrec_hf/commands`, a file a stage of the data's way."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from transformers.utils import logging

import pinrec_hf
from pinrec_hf.commands import data, demo, evaluation, hub, monitor, prequential, retrieval, serving, trace


def build_parser() -> argparse.ArgumentParser:
    """The parser of `pinrec` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="pinrec",
        description="PinRec: logs of several surfaces to a generative retrieval model, its index and its evaluation.",
        epilog="Pretraining has a script of its own: accelerate launch training/pretrain.py --help",
    )
    parser.add_argument("--version", action="version", version=f"pinrec_hf {pinrec_hf.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (data, retrieval, trace, evaluation, prequential, monitor, hub, serving, demo):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error that its message explains, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    logging.disable_progress_bar()  # of loading weights: a flash; ours are about long work
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)
    except BrokenPipeError:  # `pinrec ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        return _fail(args.command, explain(error), 2)
    return 0


def explain(error: Exception) -> str:
    """An error in one line, without `[Errno 17]`."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _fail(command: str, message: str, code: int) -> int:
    print(f"pinrec {command}: {message}", file=sys.stderr)
    return code
