"""The category of every item, for category entropy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pinrec_hf.evaluation.events import encode
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

DEFAULT_COLUMN = "category"


def item_categories(data_dir: str | Path, catalogue: Catalogue, column: str | None = None) -> np.ndarray | None:
    """A code of each catalogue row's category: int64 `(items,)`; items without one share the category -1.

    Args:
        data_dir: a sequences dataset; its `items.parquet` is read.
        column: a column of it, or a prefix of its `features` such as `genre` (of `genre=Comedy`); an item with
            several such features has the category of its first. None = the column `category`, where there is one.

    Returns:
        The codes; None only where `column` is None and there is no column `category`.

    Raises:
        ValueError: the items have neither such a column nor such features.
    """
    path = Path(data_dir) / "items.parquet"
    names = pq.read_schema(path).names
    wanted = column or DEFAULT_COLUMN
    own = wanted in names and wanted not in ("item_id", "embedding", "features")
    if not own and column is None:
        return None
    given = [] if own else [name for name in names if name == "features"]
    table = pq.read_table(path, columns=["item_id", *([wanted] if own else given)])
    ids = table["item_id"].to_pylist()
    if own:
        values = table[wanted].combine_chunks()
    else:
        values = _first_feature(table["features"], wanted) if given else pa.nulls(0, pa.string())
        if not values.is_valid().to_numpy(zero_copy_only=False).any():
            raise ValueError(
                f"category column {wanted!r}: {path} has no such column (it has {names}) and no feature "
                f"'{wanted}=...'; name one that it has"
            )
    codes = np.full(len(catalogue), -1, np.int64)
    rows = catalogue.rows(ids)
    codes[rows[rows >= 0]] = encode(values)[0][rows >= 0]
    return codes


def _first_feature(features: pa.ChunkedArray, prefix: str) -> pa.Array:
    """Each item's first feature `prefix=...`, null where it has none."""
    combined = features.combine_chunks()
    flat, item = pc.list_flatten(combined), pc.list_parent_indices(combined).to_numpy()
    place = np.flatnonzero(pc.fill_null(pc.starts_with(flat, f"{prefix}="), False).to_numpy(zero_copy_only=False))
    owner, first = np.unique(item[place], return_index=True)
    source = np.full(len(combined), -1, np.int64)
    source[owner] = place[first]
    return flat.take(pa.array(source, mask=source < 0))
