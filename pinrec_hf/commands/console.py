"""What commands share: how a command is declared, and how results are printed."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

WIDEST = 56


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, example: str
) -> argparse.ArgumentParser:
    """Declare a command with its one-line help, an example, `--json` and `--debug`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def print_json(result: Any) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=False, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> str:
    """Text columns; those named in `right` are right-aligned."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        padded = []
        for name, cell, width in zip(header, row, widths, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if name in right else cell + space)
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def _cell(value: Any) -> str:
    """One line of text, whatever an id or a title holds."""
    text = "" if value is None else str(value)
    text = "".join(c if c.isprintable() or unicodedata.category(c) == "Cf" else repr(c)[1:-1] for c in text)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _width(text: str) -> int:
    """Columns that a terminal takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Cf", "Mn", "Me") for c in text)


def parse_pairs(pairs: Sequence[str], option: str) -> list[tuple[str, str]]:
    """`["a=1"]` to `[("a", "1")]`.

    Raises:
        ValueError: an entry without `=`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{option} {pair!r}: write NAME=VALUE")
    return [(name, value) for name, _, value in (pair.partition("=") for pair in pairs)]


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The option `--adapter`, to be read by `parse_adapters`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="SURFACE=FOLDER",
        help="a surface's adapter, a folder or Hub repo, for its requests; repeatable (default: the base answers all)",
    )


def parse_adapters(pairs: Sequence[str]) -> dict[str, str]:
    """`["search=pinrec-base/adapters/search"]` to a dict.

    Raises:
        ValueError: an entry without `=`, or a surface that is named twice.
    """
    adapters = dict(parse_pairs(pairs, "--adapter"))
    if len(adapters) < len(pairs):
        raise ValueError(f"--adapter names a surface twice: {list(pairs)}")
    return adapters
