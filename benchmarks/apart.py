"""Models of one surface each, which see nothing of the others: what one model for all is held against."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from pinrec_hf.evaluation.ranker import ModelRanker

SPLITS = ("train", "validation", "test")


def one_surface(data: Path, surface: str, output: Path) -> Path:
    """`output`, the sequences dataset of one surface's events in `data`, and of those of an unknown surface, with the
    items and names of all; made unless it is there."""
    if output.exists():
        return output
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.copytree(data, partial, ignore=shutil.ignore_patterns(*SPLITS))
    metadata = json.loads((partial / "metadata.json").read_text())
    connection = duckdb.connect()
    for split in SPLITS:
        (partial / split).mkdir()
        rows = connection.read_parquet(str(data / split / "*.parquet"))
        lists = [name for name in rows.columns if name not in ("user_id", "target_start")]
        own = ", ".join(f'list_where("{name}", own) AS "{name}"' for name in lists)
        rows.query(  # the rows, by name
            "rows",
            f"""SELECT user_id, {own}, len(list_where(own[:target_start], own[:target_start])) AS target_start
                FROM (SELECT *, [coalesce(name = '{surface}', true) FOR name IN surface] AS own FROM rows)
                WHERE list_contains(own[target_start + 1:], true)
                ORDER BY user_id""",
        ).write_parquet(str(partial / split / "part-00000.parquet"))
        counts = connection.read_parquet(str(partial / split / "*.parquet")).aggregate("count(*), sum(len(item_id))")
        metadata["num_users"][split], metadata["num_events"][split] = map(int, counts.fetchall()[0])
    (partial / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    partial.rename(output)
    return output


class OwnHistory(ModelRanker):
    """A model of one surface: it sees what the user did there; what was seen elsewhere is removed all the same."""

    def asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        history = request["history"]
        own = [i for i, surface in enumerate(history["surface"]) if surface in (None, request["surface"])]
        return {
            **super().asked(request),
            "history": {name: [column[i] for i in own] for name, column in history.items()},
        }
