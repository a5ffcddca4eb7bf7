"""`pinrec simulate | prepare | embed`: logs and texts to a sequences dataset."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pinrec_hf.commands.ab import add_online_test, online_test
from pinrec_hf.commands.console import add_command, parse_pairs, print_json, table


def add_commands(commands: Any) -> None:
    _add_simulate(commands)
    _add_prepare(commands)
    _add_embed(commands)


def _add_simulate(commands: Any) -> None:
    parser = add_command(
        commands,
        "simulate",
        simulate,
        "write a simulated log of three surfaces, with items, queries and the truth behind it",
        "  pinrec simulate --size 100000 --output-dir simulated\n"
        "  pinrec prepare --log simulated/log --items simulated/items.parquet \\\n"
        "      --queries simulated/queries.parquet --negative-outcome hide --output-dir data\n"
        "  pinrec simulate --ab --world simulated --data data --a pinrec-base --b popularity --output-dir ab",
    )
    parser.add_argument(
        "--output-dir",
        required=True,
        help="new folder for log/, items.parquet, queries.parquet, truth/; with --ab, for online_test.json and .md",
    )
    parser.add_argument("--size", type=int, help="rows of the log, 10^3 to 10^8 (default: 100000)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed, another world; with --ab, another test (default: %(default)s)",
    )
    parser.add_argument(
        "--world",
        default="default",
        help="default, or a null world, in which an advantage must vanish: no_drift, one_taste, identical_surfaces; "
        "with --ab, the folder of a world that was simulated before",
    )
    add_online_test(parser)


def simulate(args: argparse.Namespace) -> None:
    if args.ab:
        return online_test(args)
    if any(value is not None for value in (args.data, args.a, args.b, args.k, args.design)):
        raise ValueError("--data, --a, --b, -k and --design belong to an online test: add --ab")
    from pinrec_hf.data.simulator.log import simulate as write_log
    from pinrec_hf.data.simulator.oracle import best_reachable_recall

    report = write_log(
        args.output_dir, size=100_000 if args.size is None else args.size, seed=args.seed, world=args.world
    )
    best = best_reachable_recall(args.output_dir, ks=(10, 50))
    if args.json:
        print_json({**asdict(report), "best_reachable_recall": best})
        return
    print(f"{report.folder}: {report.rows:,} rows of {report.users:,} users, {report.items:,} items")
    print(f"hash {report.hash[:16]}, {report.positive_rate:.1%} of impressions saved or clicked\n")
    names = list(next(iter(report.outcomes.values())))
    counts = [[surface, *(f"{n:,}" for n in row.values())] for surface, row in report.outcomes.items()]
    print(table(["surface", *names], counts, right=names))
    print("\nbest reachable recall on the last day (knowing all but chance):")
    rows = [["all", best], *best["surfaces"].items()]
    ks = ["R@10", "R@50"]
    found = [
        [name, *("-" if r[f"expected_recall@{k}"] is None else f"{r[f'expected_recall@{k}']:.3f}" for k in (10, 50))]
        for name, r in rows
    ]
    print(table(["surface", *ks], found, right=ks))
    print(
        f"\nnext: pinrec prepare --log {args.output_dir}/log --items {args.output_dir}/items.parquet "
        f"--queries {args.output_dir}/queries.parquet --negative-outcome hide --output-dir data"
    )


def _add_prepare(commands: Any) -> None:
    parser = add_command(
        commands,
        "prepare",
        prepare,
        "turn a log into a sequences dataset: checked, one row a user, cut into train, validation and test",
        "  pinrec prepare --log 'logs/*.parquet' --items items.parquet --negative-outcome hide --output-dir data\n"
        "  pinrec prepare --public kuairand --folder KuaiRand-Pure --output-dir kuairand",
    )
    parser.add_argument("--output-dir", required=True, help="new folder of the dataset")
    parser.add_argument("--log", nargs="+", help="parquet files, folders or globs: user_id, item_id, timestamp, ...")
    parser.add_argument("--items", nargs="+", help="parquet: item_id, embedding, features, title, ...")
    parser.add_argument("--queries", nargs="+", help="parquet: query, embedding")
    parser.add_argument("--public", help="load a public set instead: kuairand, ml1m, beauty, sports, trivago")
    parser.add_argument("--folder", help="where the files of the public set are")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=YOURS", help="your names of the columns")
    parser.add_argument("--time-unit", choices=["s", "ms", "us"], help="of times that are integers")
    parser.add_argument(
        "--negative-outcome", action="append", default=[], help="an outcome that is no success (hide); repeatable"
    )
    parser.add_argument("--validation-start", help="ISO 8601 or seconds, UTC (default: a day before test)")
    parser.add_argument("--test-start", help="(default: the last day of the log)")
    parser.add_argument("--test-end", help="(default: the end of the log)")
    parser.add_argument("--leave-one-out", action="store_true", help="each user's last two events instead of days")
    parser.add_argument(
        "--num-targets", type=int, default=1, help="leave-one-out: a user's events in test (default: %(default)s)"
    )
    parser.add_argument(
        "--view-gap-minutes", type=float, default=30, help="a longer gap ends a feed view (default: %(default)s)"
    )
    parser.add_argument(
        "--engine", default="duckdb", help="duckdb, or spark for logs too large for one machine (default: %(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what is otherwise dropped and counted")
    parser.add_argument("--name", help="of the dataset, kept in metadata.json")
    parser.add_argument("--license", help="of the data, kept in metadata.json")
    options = vars(parser.parse_args(["--output-dir", ""]))
    of_both = ("public", "folder", "output_dir", "num_targets", "json", "debug", "log", "run")
    parser.set_defaults(log_options={name: value for name, value in options.items() if name not in of_both})


def prepare(args: argparse.Namespace) -> None:
    if (args.log is None) == (args.public is None) or (args.folder is not None and args.public is None):
        raise ValueError("give --log, or --public with --folder")
    if args.public is not None:
        from pinrec_hf.data.public import prepare_public

        if args.folder is None:
            raise ValueError("--public needs --folder, where its files are")
        given = [name for name, default in args.log_options.items() if getattr(args, name) != default]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--public says {options} itself; leave it out, or give your own --log")
        report = prepare_public(args.public, args.folder, args.output_dir, num_targets=args.num_targets)
    else:
        from pinrec_hf.data.prepare import prepare as prepare_log

        report = prepare_log(
            args.log,
            output_dir=args.output_dir,
            items=args.items,
            queries=args.queries,
            columns=dict(parse_pairs(args.columns, "--columns")),
            time_unit=args.time_unit,
            negative_outcomes=args.negative_outcome,
            validation_start=args.validation_start,
            test_start=args.test_start,
            test_end=args.test_end,
            leave_one_out=args.leave_one_out,
            num_targets=args.num_targets,
            view_gap_minutes=args.view_gap_minutes,
            strict=args.strict,
            engine=args.engine,
            name=args.name,
            license=args.license,
        )
    if args.json:
        print_json(report.to_dict())
        return
    import pyarrow.parquet as pq

    from pinrec_hf.data.dataset_folder import read_metadata

    print(report)
    counts = read_metadata(args.output_dir)["outcome_counts"]  # names that are no outcomes show here
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    rows = [[surface, *(f"{row.get(name, 0):,}" for name in names)] for surface, row in counts.items()]
    print(f"\n{table(['positive in train', *names], rows, right=names)}")
    columns = pq.read_schema(f"{args.output_dir}/items.parquet").names
    if "title" in columns and not {"features", "embedding"} & set(columns):
        print("\nitems have titles, which a model does not read: `pinrec embed --words` makes features of them")
    print(f"\nwrote {args.output_dir}; next: accelerate launch training/pretrain.py --data {args.output_dir}")


def _add_embed(commands: Any) -> None:
    parser = add_command(
        commands,
        "embed",
        embed,
        "what texts say, as columns: a table in, the table with `embedding`, or words in `features`, out",
        "  pinrec embed --input items.parquet --text-column title --words \\\n"
        "      --model sentence-transformers/all-MiniLM-L6-v2 --output items-embedded.parquet",
    )
    parser.add_argument("--input", required=True, help="parquet file or glob, of items or queries")
    parser.add_argument("--text-column", required=True, help="the column of texts, such as title or query")
    parser.add_argument(
        "--model", help="a sentence-transformers model, whose vectors become `embedding`: folder, or Hub name"
    )
    parser.add_argument(
        "--words", action="store_true", help="words of items become `features` (word=...), which a model learns"
    )
    parser.add_argument("--output", required=True, help="parquet file to write; must not exist")
    parser.add_argument("--batch-size", type=int, default=256, help="texts a forward pass (default: %(default)s)")


def embed(args: argparse.Namespace) -> None:
    from pinrec_hf.data.embed import embed_parquet

    result = embed_parquet(
        args.input,
        text_column=args.text_column,
        model=args.model,
        words=args.words,
        output=args.output,
        batch_size=args.batch_size,
    )
    if args.json:
        print_json(result)
    else:
        made = [f"vectors of {result['embedding_size']}"] if args.model else []
        made += [f"{result['num_features']:,} features"] if args.words else []
        nulls = f"{result['num_null_texts']:,} texts were null"
        print(f"{args.output}: {result['num_rows']:,} rows, {' and '.join(made)} ({nulls})")
