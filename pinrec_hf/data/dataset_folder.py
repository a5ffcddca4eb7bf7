"""A folder that `pinrec prepare` wrote: its metadata, and the tokenizer that reads its rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

FORMAT = 1


def read_metadata(data: str | Path) -> dict[str, Any]:
    """`metadata.json` of a prepared folder.

    Raises:
        FileNotFoundError: if the folder was not written by `pinrec prepare`.
        ValueError: if it was written by a version with another format.
    """
    path = Path(data) / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(f"{data} holds no metadata.json; make the folder with `pinrec prepare`")
    metadata: dict[str, Any] = json.loads(path.read_text())
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, this version reads {FORMAT}; prepare it again")
    return metadata


def build_catalogue(data: str | Path) -> Catalogue:
    """The catalogue of `items.parquet`, in its row order."""
    return Catalogue.build(**_catalogue_columns(_read_items(data)))


def grow_catalogue(catalogue: Catalogue, data: str | Path) -> Catalogue:
    """The catalogue and, after its own rows, the items of `items.parquet` that it lacks.

    Items that it holds keep their row and content, whether or not the folder still has them. Life times, where
    `items.parquet` has any, are today's: an item that is gone is not recommended once it has an `available_until`.

    Raises:
        ValueError: ids of another type, or content vectors of another width.
    """
    table = _read_items(data)
    width = len(table["embedding"][0]) if "embedding" in table.column_names else 0
    if width != catalogue.content_size:
        raise ValueError(
            f"the items' embeddings have width {width}, the model's catalogue {catalogue.content_size}: embed them by "
            "the same content encoder (0 = none), or pretrain anew without --model"
        )
    today = Catalogue.build(**_catalogue_columns(table))
    rows = catalogue.rows(table["item_id"].to_pylist())
    if today.has_availability:
        catalogue = catalogue.with_availability(rows[rows >= 0], today.availability(np.flatnonzero(rows >= 0)))
    new = _catalogue_columns(table.filter(pa.array(rows < 0)))
    return catalogue.append(new.pop("ids"), **new)


def _read_items(data: str | Path) -> pa.Table:
    path = Path(data) / "items.parquet"
    columns = ("item_id", "embedding", "features", "available_from", "available_until")
    names = pq.read_schema(path).names
    return pq.read_table(path, columns=[name for name in columns if name in names])


def _catalogue_columns(table: pa.Table) -> dict[str, Any]:
    """The arguments of `Catalogue.build`."""
    return {{"item_id": "ids", "embedding": "vectors"}.get(name, name): table[name] for name in table.column_names}


def build_query_catalogue(data: str | Path) -> Catalogue | None:
    """The queries that have a content vector, or `None` where the folder has no `queries.parquet`."""
    path = Path(data) / "queries.parquet"
    if not path.is_file():
        return None
    table = pq.read_table(path, columns=["query", "embedding"])
    return Catalogue.build(table["query"], vectors=table["embedding"])


def build_tokenizer(data: str | Path, model_max_length: int = 256, **options: Any) -> PinRecTokenizer:
    """A tokenizer with the folder's vocabulary (fitted on train) and catalogue; `options` are `PinRecTokenizer`'s."""
    metadata = read_metadata(data)
    return PinRecTokenizer(
        catalogue=build_catalogue(data),
        queries=build_query_catalogue(data),
        surfaces=metadata["surfaces"],
        outcomes=metadata["outcomes"],
        negative_outcomes=metadata["negative_outcomes"],
        model_max_length=model_max_length,
        **options,
    )


def default_budgets(metadata: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each surface's shares of positive outcomes in train."""
    counts = metadata["outcome_counts"]
    totals = {surface: sum(outcomes.values()) for surface, outcomes in counts.items()}
    return {
        surface: {name: count / totals[surface] for name, count in outcomes.items() if count}
        for surface, outcomes in counts.items()
        if totals[surface]
    }
