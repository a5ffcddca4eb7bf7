"""Public sets by name: load, and prepare with the split that their results are reported on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pinrec_hf.data.amazon import load_amazon
from pinrec_hf.data.kuairand import KUAIRAND_SPLIT, load_kuairand
from pinrec_hf.data.movielens import load_movielens
from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.report import Report
from pinrec_hf.data.trivago import TRIVAGO_SPLIT, load_trivago


@dataclass(frozen=True)
class PublicSet:
    """A loader, what `prepare` is told, and the licence of the data."""

    load: Callable[..., tuple[pa.Table, pa.Table | None]]
    license: str
    options: dict[str, Any] = field(default_factory=lambda: {"leave_one_out": True})


PUBLIC_SETS = {
    "kuairand": PublicSet(load_kuairand, "CC BY-SA 4.0", {**KUAIRAND_SPLIT, "negative_outcomes": ("hate",)}),
    "ml1m": PublicSet(load_movielens, "GroupLens: research only, no redistribution"),
    "beauty": PublicSet(load_amazon, "none stated: local benchmarking only"),
    "sports": PublicSet(load_amazon, "none stated: local benchmarking only"),
    "trivago": PublicSet(load_trivago, "RecSys Challenge 2019 terms: local only", {}),
}


def prepare_public(
    name: str, folder: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, num_targets: int = 1
) -> Report:
    """Load a public set and write its sequences dataset.

    Args:
        name: a key of `PUBLIC_SETS`.
        folder: where its files are (see its loader).
        output_dir: a new folder.
        num_targets: of sets that are cut leave-one-out: events of a user that are test (see `prepare`).

    Raises:
        ValueError: no such name.
        FileNotFoundError: the files are not in `folder`.
    """
    if name not in PUBLIC_SETS:
        raise ValueError(f"no public set {name!r}; there are {sorted(PUBLIC_SETS)}")
    public = PUBLIC_SETS[name]
    options = dict(public.options)
    if name == "trivago" and (Path(folder) / "events.parquet").exists():
        options |= TRIVAGO_SPLIT
    log, items = public.load(folder)
    options |= {"name": name, "license": public.license, "num_targets": num_targets}
    return prepare(log, items=items, output_dir=output_dir, **options)
