"""`pinrec card | push | space | release`: a folder with its card, on the Hub, as a page, as what is served."""

from __future__ import annotations

import argparse
from typing import Any

from pinrec_hf.commands.console import add_command, print_json, table


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "card",
        card,
        "write a folder's card, README.md, from what was measured, with pictures",
        "  pinrec card --model pinrec-base --evaluation report/evaluation.json",
    )
    parser.add_argument("--model", required=True, help="folder of a model, an adapter or a prepared dataset")
    parser.add_argument("--evaluation", help="what `pinrec evaluate` wrote of it (default: results not measured)")
    parser.add_argument("--repo", help="name on the Hub that the examples load (default: the folder's name)")
    parser.add_argument("--base", help="of an adapter: its base's name on the Hub, written into the adapter's configs")

    parser = add_command(
        commands,
        "push",
        push,
        "push a model, an adapter, a prepared dataset or a Space to the Hub: the listed files, in one commit",
        "  pinrec push --model pinrec-base --repo org/pinrec-base --dry-run\n"
        "  pinrec push --model data --repo org/shop-logs --private",
    )
    parser.add_argument("--model", required=True, help="folder of a model, an adapter or a prepared dataset")
    parser.add_argument("--repo", required=True, help="org/name; made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="list the files with their sizes, and stop")
    parser.add_argument("--private", action="store_true", help="make the repo private, if it is made now")
    parser.add_argument("--revision", help="branch to push to, made if need be (default: main)")

    parser = add_command(
        commands,
        "space",
        space,
        "write the folder of a Gradio Space that shows a pushed model as `pinrec demo` does",
        "  pinrec space --model org/pinrec-base --output-dir space && pinrec push --model space --repo org/pinrec-demo",
    )
    parser.add_argument("--model", required=True, help="the model's repo on the Hub")
    parser.add_argument("--revision", help="of it (default: what is there now, which is pinned)")
    parser.add_argument("--output-dir", required=True, help="folder to write; must not exist")

    parser = add_command(
        commands,
        "release",
        release,
        "copy an indexed model below a folder of releases and make it `current`, or go back to the one before",
        "  pinrec release --model pinrec-base --to releases && pinrec serve --model releases/current\n"
        "  pinrec release --rollback --to releases",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder of an indexed model")
    which.add_argument("--rollback", action="store_true", help="make the release before the current one current")
    parser.add_argument("--to", required=True, metavar="RELEASES", help="folder of releases; made if need be")


def card(args: argparse.Namespace) -> None:
    from pinrec_hf.hub.card import write_card

    path = write_card(args.model, evaluation=args.evaluation, repo=args.repo, base=args.base)
    if args.json:
        print_json({"card": str(path)})
    else:
        print(f"wrote {path}; read it before you push: pinrec push --model {args.model} --repo ORG/NAME --dry-run")


def push(args: argparse.Namespace) -> None:
    from pinrec_hf.hub.card import write_card
    from pinrec_hf.hub.files import CARD, list_files
    from pinrec_hf.hub.push import push as push_files

    listing = list_files(args.model)
    made = CARD not in listing.sizes
    if made and not args.dry_run:
        write_card(args.model, repo=args.repo)
        listing = list_files(args.model)
    result: dict[str, Any] = {"repo": args.repo, "repo_type": listing.repo_type, "files": listing.sizes}
    if not args.json:
        rows = [[path, f"{size:,}"] for path, size in listing.sizes.items()]
        rows += [[CARD, "to be written"]] if made and args.dry_run else []
        print(table(["file", "bytes"], [*rows, ["", f"{sum(listing.sizes.values()):,}"]], right=["bytes"]), flush=True)
    where = f"{listing.repo_type} {args.repo}" + (f", {args.revision}" if args.revision else "")
    if args.dry_run:
        said = f"nothing was pushed; without --dry-run these files go to {where}"
    else:
        commit = push_files(listing, args.repo, private=args.private or None, revision=args.revision)
        result["commit"], result["url"] = commit.oid, commit.commit_url
        said = f"pushed to {where}: {commit.commit_url}"
    if args.json:
        print_json(result)
    else:
        print(f"\n{said}")


def space(args: argparse.Namespace) -> None:
    from pinrec_hf.hub.space import write_space

    folder = write_space(args.model, args.output_dir, revision=args.revision)
    if args.json:
        print_json({"space": str(folder)})
    else:
        print(f"wrote {folder}; look at it, then: pinrec push --model {folder} --repo ORG/NAME")


def release(args: argparse.Namespace) -> None:
    from pinrec_hf.hub.release import publish, roll_back

    folder = roll_back(args.to) if args.rollback else publish(args.model, args.to)
    if args.json:
        print_json({"current": str(folder)})
    else:
        print(f"current is {folder}; SIGHUP makes a running `pinrec serve --model {args.to}/current` load it")
