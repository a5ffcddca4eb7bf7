"""`pinrec evaluate`: a model beside its baselines on a split, as JSON, tables and a page with plots."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinrec_hf.commands.console import add_adapter, add_command, parse_adapters, parse_pairs, print_json, table

if TYPE_CHECKING:
    from pinrec_hf.evaluation.bootstrap import Difference
    from pinrec_hf.evaluation.ranker import ModelRanker
    from pinrec_hf.modeling.catalogue_pinrec import Catalogue

NAME = "PinRec"


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "measure a model on the requests of a split, beside decayed popularity and other saved models",
        "  pinrec evaluate --model pinrec-base --data data --split test \\\n"
        "      --baseline two-tower=two-tower --baseline SASRec=sasrec --output-dir report",
    )
    parser.add_argument("--model", required=True, help="folder or Hub repo; its index is used if it has one")
    parser.add_argument("--revision", help="of a Hub repo")
    add_adapter(parser)
    parser.add_argument("--data", required=True, help="folder that `pinrec prepare` wrote")
    parser.add_argument(
        "--split",
        choices=["validation", "test"],
        default="validation",
        help="choose on validation, read test once (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir", required=True, help="new folder for evaluation.json, evaluation.md, report.html"
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another saved model of the same data, such as a two-tower or SASRec; repeatable",
    )
    parser.add_argument("-k", type=int, action="append", help="depth of the lists; repeatable (default: 10 and 50)")
    parser.add_argument("--max-users", type=int, help="a random sample of this many users (default: all)")
    parser.add_argument(
        "--history-lag", type=int, default=0, help="seconds by which histories lag behind (default: %(default)s)"
    )
    parser.add_argument(
        "--category-column",
        help="for category entropy: a column of the items, or a prefix of their features such as genre "
        "(default: category, where the items have it)",
    )


def evaluate(args: argparse.Namespace) -> None:
    from pinrec_hf.evaluation.categories import item_categories
    from pinrec_hf.evaluation.evaluate import compare
    from pinrec_hf.evaluation.evaluate import evaluate as measure
    from pinrec_hf.evaluation.plots import Figure  # noqa: F401  missed now, if it is
    from pinrec_hf.evaluation.popularity import best_popularity
    from pinrec_hf.evaluation.protocol import load_requests
    from pinrec_hf.evaluation.ranker import ModelRanker, load_retriever
    from pinrec_hf.evaluation.report import report_tables, write_report
    from pinrec_hf.retrieval.pretrained import find_folder, weights_hash

    if os.path.lexists(args.output_dir):  # now, not after all the work
        raise FileExistsError(f"{args.output_dir} exists: choose another --output-dir, or remove it first")
    baselines = parse_pairs(args.baseline, "--baseline")
    names = [NAME, *(name for name, _ in baselines)]
    if len(set(names)) < len(names):
        raise ValueError(f"--baseline: {names} are not all different; name each system once")
    adapters = parse_adapters(args.adapter)
    folder = find_folder(args.model, args.revision)
    retriever = load_retriever(folder, adapters)
    catalogue = retriever.tokenizer.catalogue
    ks = args.k or (10, 50)
    options: dict[str, Any] = {"history_lag": args.history_lag, "max_users": args.max_users}
    requests = load_requests(args.data, args.split, catalogue, **options)

    measured: dict[str, Any] = {
        "ks": ks,
        "categories": item_categories(args.data, catalogue, args.category_column),
    }
    systems = [measure(retriever, requests, catalogue, name=NAME, **measured)]
    single = ModelRanker(retriever.model, retriever.tokenizer)
    systems.append(measure(single, requests, catalogue, name=f"{NAME}, any outcome", **measured))
    for name, path in baselines:
        systems.append(measure(_baseline(name, path, catalogue), requests, catalogue, name=name, **measured))
    popularity = best_popularity(args.data, catalogue, split=args.split, requests=requests, **measured, **options)
    systems.append(popularity.evaluation)
    # as it is served; then like for like, by one embedding
    comparisons = [compare(systems[0], other) for other in systems[1:]]
    comparisons += [compare(systems[1], other) for other in systems[2:]]
    write_report(
        args.output_dir,
        systems,
        comparisons=comparisons,
        trainer_state=_training_log(folder),
        title=f"{Path(args.model).name} on {args.split}",
        source={
            "weights": [weights_hash(find_folder(path)) for path in (str(folder), *adapters.values())],
            "command": _command(args),
        },
    )
    if args.json:
        print_json(json.loads((Path(args.output_dir) / "evaluation.json").read_text("utf-8")))
        return
    print(report_tables(systems)[0].markdown())
    shown = [name for name in systems[0].metrics if name.startswith(("recall@", "ndcg@"))]
    rows = [
        [f"{comparison.a} minus {comparison.b}", *(_difference(comparison.metrics[name]) for name in shown)]
        for comparison in comparisons
    ]
    print(table(["", *shown], rows))
    print(f"\nbrackets: 95 % intervals over users; by surface, outcome and more: {args.output_dir}/report.html")


def _command(args: argparse.Namespace) -> str:
    """The command as it may be run again."""
    words = ["pinrec", "evaluate", "--model", args.model, "--data", args.data, "--split", args.split]
    words += ["--revision", args.revision] if args.revision else []
    words += [word for adapter in args.adapter for word in ("--adapter", adapter)]
    words += [word for baseline in args.baseline for word in ("--baseline", baseline)]
    words += [word for k in args.k or () for word in ("-k", str(k))]
    words += ["--max-users", str(args.max_users)] if args.max_users else []
    words += ["--history-lag", str(args.history_lag)] if args.history_lag else []
    words += ["--category-column", args.category_column] if args.category_column else []
    return shlex.join([*words, "--output-dir", args.output_dir])


def _difference(difference: Difference) -> str:
    relative = "" if math.isnan(difference.relative_percent) else f" ({difference.relative_percent:+.0f} %)"
    return f"{difference.difference:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]{relative}"


def _training_log(folder: Path) -> Path | None:
    """The model's trainer state, if it is there and holds losses (a very short training logs none)."""
    from pinrec_hf.evaluation.report import read_log_history

    state = folder / "trainer_state.json"
    try:
        read_log_history(state)
    except ValueError:
        return None
    return state


def _baseline(name: str, folder: str, catalogue: Catalogue) -> ModelRanker:
    from pinrec_hf.evaluation.ranker import load_model_ranker
    from pinrec_hf.retrieval.pretrained import find_folder

    try:
        ranker = load_model_ranker(find_folder(folder))
    except ValueError as error:
        raise ValueError(f"baseline {name}: {error}") from error
    if ranker.tokenizer.catalogue.fingerprint != catalogue.fingerprint:
        raise ValueError(f"baseline {name}: {folder} has another catalogue than the model; train both on the same data")
    return ranker
