"""The item index: the items of largest inner product with a query, among those that a request may have.

A back end (`faiss_index`, `milvus_index`) finds candidates; this door knows which catalogue rows they are, keeps out
what is removed, filtered or excluded, scores by the vectors themselves, and searches exactly where few items pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from pinrec_hf.retrieval.faiss_index import FLAT_LIMIT, FaissIndex, Neighbours, choose_kind
from pinrec_hf.retrieval.index_folder import read_index, write_index
from pinrec_hf.retrieval.milvus_index import MilvusIndex
from pinrec_hf.retrieval.passing import Passing
from pinrec_hf.retrieval.vectors import ItemVectors, check_items, check_queries

OVERFETCH_LIMIT = 1_000  # a query that excludes more than this is searched exactly if need be


class ItemIndex:
    """Embeddings of catalogue rows. Make one with `build` or `load`; `len` counts the live items.

    Attributes:
        kind: `"flat"`, `"hnsw"`, `"ivf"`, `"ivfpq"` or `"milvus"`.
        dimension: width of the embeddings.
        encoder_fingerprint, catalogue_fingerprint: of the item encoder and the catalogue that it embedded.
        neighbours, vectors, rows, live: back end, vectors, catalogue rows (int64) and what is not removed, by place.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        vectors: ItemVectors,
        rows: np.ndarray,
        removed: np.ndarray,
        *,
        encoder_fingerprint: str,
        catalogue_fingerprint: str,
    ) -> None:
        self.neighbours, self.vectors, self.rows, self._removed = neighbours, vectors, rows, removed
        self.encoder_fingerprint, self.catalogue_fingerprint = encoder_fingerprint, catalogue_fingerprint
        self.kind, self.dimension = neighbours.kind, vectors.dimension
        self._locate()

    def _locate(self) -> None:
        """Remember which items are live, and the place of every live row."""
        self.live = Passing(~self._removed)
        self._place = np.full(self.rows.max() + 1, -1, dtype=np.int64)
        self._place[self.rows[self.live.places]] = self.live.places
        self._in_order = len(self.rows) == len(self._place) and bool((np.diff(self.rows) == 1).all())

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Where in the index catalogue rows are, -1 for those that are not."""
        known = (rows >= 0) & (rows < len(self._place))
        return np.where(known, self._place[np.where(known, rows, 0)], -1)

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        encoder_fingerprint: str,
        catalogue_fingerprint: str,
        kind: str | None = None,
        memory_gib: float = 8,
        milvus: str | None = None,
    ) -> ItemIndex:
        """Index embeddings.

        Args:
            embeddings: float32 of shape `(n, dimension)`; kept as they are, so a mapped array stays on disk.
            rows: int64 of shape `(n,)`, the catalogue row of each; by default `0..n-1`.
            kind: `"flat"`, `"hnsw"`, `"ivf"` or `"ivfpq"`; by default chosen by size and memory.
            memory_gib: what the index may take when it is served, in GiB.
            milvus: URI of a Milvus that searches in the place of faiss, or a file for milvus-lite.

        Raises:
            ValueError: no embeddings, NaN or infinite ones, duplicate or negative rows, an unknown kind, or more
                items than fit the memory.
        """
        embeddings, rows = check_items(embeddings, np.arange(len(embeddings)) if rows is None else rows)
        vectors = ItemVectors(embeddings)
        neighbours: Neighbours
        if milvus is not None:
            neighbours = MilvusIndex.build(vectors, milvus)
        else:
            neighbours = FaissIndex.build(vectors, kind or choose_kind(len(vectors), vectors.dimension, memory_gib))
        return cls(
            neighbours,
            vectors,
            rows,
            np.zeros(len(rows), dtype=bool),
            encoder_fingerprint=encoder_fingerprint,
            catalogue_fingerprint=catalogue_fingerprint,
        )

    def __len__(self) -> int:
        return self.live.count

    def catalogue_embeddings(self) -> np.ndarray:
        """Embeddings in the order of the catalogue's rows: float32 `(rows, d)`, zeros where a row was never added.

        An item that was removed keeps its own.
        """
        if self._in_order:
            return self.vectors.whole()
        embeddings = np.zeros((int(self.rows.max()) + 1, self.dimension), np.float32)
        embeddings[self.rows] = self.vectors.whole()
        return embeddings

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        excluded_rows: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k items of largest inner product with each query.

        Args:
            queries: float32 of shape `(m, dimension)`.
            allowed: bool over all catalogue rows: only items with True are found. Few are searched exactly.
            excluded_rows: for each query an int64 array of catalogue rows not to be found for it; rows that
                are not in the index do no harm.

        Returns:
            Scores float32 `(m, k)`, best first, padded with -inf, and catalogue rows int64 `(m, k)`, padded
            with -1. Padding occurs only where fewer than k items remain.

        Raises:
            ValueError: k below 1, queries of another width or not finite, a mask that is too short.
        """
        queries = check_queries(queries, self.dimension)
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 item")
        passing = self.live if allowed is None else self._filtered(allowed)
        excluded = self._excluded_places(excluded_rows, passing, len(queries))
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        fetch = min(k + min(max(map(len, excluded), default=0), OVERFETCH_LIMIT), passing.count)
        if fetch == 0 or len(queries) == 0:
            return scores, rows
        found = self._candidates(queries, fetch, passing)
        hidden = np.zeros(len(passing.mask), dtype=bool)  # from one query's exclusions; a set would be slower
        for i, without in enumerate(excluded):
            candidates = found[i, found[i] >= 0]
            if len(without):
                hidden[without] = True
                candidates = candidates[~hidden[candidates]]
                hidden[without] = False
            remaining = min(k, passing.count - len(without))
            if len(candidates) < remaining:  # more exclusions than were fetched, or lists that held too few
                candidates = np.setdiff1d(passing.places, without, assume_unique=True)
            (best_scores,), (best,) = self.vectors.nearest(queries[[i]], candidates, remaining)
            scores[i, :remaining], rows[i, :remaining] = best_scores[:remaining], self.rows[best[:remaining]]
        return scores, rows

    def _filtered(self, allowed: np.ndarray) -> Passing:
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.ndim != 1 or len(allowed) < len(self._place):
            raise ValueError(
                f"allowed is {allowed.dtype} of shape {allowed.shape}; give one bool a catalogue row, at "
                f"least {len(self._place)}"
            )
        return Passing(self.live.mask & (allowed[: len(self.rows)] if self._in_order else allowed[self.rows]))

    def _excluded_places(
        self, excluded_rows: Sequence[np.ndarray] | None, passing: Passing, num_queries: int
    ) -> list[np.ndarray]:
        """For each query, where in the index its excluded rows are, as far as they would pass the filter."""
        if excluded_rows is None:
            return [np.zeros(0, dtype=np.int64)] * num_queries
        if len(excluded_rows) != num_queries:
            raise ValueError(f"{len(excluded_rows)} lists of excluded rows for {num_queries} queries; give one a query")
        excluded = [self._places(np.unique(np.asarray(rows, dtype=np.int64))) for rows in excluded_rows]
        return [places[(places >= 0) & passing.mask[places]] for places in excluded]

    def _candidates(self, queries: np.ndarray, fetch: int, passing: Passing) -> np.ndarray:
        """Places `(m, fetch or more)`, -1 where the back end found fewer; of few items the best themselves."""
        if passing.count <= max(10 * fetch, min(len(passing.mask) // 10, FLAT_LIMIT)) and passing.share < 1:
            return self.vectors.nearest(queries, passing.places, fetch)[1]
        return self.neighbours.search(queries, fetch, None if passing.share == 1 else passing)

    def add(self, embeddings: np.ndarray, rows: np.ndarray, *, catalogue_fingerprint: str | None = None) -> None:
        """Index more items, without a rebuild; a removed row may come back.

        Args:
            embeddings: float32 `(n, dimension)`, made by the same item encoder.
            rows: int64 `(n,)` catalogue rows.
            catalogue_fingerprint: of the catalogue that they come from, if it has grown since.

        Raises:
            ValueError: as `build`; also a row that is in the index, and embeddings of another width.
        """
        embeddings, rows = check_items(embeddings, rows)
        if embeddings.shape[1] != self.dimension:
            raise ValueError(f"embeddings have width {embeddings.shape[1]}, this index {self.dimension}")
        present = rows[self._places(rows) >= 0]
        if len(present):
            raise ValueError(f"row {present[0]} is in the index already ({len(present)} such); remove it first")
        self.neighbours.add(embeddings)
        self.vectors.append(embeddings)
        self.rows = np.concatenate([self.rows, rows])
        self._removed = np.concatenate([self._removed, np.zeros(len(rows), dtype=bool)])
        self.catalogue_fingerprint = catalogue_fingerprint or self.catalogue_fingerprint
        self._locate()

    def remove(self, rows: np.ndarray) -> None:
        """Tombstone catalogue rows: never found again, unless added anew.

        Raises:
            ValueError: a row that is not in the index.
        """
        rows = np.asarray(rows, dtype=np.int64)
        places = self._places(rows)
        absent = rows[places < 0]
        if len(absent):
            raise ValueError(f"row {absent[0]} is not in the index ({len(absent)} such); remove only what is")
        self._removed[places] = True
        self._place[rows] = -1
        self.live = Passing(~self._removed)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `index.faiss`, `index.safetensors` and, last, `index.json`, without which nothing is loaded.

        Raises:
            FileExistsError: another process is writing an index into this folder.
        """
        about = {
            "dimension": self.dimension,
            "num_vectors": len(self.rows),
            "num_items": len(self),
            "encoder_fingerprint": self.encoder_fingerprint,
            "catalogue_fingerprint": self.catalogue_fingerprint,
        }
        arrays = {"rows": self.rows, "removed": self._removed.astype(np.uint8)}
        write_index(folder, self.neighbours, self.vectors, arrays, about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, encoder_fingerprint: str, catalogue_fingerprint: str) -> ItemIndex:
        """Load a saved index, if it was made by this encoder from this catalogue.

        Raises:
            FileNotFoundError: there is no (complete) index in the folder.
            ValueError: another encoder's or catalogue's index, a truncated or foreign file.
        """
        fingerprints = {"encoder": encoder_fingerprint, "catalogue": catalogue_fingerprint}
        neighbours, arrays = read_index(folder, fingerprints)[:2]
        return cls(
            neighbours,
            ItemVectors(arrays["vectors"]),
            arrays["rows"],
            arrays["removed"].astype(bool),
            encoder_fingerprint=encoder_fingerprint,
            catalogue_fingerprint=catalogue_fingerprint,
        )
