"""Users to retrieve for, from parquet: rows of a sequences dataset, or requests."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pinrec_hf.data.dataset_folder import read_metadata
from pinrec_hf.modeling.events_pinrec import HISTORY_COLUMNS
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.request import REQUEST_COLUMNS, known_history


class UserFiles:
    """Parquet files with a row a user, read a batch at a time.

    Two layouts. Either the rows that `pinrec prepare` writes: list columns `item_id`, `surface`, `timestamp`,
    `outcomes`, ...; the request itself (surface, time, ...) is then the same for all and given apart. Or requests: a
    struct column `history` with those lists, and columns `surface`, `timestamp`, `query`, ... of the request schema.

    Args:
        paths: a file, a folder, a glob, or several.
        tokenizer: whose names the histories use. In rows of a log, names that it does not know count as unknown.
        request: fields of every request; they win over the file's columns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated file, no `user_id`, neither layout, or times that are no whole seconds.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        tokenizer: PinRecTokenizer,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.request = {name: value for name, value in (request or {}).items() if value is not None}
        self.files = _find(paths)
        schemas = []
        try:
            for file in self.files:
                schemas.append(pq.read_schema(file))
            self.num_rows = sum(pq.read_metadata(file).num_rows for file in self.files)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.files[len(schemas)]} is truncated or no parquet file ({error})") from error
        self.schema = schemas[0]
        for file, schema in zip(self.files, schemas, strict=True):
            if not schema.equals(self.schema):
                raise ValueError(f"{file} has other columns than {self.files[0]}; give files of one kind")
        names = self.schema.names
        self.is_log = "history" not in names
        if "user_id" not in names or (self.is_log and "item_id" not in names):
            raise ValueError(
                f"{self.files[0]} needs `user_id`, and either `history` (a struct) or lists `item_id`, `surface`, "
                f"`timestamp`, `outcomes` as `pinrec prepare` writes them; it has {names}"
            )
        _check_times(self.schema, self.files[0])
        known = HISTORY_COLUMNS if self.is_log else ("history", *REQUEST_COLUMNS)
        self.columns = ["user_id", *(name for name in known if name in names)]

    def batches(self, size: int) -> Iterator[pa.RecordBatch]:
        """Batches of at most `size` rows, in the files' order, always cut at the same places."""
        for file in self.files:
            yield from pq.ParquetFile(file).iter_batches(size, columns=self.columns)

    def requests(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        """The requests of a batch's rows, with `user_id`."""
        rows = batch.to_pylist()
        if self.is_log:
            return [
                {"user_id": row.pop("user_id"), "history": known_history(row, self.tokenizer), **self.request}
                for row in rows
            ]
        for row in rows:
            row["history"] = row["history"] or {}
            for name in ("outcome_budget", "filters"):
                if row.get(name) is not None:  # a struct has every field in every row, a map is a list of pairs
                    row[name] = {key: value for key, value in dict(row[name]).items() if value is not None} or None
        return [{**row, **self.request} for row in rows]


def find_user(data: str | Path, user_id: str, tokenizer: PinRecTokenizer) -> tuple[dict[str, Any], str]:
    """A user's whole history, and the split it comes from: the newest that has the user.

    Args:
        data: a sequences dataset. user_id: as typed; integer ids are read as such.

    Raises:
        ValueError: no such user; the message names some that there are.
    """
    integer = read_metadata(data)["id_types"]["user_id"] == "integer"
    if integer and not user_id.lstrip("-").isdigit():
        raise ValueError(f"user {user_id!r}: the users of {data} have integer ids")
    wanted = int(user_id) if integer else user_id
    if isinstance(wanted, int) and not -(2**63) <= wanted < 2**63:
        raise ValueError(f"user {user_id}: the ids of {data} fit 64 bits")
    for split in ("test", "validation", "train"):
        files = sorted(str(path) for path in (Path(data) / split).glob("*.parquet"))
        table = ds.dataset(files, format="parquet").to_table(filter=pc.field("user_id") == wanted)
        if table.num_rows:
            return known_history(table.slice(0, 1).to_pylist()[0], tokenizer), split
    some = ds.dataset(files, format="parquet").head(3, columns=["user_id"])["user_id"].to_pylist()
    raise ValueError(f"user {user_id!r} is in no split of {data}; users there are, for example, {some}")


def list_users(data: str | os.PathLike[str], most: int) -> list[str]:
    """Ids of at most `most` users of a sequences dataset, of the newest split that has any, in the file's order."""
    for split in ("test", "validation", "train"):
        files = sorted(str(path) for path in (Path(data) / split).glob("*.parquet"))
        if files and len(users := ds.dataset(files, format="parquet").head(most, columns=["user_id"])):
            return [str(user) for user in users["user_id"].to_pylist()]
    raise ValueError(f"{data} has no users; give a folder that `pinrec prepare` wrote")


def _find(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    files: list[str] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        pattern = os.path.join(glob.escape(os.fspath(path)), "*.parquet") if os.path.isdir(path) else os.fspath(path)
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(errno.ENOENT, f"no parquet file matches {pattern!r}")
        files += found
    return files


def _check_times(schema: pa.Schema, file: str) -> None:
    kinds = {"timestamp": schema.field("timestamp").type} if "timestamp" in schema.names else {}
    if "history" in schema.names:
        struct = schema.field("history").type
        if not pa.types.is_struct(struct):
            raise ValueError(f"{file}: column 'history' is {struct}; it must be a struct of lists")
        kinds |= {f"history.{field.name}": field.type for field in struct if field.name == "timestamp"}
    for name, kind in kinds.items():
        element = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not (pa.types.is_integer(element) or pa.types.is_null(element)):
            raise ValueError(f"{file}: column {name!r} is {kind}; give whole seconds since epoch, UTC, as integers")
