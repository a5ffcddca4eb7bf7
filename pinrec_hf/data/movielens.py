"""MovieLens-1M (GroupLens; research only, no redistribution): the rating is the outcome.

`watch` (1 to 3 stars), `like` (4), `love` (5). The catalogue: the 3,416 movies with five ratings or more, as
SASRec has it.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv as csv

from pinrec_hf.data.source import sql_path

LOG = """
SELECT user_id::BIGINT AS user_id, movie_id::BIGINT AS item_id, 'movielens' AS surface,
       make_timestamp(timestamp::BIGINT * 1000000) AS timestamp,
       CASE rating WHEN 5 THEN ['love'] WHEN 4 THEN ['like'] ELSE ['watch'] END AS outcomes, "order"
FROM ratings
SEMI JOIN (SELECT movie_id FROM ratings GROUP BY movie_id HAVING count(*) >= 5) USING (movie_id)
ORDER BY user_id, "order"
"""

ITEMS = r"""
SELECT movie_id::BIGINT AS item_id, title,
       list_transform(string_split(genres, '|'), lambda g: 'genre=' || g)
       || CASE WHEN year = '' THEN [] ELSE ['year=' || year] END AS features
FROM (SELECT *, regexp_extract(title, '\((\d{4})\)\s*$', 1) AS year FROM movies)
SEMI JOIN (SELECT item_id FROM log) ON movie_id = item_id
ORDER BY movie_id
"""


def load_movielens(folder: str | os.PathLike[str]) -> tuple[pa.Table, pa.Table]:
    """The log and the items of MovieLens-1M, for a leave-one-out split.

    Args:
        folder: with the published ratings.dat and movies.dat, or with ratings.parquet and movies.parquet.
            More than half of all neighbours tie in time; the order among them is that of the file, or
            `sasrec_pos` where it is given (the one that published leave-one-out tables use).

    Returns:
        log (user_id, item_id, surface, timestamp, outcomes, order) and items (item_id, title, features:
        genre, year).

    Raises:
        FileNotFoundError: neither set of files is there.
    """
    root = Path(folder)
    con = duckdb.connect()
    if (root / "ratings.parquet").exists():
        con.sql(f'SELECT *, sasrec_pos AS "order" FROM {sql_path(root / "ratings.parquet")}').create_view("ratings")
        con.sql(f"FROM {sql_path(root / 'movies.parquet')}").create_view("movies")
    elif (root / "ratings.dat").exists():
        ratings = _read_dat(root / "ratings.dat", ["user_id", "movie_id", "rating", "timestamp"])
        con.register("published", ratings)
        con.execute('CREATE VIEW ratings AS SELECT *, row_number() OVER () AS "order" FROM published')
        con.register("movies", _read_dat(root / "movies.dat", ["movie_id", "title", "genres"]))
    else:
        raise FileNotFoundError(f"MovieLens-1M: {root} has neither ratings.parquet nor ratings.dat")
    log = con.sql(LOG).to_arrow_table()
    con.register("log", log)
    return log, con.sql(ITEMS).to_arrow_table()


def _read_dat(file: Path, names: list[str]) -> pa.Table:
    """Fields are separated by `::`, in Latin-1, without quoting."""
    text = file.read_bytes().replace(b"::", b"\t")
    return csv.read_csv(
        io.BytesIO(text),
        read_options=csv.ReadOptions(column_names=names, encoding="latin1"),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
    )
