"""`pinrec index`: embeds a model's catalogue and writes the index into the model's folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pinrec_hf.retrieval.encode import encode_items, encoder_fingerprint
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.pretrained import load_pretrained


def build_index(folder: str | os.PathLike[str], *, kind: str | None = None, device: str | None = None) -> ItemIndex:
    """Index the catalogue of a saved model, and save the index beside it, instead of any that is there.

    Args:
        folder: of the model, on this machine.
        kind: `"flat"`, `"hnsw"` or `"ivf"`; by default chosen by the catalogue's size.
        device: where the item encoder runs; the CPU by default.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no whole PinRec model, or an unknown kind.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} is no folder; download the model first to index it")
    model, tokenizer = load_pretrained(folder, device=device)
    index = ItemIndex.build(
        encode_items(model, tokenizer),
        encoder_fingerprint=encoder_fingerprint(model),
        catalogue_fingerprint=tokenizer.catalogue.fingerprint,
        kind=kind,
    )
    index.save(folder)
    return index
