"""`pinrec index --add, --remove`: items come and go between two trainings, without a rebuild.

A new item is found by its content and features at once, and by the id rows of the items that it looks like
(`add_items`); in histories its id is the unknown item's until the next training. No weight changes, so that old items
and adapters stay what they are: the new vectors stand in the index alone, and building it anew would make them without
those rows. The result is a folder of its own, whole or absent: the old one goes on serving until the new one is
released.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq

from pinrec_hf.data.dataset_folder import grow_catalogue
from pinrec_hf.data.items import checked_items
from pinrec_hf.data.output import new_directory
from pinrec_hf.data.source import Input
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.retrieval.encode import encode_items, encoder_fingerprint
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.item_table import write_item_table
from pinrec_hf.retrieval.pretrained import load_pretrained

NOT_COPIED = ("catalogue.safetensors", "index.json", "index.faiss", "index.safetensors", "*.partial-*", "*.training")


def grow_index(
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    add: Input = None,
    remove: Input = None,
    boost: float = 0.0,
    time_unit: str | None = None,
    device: str | None = None,
) -> ItemIndex:
    """Copy an indexed model's folder, with more items, or with items whose life time ends.

    On Milvus the copy goes on with the collection of `folder`: grow one copy at a time.

    Args:
        folder: of the model, on this machine; adapters in it are copied too.
        output_dir: a new folder.
        add: items that the model's catalogue lacks, with the columns of `prepare`'s items.
        remove: `item_id` and `available_until` of items that it has; they stay in histories.
        boost: added to every score of a new item: how many slots new items get at the cost of the others.
        time_unit: of times that are integers, `"s"`, `"ms"` or `"us"`. device: where the item encoder runs.

    Returns:
        The index of the new folder.

    Raises:
        FileExistsError: `output_dir` exists.
        FileNotFoundError: no such folder, no index or items.parquet in it.
        ValueError: neither items to add nor to remove; items that break `prepare`'s contract, with ids or columns of
            another type or vectors of another width, to add and there already, or to remove and not there; a model
            that reads neither content nor features, or that is damaged; a boost without full ids and their biases.
            Nothing is written then.
    """
    root = Path(folder).resolve()  # of one release, also if `current` moves on meanwhile
    if not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} is no folder; download the model first")
    if not (root / "items.parquet").is_file():
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} holds no items.parquet; copy the model's folder whole")
    if add is None and remove is None:
        raise ValueError("neither items to add nor items to remove were given")
    if boost and (add is None or not math.isfinite(boost)):
        raise ValueError(f"boost {boost} is for the scores of items to add: give those too, and a finite number")
    with new_directory(output_dir) as output:
        model, tokenizer = load_pretrained(root, device=device)
        old = tokenizer.catalogue
        index = ItemIndex.load(
            root, encoder_fingerprint=encoder_fingerprint(model), catalogue_fingerprint=old.fingerprint
        )
        catalogue = old if remove is None else _with_ends(old, remove, time_unit)
        with nullcontext() if add is None else checked_items(add, time_unit) as items:
            if items is not None:
                if not (model.config.content_size or model.config.feature_buckets):
                    raise ValueError("this model knows items by id alone: a new one means nothing before a training")
                _refuse_known(old, items)
                catalogue = grow_catalogue(catalogue, items)
            shutil.copytree(root, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
            if items is not None:
                write_item_table(items / "items.parquet", output / "items.parquet", catalogue, root / "items.parquet")
        catalogue.save(output / "catalogue.safetensors")
        config = json.loads((root / "config.json").read_text("utf-8"))
        config["catalogue_fingerprint"] = model.config.catalogue_fingerprint = catalogue.fingerprint
        (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        if len(catalogue) > len(old):
            tokenizer.catalogue, rows = catalogue, np.arange(len(old), len(catalogue))
            model.add_items(catalogue, boost)  # in memory: the folder keeps its weights
            index.add(encode_items(model, tokenizer, rows), rows, catalogue_fingerprint=catalogue.fingerprint)
        with TemporaryDirectory(dir=output) as beside:  # the output's own lock is taken
            index.save(beside)
            for path in Path(beside).iterdir():
                path.rename(output / path.name)
    return index


def _refuse_known(catalogue: Catalogue, items: Path) -> None:
    ids = pq.read_table(items / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
    known = np.flatnonzero(catalogue.rows(ids) >= 0)
    if len(known):
        raise ValueError(
            f"item {ids[known[0]]!r} is in the catalogue already ({len(known):,} such rows): leave them out; content "
            "that changed is read by a training from nothing"
        )


def _with_ends(catalogue: Catalogue, remove: Input, time_unit: str | None) -> Catalogue:
    """The catalogue with the life times' ends that the table says."""
    with checked_items(remove, time_unit) as items:
        table = pq.read_table(items / "items.parquet")
    if "available_until" not in table.column_names or table["available_until"].null_count:
        raise ValueError("items to remove need available_until, the time from which each is not recommended any more")
    ids = table["item_id"].to_pylist()
    rows = catalogue.rows(ids)
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        raise ValueError(
            f"item {ids[unknown[0]]!r} is not in the catalogue ({len(unknown):,} such rows): it cannot be removed"
        )
    lives = catalogue.availability(rows)
    lives[:, 1] = table["available_until"].to_numpy()
    return catalogue.with_availability(rows, lives)
