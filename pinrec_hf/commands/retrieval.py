"""`pinrec index | recommend | retrieve | export`: a trained model to candidates."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pinrec_hf.commands.console import add_adapter, add_command, parse_adapters, parse_pairs, print_json, table

if TYPE_CHECKING:
    from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever

SHOWN_EVENTS = 8


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "index",
        index,
        "embed a model's catalogue and write the index into the model's folder; or copy the folder with more items",
        "  pinrec index --model pinrec-base\n  pinrec index --model pinrec-base --tune --data data --recall 0.95\n"
        "  pinrec index --model pinrec-base --add new-items.parquet --output-dir pinrec-grown",
    )
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--kind", choices=["flat", "hnsw", "ivf", "ivfpq"], help="(default: by size and memory)")
    parser.add_argument("--memory-gib", type=float, default=8, help="what it may take, served (default: %(default)s)")
    parser.add_argument("--milvus", metavar="URI", help="search by this Milvus, a file for milvus-lite, not by faiss")
    parser.add_argument("--tune", action="store_true", help="choose the search setting by --data's validation users")
    parser.add_argument("--data", help="for --tune: folder that `pinrec prepare` wrote")
    parser.add_argument("--recall", type=float, help="for --tune: to reach (default: 0.95)")
    group = parser.add_argument_group("items that come and go, without a rebuild")
    group.add_argument("--add", nargs="+", metavar="PARQUET", help="new items, with the columns of `prepare --items`")
    group.add_argument(
        "--remove", nargs="+", metavar="PARQUET", help="item_id and available_until, from when it is gone"
    )
    group.add_argument("--boost", type=float, default=0.0, help="added to every score of a new item (default: 0)")
    group.add_argument("--time-unit", choices=["s", "ms", "us"], help="of times in these that are integers")
    group.add_argument("--output-dir", help="new folder, for --add and --remove: the model with its new index")

    parser = add_command(
        commands,
        "recommend",
        recommend,
        "recommend items to one user, whose history lies in a prepared dataset",
        "  pinrec recommend --model pinrec-base --data data --user u17 --surface search --query 'blue sofa' \\\n"
        "      --outcome save=0.7 --outcome click=0.3",
    )
    add_model(parser)
    parser.add_argument("--data", help="folder that `pinrec prepare` wrote")
    parser.add_argument("--user", help="user id in --data; without it: a user with no history")
    parser.add_argument("-k", type=int, default=10, help="items to recommend (default: %(default)s)")
    add_request(parser)

    parser = add_command(
        commands,
        "retrieve",
        retrieve,
        "retrieve candidates for every user of a parquet file; the same command again goes on after a kill",
        "  pinrec retrieve --model pinrec-base --users data/test --surface homefeed --output-dir candidates",
    )
    add_model(parser)
    _add_users(parser, required=True)
    parser.add_argument("--output-dir", required=True, help="new folder for part-*.parquet, a row a user and rank")
    parser.add_argument("-k", type=int, default=100, help="items a user (default: %(default)s)")
    add_request(parser)

    parser = add_command(
        commands,
        "export",
        export,
        "write item and user vectors as parquet, for an ANN service of your own",
        "  pinrec export --model pinrec-base --users data/test --surface homefeed --output-dir vectors",
    )
    add_model(parser)
    _add_users(parser, required=False)
    parser.add_argument("--output-dir", required=True, help="new folder for items.parquet and users.parquet")
    add_request(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub repo of an indexed model")
    parser.add_argument("--revision", help="of a Hub repo")
    add_adapter(parser)


def _add_users(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--users",
        nargs="+",
        required=required,
        help="parquet: rows as `pinrec prepare` writes them, or requests with a struct `history`",
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the request")
    group.add_argument("--surface", help="where (default: unknown)")
    group.add_argument("--timestamp", help="when: ISO 8601 or seconds, UTC (default: unknown)")
    group.add_argument("--query", help="the search query")
    group.add_argument("--context-item", metavar="ID", help="the subject item of related items")
    group.add_argument(
        "--request-feature", action="append", default=[], metavar="TEXT", help="such as device=ios; repeatable"
    )
    group.add_argument(
        "--outcome",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="what is wanted, and its share of the slots; repeatable (default: the surface's shares in training)",
    )
    group.add_argument("--num-steps", type=int, metavar="N", help="events ahead to generate (default: 1; trace: 6)")
    group.add_argument(
        "--exclude", action="append", default=[], metavar="ID", help="an item not to recommend; repeatable"
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="of the items' columns; repeatable, values of one column are alternatives",
    )


def index(args: argparse.Namespace) -> None:
    from pinrec_hf.retrieval.build import build_index
    from pinrec_hf.retrieval.pretrained import best_device

    if args.add or args.remove or args.output_dir:
        return _grow(args)
    if args.boost:
        raise ValueError("--boost goes with --add: it is for the scores of new items")
    if args.time_unit:
        raise ValueError("--time-unit goes with --add or --remove: it is of the times in their files")
    if args.tune != (args.data is not None):
        raise ValueError("--tune and --data go together: the dataset whose validation users are asked for")
    if args.recall is not None and not args.tune:
        raise ValueError("--recall goes with --tune: it is what the search setting is chosen to reach")
    if args.kind and args.milvus:
        raise ValueError("--kind is of an index by faiss: leave it out, or --milvus")
    built = build_index(
        args.model,
        kind=args.kind,
        device=best_device(),
        memory_gib=args.memory_gib,
        milvus=args.milvus,
        tune_on=args.data,
        recall=0.95 if args.recall is None else args.recall,
    )
    if built is None:
        return
    result = {"model": args.model, "kind": built.kind, "num_items": len(built), "dimension": built.dimension}
    if args.json:
        print_json(result)
    else:
        print(f"indexed {len(built):,} items of {args.model} ({built.kind}, {built.dimension} dimensions)")
        if args.tune:
            print(f"search setting {built.neighbours.setting}; the frontier is in index_frontier.json and .png")


def _grow(args: argparse.Namespace) -> None:
    from pinrec_hf.retrieval.grow import grow_index
    from pinrec_hf.retrieval.pretrained import best_device

    if args.output_dir is None or not (args.add or args.remove):
        raise ValueError("--output-dir goes with --add or --remove: the model's folder itself stays as it is")
    if args.kind or args.milvus or args.tune:
        raise ValueError(
            "--add and --remove leave the index's kind and setting alone: leave out --kind, --milvus, --tune"
        )
    folder = args.output_dir
    index = grow_index(
        args.model, folder, add=args.add, remove=args.remove, boost=args.boost, time_unit=args.time_unit,
        device=best_device(),
    )  # fmt: skip
    if args.json:
        print_json({"model": folder, "kind": index.kind, "num_items": len(index), "dimension": index.dimension})
    else:
        print(f"{folder}: {len(index):,} items; next: pinrec release --model {folder} --to releases")


def recommend(args: argparse.Namespace) -> None:
    if args.user is not None and args.data is None:
        raise ValueError("--user needs --data, the prepared dataset that holds the user's history")
    from pinrec_hf.retrieval.users import find_user

    retriever = load_retriever(args)
    history: dict[str, Any] = {}
    split = None
    if args.user is not None:
        history, split = find_user(args.data, args.user, retriever.tokenizer)
    request = request_fields(args, retriever)
    titles = ["title"] if retriever.items is not None and "title" in retriever.items.names else []
    columns = titles if not args.json or retriever.items is None else retriever.items.names
    (candidates,) = retriever.recommend([history], k=args.k, columns=columns, **request)
    if args.json:
        print_json({"user": args.user, "split": split, "request": request, "candidates": list(map(asdict, candidates))})
        return
    if split is not None:
        print(f"{args.user}: the last events up to the end of {split}\n\n{history_table(retriever, history)}\n")
    shares = retriever.model.resolve_budget(args.surface, request.get("outcome_budget"))
    wanted = ", ".join(f"{name or 'any outcome'} {share / sum(shares.values()):.0%}" for name, share in shares.items())
    about = f' for "{args.query}"' if args.query else f" beside {args.context_item}" if args.context_item else ""
    print(f"recommended on {args.surface or 'an unknown surface'}{about} ({wanted})\n")
    print(_candidate_table(candidates, bool(titles)))
    if len(candidates) < args.k:
        print(f"\n{len(candidates)} of {args.k}: no other item passes the filters, is live then and new to this user")
    queries = retriever.tokenizer.query_catalogue
    if args.query and queries is not None and queries.rows([args.query])[0] < 0:
        print(f"\n{args.query!r} has no vector: train had no query of exactly this text (see docs/surfaces.md)")
    absent = [name or "any" for name in shares if name not in {candidate.outcome for candidate in candidates}]
    if absent and candidates:
        print(f"\nno slot by {', '.join(absent)}: a small share, or too few items that may come")


def retrieve(args: argparse.Namespace) -> None:
    from pinrec_hf.retrieval.batch import retrieve_parquet

    retriever = load_retriever(args)
    result = retrieve_parquet(retriever, args.users, args.output_dir, request=request_fields(args, retriever), k=args.k)
    if args.json:
        print_json({"output_dir": args.output_dir, **result})
    else:
        print(f"{args.output_dir}: {result['num_candidates']:,} candidates for {result['num_requests']:,} users")


def export(args: argparse.Namespace) -> None:
    from pinrec_hf.retrieval.export import export_parquet

    retriever = load_retriever(args)
    result = export_parquet(retriever, args.output_dir, users=args.users, request=request_fields(args, retriever))
    if args.json:
        print_json({"output_dir": args.output_dir, **result})
        return
    users = f" and of {result['num_users']:,} users" if args.users else ""
    print(
        f"{args.output_dir}: vectors of {result['num_items']:,} items{users}, {result['dimension']} dimensions, "
        "to be searched by inner product"
    )


def load_retriever(args: argparse.Namespace) -> PinRecRetriever:
    from pinrec_hf.retrieval.pretrained import best_device
    from pinrec_hf.retrieval.retriever import PinRecRetriever

    adapters = parse_adapters(args.adapter)
    return PinRecRetriever.from_pretrained(args.model, revision=args.revision, device=best_device(), adapters=adapters)


def request_fields(args: argparse.Namespace, retriever: PinRecRetriever) -> dict[str, Any]:
    """The request's fields as typed on the command line."""
    from pinrec_hf.data.contract import parse_time
    from pinrec_hf.retrieval.budget import parse_shares

    request: dict[str, Any] = {
        "surface": args.surface,
        "timestamp": None if args.timestamp is None else parse_time(args.timestamp, "--timestamp"),
        "query": args.query,
        "context_item_id": None if args.context_item is None else _item_id(args.context_item, retriever),
        "request_features": args.request_feature or None,
        "outcome_budget": parse_shares(args.outcome) if args.outcome else None,
        "num_steps": args.num_steps,
        "exclude": [_item_id(text, retriever) for text in args.exclude] or None,
    }
    if args.filter:
        if retriever.items is None:
            raise ValueError("--filter needs the items' columns: the model's folder has no items.parquet")
        filters: dict[str, list[Any]] = {}
        for column, text in parse_pairs(args.filter, "--filter"):
            filters.setdefault(column, []).append(retriever.items.parse(column, text))
        request["filters"] = filters
    return {name: value for name, value in request.items() if value is not None}


def _item_id(text: str, retriever: PinRecRetriever) -> str | int:
    if retriever.tokenizer.catalogue.id_type == "string":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"item {text!r}: this catalogue has integer ids") from None


def history_table(retriever: PinRecRetriever, history: Mapping[str, list[Any]]) -> str:
    """The last events that the model sees: items acted on and queries."""
    items, outcomes = history["item_id"], history["outcomes"]
    queries = history.get("query", [None] * len(items))
    seen = [i for i in range(len(items)) if outcomes[i] or items[i] is None][-SHOWN_EVENTS:]
    rows = retriever.tokenizer.catalogue.rows([items[i] for i in seen])
    titles: dict[int, Any] = {}
    if retriever.items is not None and "title" in retriever.items.names:
        known = rows[rows >= 0]
        titles = dict(zip(known.tolist(), retriever.items.values("title", known), strict=True))
    lines = []
    for i, row in zip(seen, rows.tolist(), strict=True):
        time = history["timestamp"][i]
        stamp = "unknown" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}"
        what = f"search: {queries[i]}" if items[i] is None else titles.get(row) or ""
        names, where = ", ".join(name or "unknown" for name in outcomes[i] or ()), history["surface"][i] or "unknown"
        lines.append([stamp, where, names, items[i], what])
    return table(["time (UTC)", "surface", "outcome", "item", "title" if titles else ""], lines)


def _candidate_table(candidates: list[Candidate], titles: bool) -> str:
    rows = [
        [rank, candidate.outcome or "any", f"{candidate.score:.3f}", candidate.item_id, candidate.title or ""]
        for rank, candidate in enumerate(candidates, start=1)
    ]
    return table(["rank", "outcome", "score", "item", "title" if titles else ""], rows, right=["rank", "score"])
