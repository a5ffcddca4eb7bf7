"""KuaiRand-Pure (Gao et al., CIKM 2022; CC BY-SA 4.0): short videos shown on the tabs of one app.

An impression carries its strongest outcome only, or none: engage (liked, followed, commented or forwarded),
then long_view, then click. `hate` is negative and stands alone. The `counts` and `*_cnt` columns and
`play_progress` are statistics of the whole month, the future included: they are never read, nor is
video_features_statistic_pure.csv, which holds them.
"""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pyarrow as pa

from pinrec_hf.data.source import sql_path

# Beijing days: train before 3 May, validation 3 May, test 4 and 5 May 2022.
KUAIRAND_SPLIT = {
    "validation_start": "2022-05-03T00:00+08:00",
    "test_start": "2022-05-04T00:00+08:00",
    "test_end": "2022-05-06T00:00+08:00",
}

RAW_LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
RAW_ITEMS = "video_features_basic_pure.csv"

EVENTS = """
SELECT user_id::BIGINT AS user_id, video_id::BIGINT AS item_id, tab::VARCHAR AS surface,
       make_timestamp(time_ms * 1000) AS timestamp,
       CASE WHEN is_hate = 1 THEN ['hate']
            WHEN is_like = 1 OR is_follow = 1 OR is_comment = 1 OR is_forward = 1 THEN ['engage']
            WHEN long_view = 1 THEN ['long_view']
            WHEN is_click = 1 THEN ['click']
            ELSE [] END AS outcomes,
       row_number() OVER (ORDER BY time_ms, user_id, video_id, tab) AS "order"
FROM {rows}
"""

# The lists hold the last 50 videos shown, long-viewed and liked. The n-th last occurrence of a video in each
# is taken for one event. What has already left the list of impressions is older, and comes first.
HISTORY = """
WITH shown AS ({shown}), viewed AS ({viewed}), liked AS ({liked}),
merged AS (
    SELECT user_id, item_id, liked.place IS NOT NULL AS is_like, viewed.place IS NOT NULL AS is_long_view,
           CASE WHEN shown.place IS NOT NULL THEN 2 WHEN viewed.place IS NOT NULL THEN 1 ELSE 0 END AS age,
           coalesce(shown.place, viewed.place, liked.place) AS place
    FROM shown
    FULL JOIN viewed USING (user_id, item_id, from_end)
    FULL JOIN liked USING (user_id, item_id, from_end)
)
SELECT user_id, item_id, NULL::VARCHAR AS surface, NULL::TIMESTAMP AS timestamp,
       CASE WHEN is_like THEN ['engage'] WHEN is_long_view THEN ['long_view'] ELSE [] END AS outcomes,
       row_number() OVER (PARTITION BY user_id ORDER BY age, place) AS "order"
FROM merged
"""

LIST = """
SELECT *, row_number() OVER (PARTITION BY user_id, item_id ORDER BY place DESC) AS from_end
FROM (SELECT user_id, unnest({name}) AS item_id, generate_subscripts({name}, 1) AS place FROM history)
"""

ITEMS = """
SELECT video_id::BIGINT AS item_id, upload_dt::TIMESTAMP - INTERVAL 8 HOUR AS available_from,
       list_filter(
           ['author=' || author_id, 'music=' || music_id,
            'type=' || video_type, 'upload_type=' || upload_type, 'duration=' || duration]
           || coalesce(list_transform(string_split(tag::VARCHAR, ','), lambda t: 'tag=' || trim(t)), []),
           lambda f: f IS NOT NULL) AS features
FROM (
    SELECT *, CASE WHEN video_duration >= 1000 THEN floor(log2(video_duration / 1000))::INT END AS duration
    FROM {rows}
)
ORDER BY item_id
"""


def load_kuairand(folder: str | os.PathLike[str]) -> tuple[pa.Table, pa.Table]:
    """The log and the items of KuaiRand-Pure.

    Args:
        folder: with the published csv files (or their parent with `data/`), or with events.parquet,
            history_before_apr25.parquet and items.parquet. The latter's history becomes events of unknown
            time and surface, in order.

    Returns:
        log (user_id, item_id, surface = the tab, timestamp, outcomes, order) and items (item_id,
        available_from: start of the upload day in Beijing, features: author, music, type, upload_type,
        duration = log2 of seconds, tag).

    Raises:
        FileNotFoundError: neither set of files is there.
    """
    root = Path(folder)
    con = duckdb.connect()
    if (root / "events.parquet").exists():
        con.sql(f"FROM {_relation([root / 'history_before_apr25.parquet'])}").create_view("history")
        names = {"shown": "impression_seq", "viewed": "long_view_seq", "liked": "like_seq"}
        history = HISTORY.format(**{list_: LIST.format(name=name) for list_, name in names.items()})
        events = EVENTS.format(rows=_relation([root / "events.parquet"]))
        log = con.sql(f'SELECT * FROM ({history} UNION ALL {events}) ORDER BY user_id, timestamp NULLS FIRST, "order"')
        items = con.sql(ITEMS.format(rows=_relation([root / "items.parquet"])))
        return log.to_arrow_table(), items.to_arrow_table()
    root = root / "data" if (root / "data" / RAW_ITEMS).exists() else root
    files = [root / name for name in (*RAW_LOGS, RAW_ITEMS)]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"KuaiRand-Pure: {root} has neither events.parquet nor {missing}")
    events = EVENTS.format(rows=f"(SELECT DISTINCT * FROM {_relation(files[:2])})")
    log = con.sql(f'SELECT * FROM ({events}) ORDER BY user_id, timestamp, "order"')
    return log.to_arrow_table(), con.sql(ITEMS.format(rows=_relation(files[2:]))).to_arrow_table()


def _relation(files: list[Path]) -> str:
    paths = ", ".join(map(sql_path, files))
    return f"read_{'csv' if files[0].suffix == '.csv' else 'parquet'}([{paths}])"
