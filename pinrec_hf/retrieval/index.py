"""The item index: item embeddings, searched by inner product with faiss.

Exact (flat) to 100 k items, HNSW to 5 M, IVF beyond. Graph and lists search inner products badly when the
norms of items differ, as they do under a dot product with item bias. So these two kinds search nearest
neighbours among items lifted onto a sphere by one more dimension, which is the same order exactly (Bachrach
et al. 2014, "Speeding up the Xbox recommender system"), and score what they find by inner product.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import save_file

from pinrec_hf.modeling.catalogue_pinrec import map_safetensors

FORMAT = 1
FLAT_LIMIT, HNSW_LIMIT = 100_000, 5_000_000
OVERFETCH_LIMIT = 1_000  # a query that excludes more than this is searched exactly if need be
FILES = ("index.faiss", "index.safetensors")

# From 1.15 faiss holds queries x dimension against this. Its 128,000 keeps a batch of requests off the matrix product,
# which wins from about four queries on and answers 64, of 100,000 items, in a fifth of the time.
if faiss.cvar.distance_compute_blas_threshold > 512:
    faiss.cvar.distance_compute_blas_threshold = 512


class ItemIndex:
    """Embeddings of catalogue rows. Make one with `build` or `load`; `len` counts the live items.

    Attributes:
        kind: `"flat"`, `"hnsw"` or `"ivf"`.
        dimension: width of the embeddings.
        encoder_fingerprint, catalogue_fingerprint: of the item encoder and the catalogue that it embedded.
    """

    def __init__(
        self,
        index: Any,  # faiss.Index; its own stubs lack half of what it can do
        vectors: np.ndarray,
        rows: np.ndarray,
        removed: np.ndarray,
        *,
        kind: str,
        radius: float,
        encoder_fingerprint: str,
        catalogue_fingerprint: str,
    ) -> None:
        self._index, self._vectors, self._rows, self._removed = index, vectors, rows, removed
        self.kind, self._radius = kind, radius
        self.encoder_fingerprint, self.catalogue_fingerprint = encoder_fingerprint, catalogue_fingerprint
        self.dimension = vectors.shape[1]
        self._locate()

    def _locate(self) -> None:
        """Remember the place of every live row in the index."""
        self._place = np.full(self._rows.max() + 1, -1, dtype=np.int64)
        live = np.flatnonzero(~self._removed)
        self._place[self._rows[live]] = live

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
    ) -> ItemIndex:
        """Index embeddings.

        Args:
            embeddings: float32 of shape `(n, dimension)`.
            rows: int64 of shape `(n,)`, the catalogue row of each; by default `0..n-1`.
            kind: `"flat"`, `"hnsw"` or `"ivf"`; by default chosen by size.

        Raises:
            ValueError: no embeddings, NaN or infinite ones, duplicate or negative rows, an unknown kind.
        """
        embeddings, rows = _check_items(embeddings, np.arange(len(embeddings)) if rows is None else rows)
        size, dimension = embeddings.shape
        if kind is None:
            kind = "flat" if size <= FLAT_LIMIT else "hnsw" if size <= HNSW_LIMIT else "ivf"
        index: Any
        if kind == "flat":
            index = faiss.IndexFlatIP(dimension)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dimension + 1, 32, faiss.METRIC_L2)
            index.hnsw.efConstruction = 200
        elif kind == "ivf":
            lists = max(1, min(int(4 * size**0.5), size // 39))  # faiss wants 39 items a list to train on
            index = faiss.index_factory(dimension + 1, f"IVF{lists},Flat", faiss.METRIC_L2)
        else:
            raise ValueError(f"unknown index kind {kind!r}; known are 'flat', 'hnsw' and 'ivf'")
        item_index = cls(
            index,
            embeddings,
            rows,
            np.zeros(size, dtype=bool),
            kind=kind,
            radius=float(np.linalg.norm(embeddings, axis=1).max()),
            encoder_fingerprint=encoder_fingerprint,
            catalogue_fingerprint=catalogue_fingerprint,
        )
        lifted = item_index._lift(embeddings)
        index.train(lifted)
        index.add(lifted)
        return item_index

    def _lift(self, items: np.ndarray) -> np.ndarray:
        """Items on the sphere of radius `_radius`. Those added later with a larger norm lie outside it."""
        if self.kind == "flat":
            return items
        missing = np.maximum(self._radius**2 - np.square(items, dtype=np.float64).sum(axis=1), 0)
        return np.column_stack([items, np.sqrt(missing).astype(np.float32)])

    def __len__(self) -> int:
        return int(len(self._rows) - self._removed.sum())

    def catalogue_embeddings(self) -> np.ndarray:
        """Embeddings in the order of the catalogue's rows: float32 `(rows, d)`, zeros where a row was never added.

        An item that was removed keeps its own.
        """
        if len(self._rows) == self._rows.max() + 1 and (self._rows == np.arange(len(self._rows))).all():
            return self._vectors
        embeddings = np.zeros((int(self._rows.max()) + 1, self.dimension), np.float32)
        embeddings[self._rows] = self._vectors
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
        queries = self._check_queries(queries)
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 item")
        passing = ~self._removed
        if allowed is not None:
            allowed = np.asarray(allowed)
            if allowed.dtype != bool or allowed.ndim != 1 or len(allowed) <= self._rows.max():
                raise ValueError(
                    f"allowed is {allowed.dtype} of shape {allowed.shape}; give one bool a catalogue row, at "
                    f"least {self._rows.max() + 1}"
                )
            passing &= allowed[self._rows]
        count = int(passing.sum())
        excluded = self._excluded_places(excluded_rows, passing, len(queries))
        fetch = min(k + min(max(map(len, excluded), default=0), OVERFETCH_LIMIT), count)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        if fetch == 0 or len(queries) == 0:
            return scores, rows
        if count < max(0.1 * len(passing), 10 * k):
            nearest, found = self._search_exactly(queries, np.flatnonzero(passing), fetch)
        else:
            nearest, found = self._search_faiss(queries, None if count == len(passing) else passing, fetch)
        for i, without in enumerate(excluded):
            keep = (found[i] >= 0) & ~np.isin(found[i], without)
            best_scores, best = nearest[i, keep][:k], found[i, keep][:k]
            remaining = min(k, count - len(without))
            if len(best) < remaining:  # more exclusions than were fetched, or lists that held too few
                candidates = np.setdiff1d(np.flatnonzero(passing), without, assume_unique=True)
                exact = self._search_exactly(queries[[i]], candidates, remaining)
                best_scores, best = exact[0][0], exact[1][0]
            scores[i, : len(best)], rows[i, : len(best)] = best_scores, self._rows[best]
        return scores, rows

    def _excluded_places(
        self, excluded_rows: Sequence[np.ndarray] | None, passing: np.ndarray, num_queries: int
    ) -> list[np.ndarray]:
        """For each query, where in the index its excluded rows are, as far as they would pass the filter."""
        if excluded_rows is None:
            return [np.zeros(0, dtype=np.int64)] * num_queries
        if len(excluded_rows) != num_queries:
            raise ValueError(f"{len(excluded_rows)} lists of excluded rows for {num_queries} queries; give one a query")
        excluded = [self._places(np.unique(np.asarray(rows, dtype=np.int64))) for rows in excluded_rows]
        return [places[(places >= 0) & passing[places]] for places in excluded]

    def _search_exactly(self, queries: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places `(m, k)` of the best among `places`, at least k; a block of items at a time."""
        scores = np.zeros((len(queries), 0), dtype=np.float32)
        found = np.zeros((len(queries), 0), dtype=np.int64)
        block = max(1024, 2**24 // max(len(queries), self.dimension))
        for start in range(0, len(places), block):
            some = places[start : start + block]
            scores = np.hstack([scores, queries @ self._vectors[some].T])
            found = np.hstack([found, np.broadcast_to(some, (len(queries), len(some)))])
            if scores.shape[1] > k:
                best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        return _best_first(scores, found)

    def _search_faiss(self, queries: np.ndarray, passing: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places `(m, k)`, best first, -1 where the index found fewer."""
        options: dict[str, Any] = {}
        if passing is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
        if self.kind == "flat":
            scores, found = self._index.search(queries, k, params=faiss.SearchParameters(**options))
            return _best_first(scores, found)
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(4 * k, 800), **options)
        else:
            probes = min(self._index.nlist, max(16, self._index.nlist // 10))
            parameters = faiss.SearchParametersIVF(nprobe=probes, **options)
        # A query's length changes no order among items; as long as the sphere's radius it probes lists best.
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        lifted = np.zeros((len(queries), self.dimension + 1), dtype=np.float32)
        lifted[:, :-1] = queries * (self._radius / np.where(lengths == 0, 1, lengths))
        found = self._index.search(lifted, k, params=parameters)[1]
        scores = np.full(found.shape, -np.inf, dtype=np.float32)
        for i, places in enumerate(found):
            hits = places >= 0
            scores[i, hits] = self._vectors[places[hits]] @ queries[i]
        return _best_first(scores, found)

    def _check_queries(self, queries: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries have the shape {queries.shape}; this index takes (n, {self.dimension})")
        wrong = ~np.isfinite(queries).all(axis=1)
        if wrong.any():
            raise ValueError(f"query {np.flatnonzero(wrong)[0]} holds NaN or infinity; check the model's output")
        return queries

    def add(self, embeddings: np.ndarray, rows: np.ndarray, *, catalogue_fingerprint: str | None = None) -> None:
        """Index more items, without a rebuild; a removed row may come back.

        Args:
            embeddings: float32 `(n, dimension)`, made by the same item encoder.
            rows: int64 `(n,)` catalogue rows.
            catalogue_fingerprint: of the catalogue that they come from, if it has grown since.

        Raises:
            ValueError: as `build`; also a row that is in the index, and embeddings of another width.
        """
        embeddings, rows = _check_items(embeddings, rows)
        if embeddings.shape[1] != self.dimension:
            raise ValueError(f"embeddings have width {embeddings.shape[1]}, this index {self.dimension}")
        present = rows[self._places(rows) >= 0]
        if len(present):
            raise ValueError(f"row {present[0]} is in the index already ({len(present)} such); remove it first")
        self._index.add(self._lift(embeddings))
        self._vectors = np.concatenate([self._vectors, embeddings])
        self._rows = np.concatenate([self._rows, rows])
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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `index.faiss`, `index.safetensors` and, last, `index.json`, without which nothing is loaded.

        Raises:
            ValueError: another process is writing an index into this folder.
        """
        os.makedirs(folder, exist_ok=True)
        partial = {name: os.path.join(folder, f"{name}.partial-{os.getpid()}") for name in (*FILES, "index.json")}
        lock = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process: nothing to clean up
            except BlockingIOError:
                raise ValueError(f"another run is writing an index into {folder}; wait for it") from None
            faiss.write_index(self._index, partial["index.faiss"])
            arrays = {"vectors": self._vectors, "rows": self._rows, "removed": self._removed.astype(np.uint8)}
            save_file(arrays, partial["index.safetensors"])
            about = {
                "format": FORMAT,
                "kind": self.kind,
                "dimension": self.dimension,
                "num_vectors": len(self._rows),
                "num_items": len(self),
                "radius": self._radius,
                "encoder_fingerprint": self.encoder_fingerprint,
                "catalogue_fingerprint": self.catalogue_fingerprint,
                "bytes": {name: os.path.getsize(partial[name]) for name in FILES},
            }
            with open(partial["index.json"], "w") as file:
                json.dump(about, file, indent=2)
            # Killed between two of these, the folder holds no index.json: no index, and never a mixture.
            if os.path.exists(os.path.join(folder, "index.json")):
                os.remove(os.path.join(folder, "index.json"))
            for name, path in partial.items():
                os.replace(path, os.path.join(folder, name))
        finally:
            os.close(lock)
            for path in partial.values():
                if os.path.exists(path):
                    os.remove(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, encoder_fingerprint: str, catalogue_fingerprint: str) -> ItemIndex:
        """Load a saved index, if it was made by this encoder from this catalogue.

        Raises:
            FileNotFoundError: there is no (complete) index in the folder.
            ValueError: another encoder's or catalogue's index, a truncated or foreign file.
        """
        again = f"index again with `pinrec index --model {os.fspath(folder)}`"
        try:
            with open(os.path.join(folder, "index.json")) as file:
                about = json.load(file)
            if about["format"] != FORMAT:
                raise ValueError
            sizes = {name: about["bytes"][name] for name in FILES}
        except FileNotFoundError:
            raise FileNotFoundError(f"no complete index in {folder}; {again}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder}/index.json is truncated or foreign; {again}") from None
        expected = {"encoder": encoder_fingerprint, "catalogue": catalogue_fingerprint}
        for what, fingerprint in expected.items():
            made_by = about[f"{what}_fingerprint"]
            if made_by != fingerprint:
                problem = f"was made by another {what} ({made_by}, not {fingerprint})"
                raise ValueError(f"the index in {folder} {problem}; {again}")
        for name, size in sizes.items():
            path = os.path.join(folder, name)
            if not os.path.exists(path) or os.path.getsize(path) != size:
                raise ValueError(f"{path} is missing or truncated (it had {size} bytes); {again}")
        arrays = map_safetensors(os.path.join(folder, "index.safetensors"))[0]
        try:
            index: Any = faiss.read_index(os.path.join(folder, "index.faiss"))
        except RuntimeError as error:
            raise ValueError(f"{folder}/index.faiss is no faiss index ({error}); {again}") from None
        if (index.ntotal, about["dimension"]) != arrays["vectors"].shape or len(arrays["rows"]) != index.ntotal:
            raise ValueError(f"the files in {folder} do not belong together; {again}")
        return cls(
            index,
            arrays["vectors"],
            arrays["rows"],
            arrays["removed"].astype(bool),
            kind=about["kind"],
            radius=about["radius"],
            encoder_fingerprint=encoder_fingerprint,
            catalogue_fingerprint=catalogue_fingerprint,
        )


def _best_first(scores: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row sorted by falling score; equal scores by place, the same for every kind of index."""
    order = np.lexsort((places, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def _check_items(embeddings: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    rows = np.array(rows, dtype=np.int64)
    if embeddings.ndim != 2 or rows.shape != embeddings.shape[:1] or embeddings.size == 0:
        raise ValueError(
            f"embeddings have the shape {embeddings.shape}, rows {rows.shape}; "
            "give float32 (n, dimension) and int64 (n,), n at least 1"
        )
    wrong = ~np.isfinite(embeddings).all(axis=1)
    if wrong.any():
        raise ValueError(f"the embedding of row {rows[wrong][0]} holds NaN or infinity ({wrong.sum()} such)")
    if rows.min() < 0 or len(np.unique(rows)) != len(rows):
        raise ValueError("rows must be catalogue rows from 0, each once; leave out unknown items (-1)")
    return embeddings, rows
