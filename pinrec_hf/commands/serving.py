"""`pinrec serve`: a trained model behind HTTP."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from pinrec_hf.commands.console import add_adapter, add_command, parse_adapters


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        serve,
        "serve an indexed model over HTTP; SIGHUP swaps in what --model points to, SIGTERM answers and ends",
        "  pinrec serve --model pinrec-base --histories events.sqlite",
    )
    parser.add_argument("--model", required=True, help="folder (best a symbolic link to a release) or Hub repo")
    parser.add_argument("--revision", help="of a Hub repo")
    add_adapter(parser)
    parser.add_argument("--histories", metavar="WHERE", help="a SQLite file, or redis://host:port/0")
    parser.add_argument(
        "--history-cache",
        type=int,
        default=256,
        metavar="MIB",
        help="kept of what was computed of users' histories, 0 for nothing (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="any but a loopback needs keys (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="(default: %(default)s)")
    parser.add_argument("--api-key-file", help="API keys, one a line; every call but the health checks needs one")
    group = parser.add_argument_group("load")
    group.add_argument("--max-batch", type=_positive, default=32, help="answered together (default: %(default)s)")
    group.add_argument("--max-wait", type=float, default=2, metavar="MS", help="for a batch (default: %(default)s ms)")
    group.add_argument(
        "--max-pending",
        type=_positive,
        default=96,
        help="more get a 503 (default: %(default)s)",
    )
    group.add_argument("--deadline", type=float, default=10, metavar="S", help="of a call (default: %(default)s s)")
    group.add_argument(
        "--drain",
        type=float,
        default=5,
        metavar="S",
        help="answering, but unready (default: %(default)s s)",
    )


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 (any that is free) to 65535")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def serve(args: argparse.Namespace) -> None:
    try:
        from pinrec_hf.serving.app import create_app
        from pinrec_hf.serving.server import check_host, log_as_json
        from pinrec_hf.serving.server import serve as run
    except ImportError as error:
        raise ImportError(f'{error}: `pip install ".[serve]"` in the clone first') from error
    from pinrec_hf.retrieval.history_cache import HistoryCache
    from pinrec_hf.serving.guard import read_keys
    from pinrec_hf.serving.histories import open_histories
    from pinrec_hf.serving.metrics import Metrics
    from pinrec_hf.serving.release import Releases

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server takes it: a release made meanwhile is the one read
    keys = read_keys(args.api_key_file) if args.api_key_file else frozenset()
    check_host(args.host, keys)
    log_as_json()
    metrics = Metrics()
    histories = open_histories(args.histories) if args.histories else None
    releases = Releases(
        args.model,
        metrics,
        revision=args.revision,
        adapters=parse_adapters(args.adapter),
        computed=HistoryCache(args.history_cache << 20) if args.history_cache else None,
    )
    app = create_app(
        releases,
        metrics,
        histories,
        keys=keys,
        max_batch=args.max_batch,
        max_wait=args.max_wait / 1e3,
        max_pending=args.max_pending,
        deadline=args.deadline,
    )
    run(app, releases, host=args.host, port=args.port, drain=args.drain)
