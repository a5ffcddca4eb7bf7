"""Item vectors that are searched exactly: mapped from disk, so that memory holds what is looked at, and no copy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import numpy as np

BLOCK = 65_536  # vectors looked at together
DTYPES = {"float32": "F32", "int64": "I64", "uint8": "U8"}


class ItemVectors:
    """float32 vectors `(n, dimension)` by place. The first ones are taken as they are, an array in memory or on disk;
    those that `append` adds lie in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._blocks = [vectors, vectors[:0]]
        self.dimension = vectors.shape[1]

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The vectors at `places`, int64 `(m,)`."""
        first, added = self._blocks
        if len(added) == 0:
            return first[places]
        vectors = np.empty((len(places), self.dimension), np.float32)
        late = places >= len(first)
        vectors[~late], vectors[late] = first[places[~late]], added[places[late] - len(first)]
        return vectors

    def append(self, vectors: np.ndarray) -> None:
        self._blocks[1] = np.concatenate([self._blocks[1], vectors])

    def whole(self) -> np.ndarray:
        """All of them as one array; the first ones as they are if nothing was added."""
        return np.concatenate(self._blocks) if len(self._blocks[1]) else self._blocks[0]

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them in order, some at a time."""
        for block in self._blocks:
            yield from (block[start : start + BLOCK] for start in range(0, len(block), BLOCK))

    def nearest(self, queries: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k of largest inner product among `places`, at least k, with each of `queries` `(m, dimension)`.

        Returns:
            Scores float32 and places int64 `(m, k)`, best first; equal scores by place.
        """
        scores = np.zeros((len(queries), 0), dtype=np.float32)
        found = np.zeros((len(queries), 0), dtype=np.int64)
        block = max(1024, 2**24 // max(len(queries), self.dimension))
        for start in range(0, len(places), block):
            some = places[start : start + block]
            scores = np.hstack([scores, queries @ self[some].T])
            found = np.hstack([found, np.broadcast_to(some, (len(queries), len(some)))])
            if scores.shape[1] > k:
                best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        order = np.lexsort((found, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def write_safetensors(path: str | os.PathLike[str], vectors: ItemVectors, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of `vectors` and smaller `arrays`; safetensors' own writer holds all of it in memory twice."""
    entries = [("vectors", "float32", [len(vectors), vectors.dimension], 4 * len(vectors) * vectors.dimension)]
    entries += [(name, array.dtype.name, list(array.shape), array.nbytes) for name, array in arrays.items()]
    header, end = {}, 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in vectors.blocks():
            np.ascontiguousarray(block).tofile(file)
        for array in arrays.values():
            array.tofile(file)


def check_items(embeddings: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `(n, dimension)` as float32, catalogue rows `(n,)` as int64.

    Raises:
        ValueError: none, other shapes, NaN or infinity, duplicate or negative rows.
    """
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    rows = np.array(rows, dtype=np.int64)
    if embeddings.ndim != 2 or rows.shape != embeddings.shape[:1] or embeddings.size == 0:
        raise ValueError(
            f"embeddings have the shape {embeddings.shape}, rows {rows.shape}; "
            "give float32 (n, dimension) and int64 (n,), n at least 1"
        )
    for start in range(0, len(rows), BLOCK):
        wrong = ~np.isfinite(embeddings[start : start + BLOCK]).all(axis=1)
        if wrong.any():
            raise ValueError(f"the embedding of row {rows[start:][wrong.argmax()]} holds NaN or infinity")
    if rows.min() < 0 or len(np.unique(rows)) != len(rows):
        raise ValueError("rows must be catalogue rows from 0, each once; leave out unknown items (-1)")
    return embeddings, rows


def check_queries(queries: np.ndarray, dimension: int) -> np.ndarray:
    """Queries `(m, dimension)` as float32.

    Raises:
        ValueError: another width, NaN or infinity.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ValueError(f"queries have the shape {queries.shape}; this index takes (n, {dimension})")
    wrong = ~np.isfinite(queries).all(axis=1)
    if wrong.any():
        raise ValueError(f"query {np.flatnonzero(wrong)[0]} holds NaN or infinity; check the model's output")
    return queries
