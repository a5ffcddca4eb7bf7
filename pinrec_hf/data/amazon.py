"""Amazon 2014 (McAuley et al.; no licence stated): 5-core reviews as interactions, as in S3-Rec and TIGER."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pinrec_hf.data.embed import word_features
from pinrec_hf.data.source import sql_path

LOG = """
SELECT user_id, item_id, 'amazon' AS surface, make_timestamp(seconds * 1000000) AS timestamp,
       ['interaction'] AS outcomes, "order"
FROM ({rows}) ORDER BY user_id, "order"
"""

SHARED_ROWS = """
SELECT user_id::VARCHAR AS user_id, asin AS item_id, timestamp AS seconds, seq_pos::BIGINT AS "order"
FROM {interactions} JOIN {items} USING (item_id)
"""

PUBLISHED_ROWS = """
SELECT reviewerID AS user_id, asin AS item_id, unixReviewTime AS seconds, row_number() OVER () AS "order"
FROM read_json({file}, format = 'newline_delimited',
               columns = {{reviewerID: 'VARCHAR', asin: 'VARCHAR', unixReviewTime: 'BIGINT'}})
"""

ASIN = re.compile(r"""["']asin["']: ["'](\w+)["']""")


def load_amazon(folder: str | os.PathLike[str]) -> tuple[pa.Table, pa.Table]:
    """The log and the items of one category (Beauty, Sports), for a leave-one-out split.

    Args:
        folder: with the published `reviews_<Category>_5.json.gz` and `meta_<Category>.json.gz`, or with
            interactions.parquet and items.parquet. Times are days; the order within a day is that of the
            file, or `seq_pos` where it is given (the canonical one).

    Returns:
        log (user_id, item_id = asin, surface, timestamp, outcomes, order) and items (item_id, title: of the
        product, or keywords where there is none; features: attribute, or brand and category, and the title's words).

    Raises:
        FileNotFoundError: neither set of files is there.
    """
    root = Path(folder)
    con = duckdb.connect()
    if (root / "interactions.parquet").exists():
        files = {name: sql_path(root / f"{name}.parquet") for name in ("interactions", "items")}
        log = con.sql(LOG.format(rows=SHARED_ROWS.format(**files))).to_arrow_table()
        items = con.sql(f"FROM {files['items']}")
        title = "coalesce(title, idgenrec_keywords)" if "title" in items.columns else "idgenrec_keywords"
        features = ""
        if "s3rec_attributes" in items.columns:
            features = ", list_transform(s3rec_attributes, lambda a: 'attribute=' || a) AS features"
        items = items.order("item_id").project(f"asin AS item_id, {title} AS title{features}")
        return log, with_words(items.to_arrow_table())
    reviews, meta = (sorted(root.glob(pattern)) for pattern in ("reviews_*_5.json*", "meta_*.json*"))
    if not reviews or not meta:
        raise FileNotFoundError(
            f"Amazon: {root} has neither interactions.parquet nor reviews_*_5.json.gz and meta_*.json.gz"
        )
    log = con.sql(LOG.format(rows=PUBLISHED_ROWS.format(file=sql_path(reviews[0])))).to_arrow_table()
    return log, with_words(_read_meta(meta[0], set(log["item_id"].unique().to_pylist())))


def with_words(items: pa.Table) -> pa.Table:
    """The items, their titles' words among their features."""
    before = items["features"].to_pylist() if "features" in items.column_names else None
    bags = pa.array(word_features(items["title"].to_pylist(), before), pa.list_(pa.string()))
    return items.select(["item_id", "title"]).append_column("features", bags)


def _read_meta(file: Path, wanted: set[str]) -> pa.Table:
    """Lines of JSON, or of Python literals, as the 2014 files are."""
    items = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            asin = ASIN.search(line)
            if asin and asin[1] in wanted:
                items.append(_item(_parse(line)))
    schema = {"item_id": pa.string(), "title": pa.string(), "features": pa.list_(pa.string())}
    return pa.Table.from_pylist(sorted(items, key=lambda item: item["item_id"]), schema=pa.schema(schema.items()))


def _parse(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return ast.literal_eval(line)


def _item(meta: dict[str, Any]) -> dict[str, Any]:
    brand = [f"brand={meta['brand']}"] if meta.get("brand") else []
    categories = dict.fromkeys(f"category={name}" for path in meta.get("categories", []) for name in path)
    return {"item_id": meta["asin"], "title": meta.get("title"), "features": [*brand, *categories]}
