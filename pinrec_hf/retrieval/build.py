"""`pinrec index`: embeds a model's catalogue and writes the index into the model's folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pinrec_hf.retrieval.encode import encoder_fingerprint
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.item_parts import item_embeddings
from pinrec_hf.retrieval.item_table import ItemTable
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.retrieval.tune import real_queries, tune, write_frontier


def build_index(
    folder: str | os.PathLike[str],
    *,
    kind: str | None = None,
    device: str | None = None,
    memory_gib: float = 8,
    milvus: str | None = None,
    tune_on: str | os.PathLike[str] | None = None,
    recall: float = 0.95,
) -> ItemIndex | None:
    """Index the catalogue of a saved model, and save the index beside it, instead of any that is there.

    Several processes, launched together, share the encoding of a catalogue; a run that was killed goes on where it was
    (see `item_parts`).

    Args:
        folder: of the model, on this machine.
        kind, memory_gib, milvus: as in `ItemIndex.build`.
        device: where the item encoder runs; the CPU by default.
        tune_on: a sequences dataset, whose validation users tell the smallest search setting that reaches `recall` of
            the exact 100 best; writes `index_frontier.json` and `.png` into the folder.

    Returns:
        The index; `None` in other processes than the first.

    Raises:
        FileNotFoundError: no such folder.
        FileExistsError: another run is indexing this folder.
        ValueError: it holds no whole PinRec model, or another's items.parquet, an unknown kind, or a recall outside
            (0, 1].
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} is no folder; download the model first to index it")
    model, tokenizer = load_pretrained(folder, device=device)
    items = Path(folder) / "items.parquet"
    if items.exists():
        ItemTable(items, tokenizer.catalogue)  # what would be refused when it is served is refused now
    with item_embeddings(model, tokenizer, folder) as embeddings:
        if embeddings is None:
            return None
        index = ItemIndex.build(
            embeddings,
            encoder_fingerprint=encoder_fingerprint(model),
            catalogue_fingerprint=tokenizer.catalogue.fingerprint,
            kind=kind,
            memory_gib=memory_gib,
            milvus=milvus,
        )
        if tune_on is not None:
            chosen, frontier = tune(index, real_queries(model, tokenizer, tune_on), recall)
            write_frontier(folder, index.kind, chosen, frontier)
        index.save(folder)
    return index
