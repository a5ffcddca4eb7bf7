"""A folder that `pinrec prepare` wrote: its metadata, and the tokenizer that reads its rows."""

import json
from pathlib import Path
from typing import Any

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
    path = Path(data) / "items.parquet"
    names = pq.read_schema(path).names
    columns = ("item_id", "embedding", "features", "available_from", "available_until")
    table = pq.read_table(path, columns=[name for name in columns if name in names])
    given = {name: table[name] for name in table.column_names}
    return Catalogue.build(
        given["item_id"],
        vectors=given.get("embedding"),
        features=given.get("features"),
        available_from=given.get("available_from"),
        available_until=given.get("available_until"),
    )


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
