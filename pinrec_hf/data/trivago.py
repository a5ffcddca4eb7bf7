"""trivago, RecSys Challenge 2019 (challenge terms): searches with text, hotel pages, lists of shown hotels.

What becomes of the log's steps, by surface:

    search        a search for a destination or a place: a query event; for a hotel: outcome `search`
    refine        a filter or a sort order: a query event with its name
    item_detail   something on a hotel's page was used: outcome `interaction`
    result_list   up to 25 hotels shown, with positions, the clicked one with outcome `clickout`; their query
                  is the session's latest search text
"""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pyarrow as pa

from pinrec_hf.data.source import sql_path

# The two days of events.parquet; the published train.csv has six, where `prepare`'s own default does.
TRIVAGO_SPLIT = {
    "validation_start": "2018-11-08T12:00Z",
    "test_start": "2018-11-08T18:00Z",
    "test_end": "2018-11-09T00:00Z",
}

PUBLISHED_ROWS = """
SELECT * EXCLUDE impressions, try_cast(reference AS BIGINT) AS item_id,
       CASE WHEN try_cast(reference AS BIGINT) IS NULL THEN reference END AS query,
       list_transform(string_split(impressions, '|'), lambda i: i::BIGINT) AS impressions
FROM read_csv({file}, types = {{user_id: 'VARCHAR', session_id: 'VARCHAR', reference: 'VARCHAR',
                                  impressions: 'VARCHAR'}})
"""

LOG = """
WITH steps AS (
    SELECT user_id, make_timestamp(timestamp * 1000000) AS timestamp, item_id, query, impressions,
           session_id || '/' || step AS request_id,
           ['device=' || device, 'platform=' || platform] AS request_features,
           CASE WHEN action_type LIKE 'search for %' THEN 'search'
                WHEN action_type LIKE 'interaction item %' THEN 'item_detail'
                WHEN action_type = 'clickout item' THEN 'result_list'
                ELSE 'refine' END AS surface,
           row_number() OVER (PARTITION BY user_id ORDER BY timestamp, session_id, step) AS "order",
           last_value(CASE WHEN action_type IN ('search for destination', 'search for poi') THEN query END
                      IGNORE NULLS) OVER (PARTITION BY user_id, session_id ORDER BY step) AS searched
    FROM ({rows})
),
acts AS (  -- all but the lists; a clicked hotel that its own list lacks is one of them
    SELECT * REPLACE (CASE WHEN surface = 'result_list' THEN searched ELSE query END AS query),
           NULL::INTEGER AS position,
           CASE WHEN item_id IS NULL THEN [] WHEN surface = 'search' THEN ['search']
                WHEN surface = 'result_list' THEN ['clickout'] ELSE ['interaction'] END AS outcomes
    FROM steps
    WHERE (item_id IS NOT NULL OR (surface IN ('search', 'refine') AND query IS NOT NULL))
          AND (impressions IS NULL OR NOT list_contains(impressions, item_id))
),
lists AS (
    SELECT *, unnest(impressions) AS shown, generate_subscripts(impressions, 1)::INTEGER - 1 AS position
    FROM steps WHERE surface = 'result_list'
),
shown AS (
    SELECT * EXCLUDE shown REPLACE (shown AS item_id, searched AS query),
           CASE WHEN position + 1 = list_position(impressions, item_id) THEN ['clickout'] ELSE [] END
               AS outcomes
    FROM lists
)
SELECT user_id, item_id, surface, timestamp, outcomes, "order", request_id, position, query, request_features
FROM (FROM acts UNION ALL BY NAME FROM shown) ORDER BY user_id, "order", position
"""

ITEMS = """
SELECT item_id::BIGINT AS item_id,
       list_transform(string_split(properties, '|'), lambda p: 'property=' || p) AS features
FROM read_csv({file}) ORDER BY item_id
"""


def load_trivago(folder: str | os.PathLike[str]) -> tuple[pa.Table, pa.Table | None]:
    """The log and, if item_metadata.csv is there, the items of the trivago challenge.

    Args:
        folder: with the published train.csv (and item_metadata.csv), or with events.parquet.

    Returns:
        log (user_id, item_id: null for a query, surface, timestamp, outcomes, order, request_id: session and
        step, position, query, request_features) and items (item_id, features: property) or None.

    Raises:
        FileNotFoundError: neither file is there.
    """
    root = Path(folder)
    con = duckdb.connect()
    if (root / "events.parquet").exists():
        rows = f"SELECT * FROM {sql_path(root / 'events.parquet')}"
    elif (root / "train.csv").exists():
        rows = PUBLISHED_ROWS.format(file=sql_path(root / "train.csv"))
    else:
        raise FileNotFoundError(f"trivago: {root} has neither events.parquet nor train.csv")
    log = con.sql(LOG.format(rows=rows)).to_arrow_table()
    metadata = root / "item_metadata.csv"
    return log, con.sql(ITEMS.format(file=sql_path(metadata))).to_arrow_table() if metadata.exists() else None
