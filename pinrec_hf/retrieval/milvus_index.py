"""The approximate search behind `ItemIndex`, by Milvus (extra `milvus`): a cluster, or a file for milvus-lite.

The collection holds lifted vectors by their place. Rows, tombstones and the vectors to score exactly lie in the index's
folder as ever, so the collection is only ever added to: a run that dies before `save` leaves places that no folder
knows, and the next run writes them anew.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from pinrec_hf.retrieval.lifting import Sphere
from pinrec_hf.retrieval.passing import Passing
from pinrec_hf.retrieval.vectors import ItemVectors

AT_ONCE = 5_000  # items a message
MOST = 16_384  # results of a search, Milvus's own limit
USUAL_EF = 800


class MilvusIndex:
    """A graph (HNSW) on Milvus. Make one with `build` or `open`; a cluster's token is read from `MILVUS_TOKEN`.

    Attributes:
        uri, collection: where it lies. `build` makes a collection of its own and never drops an older one.
    """

    kind = "milvus"
    file: str | None = None

    def __init__(
        self,
        uri: str,
        collection: str,
        size: int,
        *,
        dimension: int,
        radius: float,
        outside: Sequence[int],
        setting: int,
    ) -> None:
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError as error:
            problem = 'an index on Milvus needs pymilvus: install it with `pip install ".[milvus]"` in the clone'
            raise ModuleNotFoundError(problem, name="pymilvus") from error
        self.uri, self.collection, self.setting = uri, collection, setting
        self._client = MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""))
        self._sphere, self._size = Sphere(radius, dimension, dimension + 1), size
        self._outside = np.array(outside, np.int64)  # items too long for the sphere, added later: always candidates

    @classmethod
    def build(cls, vectors: ItemVectors, uri: str) -> MilvusIndex:
        """Put vectors into a new collection of the Milvus at `uri`."""
        radius = max(float(np.linalg.norm(block, axis=1).max()) for block in vectors.blocks())
        more = {"dimension": vectors.dimension, "radius": radius, "outside": (), "setting": USUAL_EF}
        built = cls(uri, f"pinrec_{uuid.uuid4().hex}", 0, **more)
        built._create()
        for block in vectors.blocks():
            built.add(block)
        built._client.flush(built.collection)
        return built

    @classmethod
    def open(cls, about: dict[str, Any]) -> MilvusIndex:
        """The collection that an `index.json` tells of.

        Raises:
            ValueError: Milvus does not have it; or it is a server that this machine was not told to trust.
        """
        # a folder may come from anybody, and whom it names would be sent the token and every query
        is_file = about["uri"].endswith(".db") and ":" not in about["uri"]
        if not is_file and about["uri"] != os.environ.get("MILVUS_URI"):
            raise ValueError(
                f"this index lies on the Milvus at {about['uri']}: set MILVUS_URI to that address if you trust it, or "
                "index again"
            )
        names = ("uri", "collection", "dimension", "radius", "outside", "setting")
        opened = cls(size=about["num_vectors"], **{name: about[name] for name in names})
        if not opened._client.has_collection(opened.collection):
            raise ValueError(f"the Milvus at {opened.uri} has no collection {opened.collection}; index again")
        opened._client.load_collection(opened.collection)
        return opened

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False)
        schema.add_field("place", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._sphere.width)
        graph = self._client.prepare_index_params()
        graph.add_index("vector", index_type="HNSW", metric_type="L2", params={"M": 32, "efConstruction": 200})
        self._client.create_collection(self.collection, schema=schema, index_params=graph, consistency_level="Strong")

    def __len__(self) -> int:
        return self._size

    def settings(self) -> list[int]:
        """Widths of the graph's search worth trying, ascending."""
        return [100, 200, 400, USUAL_EF, 1_600, 3_200, 6_400]

    def add(self, vectors: np.ndarray) -> None:
        """Put more vectors `(n, dimension)` at the next places."""
        self._outside = np.concatenate([self._outside, self._size + np.flatnonzero(self._sphere.outside(vectors))])
        lifted = self._sphere.items(vectors)
        for start in range(0, len(lifted), AT_ONCE):
            some = lifted[start : start + AT_ONCE]
            first = self._size + start
            entities = [{"place": first + i, "vector": vector} for i, vector in enumerate(some)]
            self._client.upsert(self.collection, entities)
        self._size += len(vectors)

    def search(self, queries: np.ndarray, k: int, passing: Passing | None) -> np.ndarray:
        """Places int64 `(m, k or more)`; where fewer items pass it fetches more, up to Milvus's limit."""
        fetch = min(MOST, self._size, round(1.5 * k / (1 if passing is None else passing.share)))
        answers = self._client.search(
            self.collection,
            self._sphere.queries(queries),
            anns_field="vector",
            limit=fetch,
            search_params={"metric_type": "L2", "params": {"ef": max(self.setting, fetch)}},
            output_fields=["place"],
        )
        found = np.full((len(queries), fetch), -1, np.int64)
        for row, hits in zip(found, answers, strict=True):
            row[: len(hits)] = [hit["place"] for hit in hits]
        found[(found >= self._size) | np.isin(found, self._outside)] = -1
        found = np.hstack([found, np.broadcast_to(self._outside, (len(queries), len(self._outside)))])
        return found if passing is None else np.where((found >= 0) & passing.mask[found], found, -1)

    def about(self) -> dict[str, Any]:
        """What `index.json` keeps of it; never a token."""
        return {
            "kind": self.kind,
            "uri": self.uri,
            "collection": self.collection,
            "setting": self.setting,
            "radius": self._sphere.radius,
            "outside": self._outside.tolist(),
        }

    def write(self, path: str) -> None:
        """Nothing: it lies on Milvus."""
