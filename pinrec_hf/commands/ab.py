"""`pinrec simulate --ab`: two retrievers before the users of a simulated world."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from pinrec_hf.commands.console import print_json

if TYPE_CHECKING:
    from pinrec_hf.evaluation.evaluate import Ranker
    from pinrec_hf.modeling.catalogue_pinrec import Catalogue

POPULARITY = "popularity"


def add_online_test(parser: argparse.ArgumentParser) -> None:
    """The options of an online test; all are None unless given."""
    group = parser.add_argument_group("online test (--ab): two retrievers, one ranker, the world's users")
    group.add_argument("--ab", action="store_true", help="let the world's users live the test days of --data again")
    group.add_argument("--data", help="folder that `pinrec prepare` made of the world's log")
    group.add_argument("--a", metavar="A", help=f"folder or Hub repo of a model, or {POPULARITY}")
    group.add_argument("--b", metavar="B", help="the same, to compare A with")
    group.add_argument("-k", type=int, help="candidates a request, of which the ranker shows 5 to 8 (default: 50)")
    group.add_argument(
        "--design",
        help="paired: every user lives the days under both, answers in expectation; "
        "split: half of the users each, answers drawn (default: paired)",
    )


def online_test(args: argparse.Namespace) -> None:
    from pinrec_hf.data.dataset_folder import build_catalogue
    from pinrec_hf.evaluation.ab import DESIGNS, run_online_test, write_online_test

    missing = [f"--{name}" for name in ("data", "a", "b") if getattr(args, name) is None]
    if missing or args.size is not None:
        raise ValueError(
            f"--ab needs {', '.join(missing)}" if missing else "--size is the simulated log's; leave it out with --ab"
        )
    if os.path.lexists(args.output_dir):  # now, not after all the work
        raise FileExistsError(f"{args.output_dir} exists: choose another --output-dir, or remove it first")
    catalogue = build_catalogue(args.data)
    test = run_online_test(
        args.world,
        args.data,
        _ranker(args.a, args.data, catalogue),
        _ranker(args.b, args.data, catalogue),
        names=(args.a, args.b),
        k=min(50, len(catalogue)) if args.k is None else args.k,
        design=args.design or DESIGNS[0],
        seed=args.seed,
    )
    write_online_test(args.output_dir, test)
    if args.json:
        print_json(test.to_dict())
        return
    print(f"{test.table().markdown()}\n{test.summary()}\n\nwrote {args.output_dir}")


def _ranker(name: str, data: str, catalogue: Catalogue) -> Ranker:
    from pinrec_hf.evaluation.popularity import best_popularity
    from pinrec_hf.evaluation.ranker import load_model_ranker, load_retriever
    from pinrec_hf.retrieval.pretrained import find_folder, saved_class

    if name == POPULARITY:  # frozen at the cut: under test, nobody lives the days that rolling counts would count
        return best_popularity(data, catalogue, rolling=False, progress=False).ranker
    folder = find_folder(name)
    pinrec = saved_class(folder) == "PinRecModel"
    ranker = load_retriever(folder) if pinrec else load_model_ranker(folder)
    if ranker.tokenizer.catalogue.fingerprint != catalogue.fingerprint:
        raise ValueError(
            f"{name} has another catalogue than {data}: give a model that was trained on this world's data"
        )
    return ranker
