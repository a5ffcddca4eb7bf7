"""A small log of three surfaces, with its items and queries: what tests prepare and what docs are read with."""

from typing import Any

import numpy as np
import pyarrow as pa

DAY = 86_400
FIRST_TIME = 1_700_006_400  # a midnight, UTC
NUM_ITEMS, NUM_USERS, NUM_DAYS = 60, 80, 8
CONTENT_SIZE, QUERY_SIZE = 8, 6
ITEM_IDS = [f"p{n}" for n in range(NUM_ITEMS - 4)] + ["with space", 'quo"te', "new\nline", "emoji 🛋️"]
QUERIES = ["blue sofa", "red chair", "lamp", "rug"]
OUTCOMES = [["save"], ["click"], ["click", "save"], ["hide"], [], []]


def tiny_log(seed: int = 0) -> list[dict[str, Any]]:
    """Log rows: feed views of three surfaces; users like a fifth of the items (`n % 5 == user % 5`).

    With ignored impressions, hides, items that the items table lacks, and holes: surface, time, outcomes.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for user in range(NUM_USERS):
        for time in np.sort(rng.integers(0, NUM_DAYS * DAY, rng.integers(4, 12))).tolist():
            surface = ["homefeed", "search", "related"][rng.choice(3, p=[0.5, 0.3, 0.2])]
            view = {
                "user_id": f"u{user}",
                "surface": surface,
                "timestamp": FIRST_TIME + time,
                "query": QUERIES[user % 4] if surface == "search" else None,
                "context_item_id": f"p{rng.integers(NUM_ITEMS - 4)}" if surface == "related" else None,
                "request_features": [f"device={['ios', 'web'][user % 2]}", f"day={time // DAY}"],
            }
            if surface == "search":
                rows.append({**view, "item_id": None, "outcomes": [], "position": None})
            for position in range(rng.integers(1, 5)):
                item = int(rng.integers(12)) * 5 + user % 5 if rng.random() < 0.7 else int(rng.integers(NUM_ITEMS))
                rows.append(
                    {
                        **view,
                        "timestamp": view["timestamp"] + position,
                        "item_id": ITEM_IDS[item] if rng.random() > 0.03 else f"gone{item}",
                        "outcomes": OUTCOMES[rng.integers(len(OUTCOMES))],
                        "position": position,
                    }
                )
    for row, hole in zip(
        rng.choice(len(rows), 12, replace=False), ["surface", "timestamp", "outcomes"] * 4, strict=True
    ):
        rows[row][hole] = None
    return rows


def tiny_items() -> pa.Table:
    rng = np.random.default_rng(1)
    lives = [None] * (NUM_ITEMS - 6) + [FIRST_TIME + 2 * DAY] * 3 + [None] * 3
    ends = [None] * (NUM_ITEMS - 3) + [FIRST_TIME + 5 * DAY] * 3
    return pa.table(
        {
            "item_id": ITEM_IDS,
            "embedding": pa.array(list(rng.normal(size=(NUM_ITEMS, CONTENT_SIZE)).astype(np.float32))),
            "features": [[f"topic={n % 5}", f"author={n % 7}"] if n % 9 else [] for n in range(NUM_ITEMS)],
            "available_from": pa.array(lives, pa.timestamp("s")),
            "available_until": pa.array(ends, pa.timestamp("s")),
            "title": [f"Title of {item}" for item in ITEM_IDS],
            "market": [["de", "us"][n % 2] for n in range(NUM_ITEMS)],
        }
    )


def tiny_queries() -> pa.Table:
    """All but the last query have a vector."""
    vectors = np.random.default_rng(2).normal(size=(3, QUERY_SIZE)).astype(np.float32)
    return pa.table({"query": QUERIES[:3], "embedding": pa.array(list(vectors))})
