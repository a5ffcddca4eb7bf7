"""Items found by words of their titles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pinrec_hf.demo.answer import has_titles
from pinrec_hf.retrieval.retriever import PinRecRetriever


class TitleSearch:
    """All titles of a catalogue, in lower case; where it has none, its ids."""

    def __init__(self, retriever: PinRecRetriever) -> None:
        self.retriever = retriever
        self.has_titles = has_titles(retriever)
        self._lower = pc.utf8_lower(pa.array(self.names(np.arange(len(retriever.tokenizer.catalogue)))))

    def names(self, rows: np.ndarray) -> list[str]:
        """Titles, else ids, at int64 catalogue rows `(n,)`."""
        ids = self.retriever.tokenizer.catalogue.ids(rows)
        titles = self.retriever.items.values("title", rows) if self.has_titles and self.retriever.items else ids
        return [str(title or item_id) for title, item_id in zip(titles, ids, strict=True)]

    def find(self, words: str, most: int = 8) -> list[tuple[str, Any]]:
        """`(title, item id)` of at most `most` items whose titles hold every word, in the catalogue's order."""
        if not words.split():
            return []
        there = np.ones(len(self._lower), bool)
        for word in words.lower().split():
            there &= pc.match_substring(self._lower, word).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(there)[:most]
        return list(zip(self.names(rows), self.retriever.tokenizer.catalogue.ids(rows), strict=True))
