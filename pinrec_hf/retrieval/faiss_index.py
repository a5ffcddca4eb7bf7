"""The approximate search behind `ItemIndex`, by faiss on this machine.

    flat    all vectors, exactly                              4 d bytes an item
    hnsw    a graph over vectors of 8 bits a dimension        d + 290 to 305
    ivf     lists of vectors of 4 bits a dimension            d / 2 + 26
    ivfpq   lists of product-quantised vectors, 2 bits        d / 4 + 26

All but flat search items lifted onto a sphere, and give more than they are asked for, for the caller to score exactly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import faiss
import numpy as np

from pinrec_hf.retrieval.lifting import Sphere
from pinrec_hf.retrieval.passing import Passing
from pinrec_hf.retrieval.vectors import ItemVectors

KINDS = ("flat", "hnsw", "ivf", "ivfpq")
FLAT_LIMIT = 100_000
REFINE = {"flat": 1, "hnsw": 2, "ivf": 5, "ivfpq": 10}  # candidates for each item asked for
SAMPLE = 64  # items a list to train on

# From 1.15 faiss holds queries x dimension against this. Its 128,000 keeps a batch of requests off the matrix product,
# which wins from about four queries on and answers 64, of 100,000 items, in a fifth of the time.
if faiss.cvar.distance_compute_blas_threshold > 512:
    faiss.cvar.distance_compute_blas_threshold = 512


class Neighbours(Protocol):
    """What `ItemIndex` asks of a back end, which knows items by their place: 0, 1, 2 ... in the order of adding.

    Attributes:
        kind: its name in `index.json`. file: what it writes, None if it lies elsewhere.
        setting: how far it searches; more finds more and takes longer. 0: it is exact.
    """

    kind: str
    file: str | None
    setting: int

    def __len__(self) -> int: ...

    def settings(self) -> Sequence[int]:
        """Those worth trying, ascending; none if it is exact."""

    def add(self, vectors: np.ndarray) -> None: ...

    def search(self, queries: np.ndarray, k: int, passing: Passing | None) -> np.ndarray:
        """Places int64 `(m, k or more)` in no certain order, -1 where it found fewer; `passing` None: all may come."""

    def about(self) -> dict[str, Any]:
        """What `index.json` keeps of it."""

    def write(self, path: str) -> None: ...


def choose_kind(size: int, dimension: int, memory_gib: float) -> str:
    """The kind for `size` items: by size, and if that takes more than `memory_gib`, the best that does not.

    A graph is only for who asks for one: it is built in many times the time of lists, takes six to eight times their
    memory and finds little among vectors without structure (docs/item-index.md).

    Raises:
        ValueError: none fits.
    """
    kinds = ("flat", "ivf", "ivfpq") if size <= FLAT_LIMIT else ("ivf", "ivfpq")
    bytes_each = {kind: item_bytes(kind, dimension) for kind in kinds}
    for kind, each in bytes_each.items():
        if size * each <= memory_gib * 2**30:
            return kind
    need = size * bytes_each["ivfpq"] / 2**30
    raise ValueError(f"{size:,} items need {need:.2g} GiB, memory_gib is {memory_gib:g}; raise it, or index on Milvus")


def item_bytes(kind: str, dimension: int) -> int:
    """Memory an item, its row and tombstone included; vectors on disk are not."""
    width = _width(kind, dimension)
    return 17 + {"flat": 4 * width, "hnsw": width + 270, "ivf": -(-width // 2) + 8, "ivfpq": width // 4 + 9}[kind]


def _width(kind: str, dimension: int) -> int:
    """One more for lifting, and up to what the codes' vector instructions take: 16 at a time, pairs."""
    multiple = {"flat": 0, "hnsw": 16, "ivf": 1, "ivfpq": 2}[kind]
    return dimension if multiple == 0 else -(-(dimension + 1) // multiple) * multiple


class FaissIndex:
    """One of `KINDS`. Make one with `build` or `read`."""

    file: str | None = "index.faiss"

    def __init__(
        self, index: Any, *, kind: str, dimension: int, radius: float, outside: Sequence[int], setting: int | None
    ) -> None:
        self._index = index  # its own stubs lack half of what it can do
        self.kind = kind
        self._sphere = Sphere(radius, dimension, index.d)
        self._outside = np.array(outside, np.int64)  # items too long for the sphere, added later: always candidates
        self.setting = setting if setting is not None else self._usual_setting()

    @classmethod
    def build(cls, vectors: ItemVectors, kind: str) -> FaissIndex:
        """Index vectors, a block at a time; lists are trained on a sample.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown index kind {kind!r}; known are {', '.join(map(repr, KINDS))}")
        size, dimension, width = len(vectors), vectors.dimension, _width(kind, vectors.dimension)
        lists = max(1, min(int(size**0.5), size // 39))  # faiss wants 39 items a list to train on
        index: Any
        if kind == "flat":
            index = faiss.IndexFlatIP(dimension)
        elif kind == "hnsw":
            index = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_L2)
            index.hnsw.efConstruction = 200
        else:
            parts = width if kind == "ivf" else width // 2  # of 4 bits each
            index = faiss.index_factory(width, f"IVF{lists},PQ{parts}x4fs", faiss.METRIC_L2)
            index.by_residual = kind == "ivfpq"  # 4 bits suffice without: one table a query, not one a list
            index.cp.max_points_per_centroid = SAMPLE
            # from a random start codes stay so coarse that the candidates lack up to 5 % of the best items
            index.pq.cp.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
            index.pq.cp.max_points_per_centroid = 2_000
        radius = max(float(np.linalg.norm(block, axis=1).max()) for block in vectors.blocks())
        built = cls(index, kind=kind, dimension=dimension, radius=radius, outside=(), setting=None)
        if kind != "flat":
            sample = np.random.default_rng(0).permutation(size)[: max(SAMPLE * lists, 10_000)]
            sample = np.resize(sample, max(len(sample), 16))  # codes of 4 bits want so many, repeated or not
            index.train(built._sphere.items(vectors[np.sort(sample)]))
        for block in vectors.blocks():
            built.add(block)
        return built

    @classmethod
    def read(cls, path: str | os.PathLike[str], about: dict[str, Any]) -> FaissIndex:
        """What `write` wrote, and `about` told of it.

        Raises:
            RuntimeError: no faiss file.
        """
        more = {"outside": about.get("outside", ()), "setting": about.get("setting")}
        known = {name: about[name] for name in ("kind", "dimension", "radius")}
        return cls(faiss.read_index(os.fspath(path)), **known, **more)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def _usual_setting(self) -> int:
        if self.kind == "flat":
            return 0
        return 800 if self.kind == "hnsw" else min(self._index.nlist, max(16, self._index.nlist // 8))

    def settings(self) -> list[int]:
        if self.kind == "flat":
            return []
        # a graph is searched for no fewer candidates than `search` fetches for the 100 that tuning asks for
        first, most = ((400, 600), 12_800) if self.kind == "hnsw" else ((8, 10, 12, 14), self._index.nlist)
        return sorted({most, *(step << i for i in range(14) for step in first if step << i < most)})

    def add(self, vectors: np.ndarray) -> None:
        """Index more vectors `(n, dimension)`."""
        if self.kind == "flat":
            self._index.add(vectors)
            return
        outside = len(self) + np.flatnonzero(self._sphere.outside(vectors))
        self._outside = np.concatenate([self._outside, outside])
        self._index.add(self._sphere.items(vectors))

    def search(self, queries: np.ndarray, k: int, passing: Passing | None) -> np.ndarray:
        """Places int64 `(m, k or more)`; where items are filtered, it searches as much further as fewer pass."""
        options: dict[str, Any] = {} if passing is None else {"sel": faiss.IDSelectorBitmap(passing.bits)}
        if self.kind == "flat":
            return self._index.search(queries, k, params=faiss.SearchParameters(**options))[1]
        fetch = min(REFINE[self.kind] * k, len(self))
        setting = max(2 * fetch, self.setting) if self.kind == "hnsw" else self.setting
        most = len(self) if self.kind == "hnsw" else self._index.nlist
        setting = min(round(setting / (1 if passing is None else passing.share)), most)
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=setting, **options)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=setting, **options)
        found = self._index.search(self._sphere.queries(queries), fetch, params=parameters)[1]
        if len(self._outside) == 0:
            return found
        found[np.isin(found, self._outside)] = -1
        long = self._outside if passing is None else self._outside[passing.mask[self._outside]]
        return np.hstack([found, np.broadcast_to(long, (len(queries), len(long)))])

    def about(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "setting": self.setting,
            "radius": self._sphere.radius,
            "outside": self._outside.tolist(),
        }

    def write(self, path: str) -> None:
        faiss.write_index(self._index, path)
