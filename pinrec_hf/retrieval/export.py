"""`pinrec export`: item and user vectors as parquet, for an ANN service of a team's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pinrec_hf.data.output import new_directory
from pinrec_hf.retrieval.encode import encoder_fingerprint
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.retrieval.users import UserFiles

ROWS_AT_ONCE = 8_192
VECTOR = pa.list_(pa.float32())


def export_parquet(
    retriever: PinRecRetriever,
    output_dir: str | os.PathLike[str],
    *,
    users: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    request: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write `items.parquet` (`item_id`, `embedding`) and, with users, `users.parquet`.

    A user has one vector for each step and outcome of the request's budget: columns `request` (int64, the row of the
    users' files), `user_id`, `outcome` (null = unspecified), `step` (int32), `share` (float64, of the slots) and
    `embedding`. Items rank by inner product; under a dot product the last dimensions are the
    item's biases, and in a user's vector what the request's surface and outcome make of them.
    `export.json` says so, with the fingerprints of the encoder and the catalogue that made them.

    Args:
        output_dir: a new folder. users, request: as for `retrieve_parquet`.

    Returns:
        What export.json holds.

    Raises:
        FileExistsError: `output_dir` exists.
        FileNotFoundError, ValueError: see `UserFiles` and `PinRecRetriever.recommend`.
    """
    catalogue = retriever.tokenizer.catalogue
    files = None if users is None else UserFiles(users, retriever.tokenizer, request)
    about: dict[str, Any] = {
        "format": 1,
        "metric": "inner product",
        "dimension": retriever.model.config.embedding_size,
        "num_items": len(retriever.index),
        "num_users": 0 if files is None else files.num_rows,
        "encoder_fingerprint": encoder_fingerprint(retriever.model),
        "catalogue_fingerprint": catalogue.fingerprint,
    }
    item_type = pa.int64() if catalogue.id_type == "integer" else pa.string()
    with new_directory(output_dir) as folder:
        item_schema = pa.schema([("item_id", item_type), ("embedding", VECTOR)])
        starts = range(0, len(retriever.index), ROWS_AT_ONCE)
        tables: Iterator[pa.Table] = (_item_table(retriever, start, item_schema) for start in starts)
        _write(folder / "items.parquet", item_schema, tables, len(starts), "exporting items", progress)
        if files is not None:
            user_schema = pa.schema(
                [
                    ("request", pa.int64()),
                    ("user_id", files.schema.field("user_id").type),
                    ("outcome", pa.string()),
                    ("step", pa.int32()),
                    ("share", pa.float64()),
                    ("embedding", VECTOR),
                ]
            )
            batches = -(-files.num_rows // 512)
            tables = _user_tables(retriever, files, user_schema)
            _write(folder / "users.parquet", user_schema, tables, batches, "exporting users", progress)
        (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return about


def _item_table(retriever: PinRecRetriever, start: int, schema: pa.Schema) -> pa.Table:
    index = retriever.index  # what is served: a new item's vector stands there alone
    places = index.live.places[start : start + ROWS_AT_ONCE]
    ids = retriever.tokenizer.catalogue.ids(index.rows[places])
    return pa.table([pa.array(ids, schema.field("item_id").type), _vectors(index.vectors[places])], schema=schema)


def _user_tables(retriever: PinRecRetriever, files: UserFiles, schema: pa.Schema) -> Iterator[pa.Table]:
    first = 0
    for batch in files.batches(512):
        requests = files.requests(batch)
        found = retriever.generate(requests)
        row = np.repeat(np.arange(len(found)), [len(by.weights) for by in found])
        names = pa.array([None, *retriever.model.config.outcomes], pa.string())
        columns = [
            pa.array(first + row),
            batch["user_id"].take(pa.array(row)),
            names.take(pa.array(np.concatenate([by.outcomes for by in found]))),
            pa.array(np.concatenate([by.steps for by in found]).astype(np.int32)),
            pa.array(np.concatenate([by.weights for by in found]), pa.float64()),
            _vectors(np.concatenate([by.embeddings for by in found])),
        ]
        yield pa.table(columns, schema=schema)
        first += len(found)


def _vectors(vectors: np.ndarray) -> pa.Array:
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(vectors.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel())).cast(VECTOR)


def _write(path: Path, schema: pa.Schema, tables: Iterator[pa.Table], total: int, desc: str, progress: bool) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for table in tqdm(tables, desc=desc, total=total, unit="batch", disable=not progress):
            file.write_table(table)
