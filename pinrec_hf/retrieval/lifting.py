"""Largest inner product as nearest neighbour.

Graphs and lists search inner products badly when the norms of items differ, as they do under a dot product with item
bias. One more dimension lifts the items onto a sphere, where the nearest neighbours of a query are exactly its largest
inner products (Bachrach et al. 2014, "Speeding up the Xbox recommender system").
"""

from __future__ import annotations

import numpy as np


class Sphere:
    """Lifts vectors of `dimension` to `width` > `dimension`; what is left over is 0.

    Args:
        radius: the largest norm of the items. An item that is longer cannot be lifted: it is found `outside`.
    """

    def __init__(self, radius: float, dimension: int, width: int) -> None:
        self.radius, self.dimension, self.width = radius, dimension, width

    def items(self, vectors: np.ndarray) -> np.ndarray:
        """float32 `(n, width)` of `(n, dimension)`."""
        lifted = np.zeros((len(vectors), self.width), np.float32)
        lifted[:, : self.dimension] = vectors
        lifted[:, self.dimension] = np.sqrt(np.maximum(self.radius**2 - _squares(vectors), 0))
        return lifted

    def queries(self, vectors: np.ndarray) -> np.ndarray:
        """float32 `(m, width)`. A query's length changes no order; as long as the radius it meets lists best."""
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        lifted = np.zeros((len(vectors), self.width), np.float32)
        lifted[:, : self.dimension] = vectors * (self.radius / np.where(lengths == 0, 1, lengths))
        return lifted

    def outside(self, vectors: np.ndarray) -> np.ndarray:
        """bool `(n,)`: longer than the radius, beyond rounding."""
        return np.sqrt(_squares(vectors)) > self.radius * (1 + 1e-6)


def _squares(vectors: np.ndarray) -> np.ndarray:
    return np.square(vectors, dtype=np.float64).sum(axis=1)
