"""The items that a search may find: those that are live, and of these the ones that a filter lets pass."""

from __future__ import annotations

from functools import cached_property

import numpy as np


class Passing:
    """A mask over the places of an index, and its other forms, each made once and when it is needed.

    Attributes:
        mask: bool `(places,)`. count: how many pass. share: of all places.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.mask, self.count = mask, int(np.count_nonzero(mask))
        self.share = self.count / len(mask)

    @cached_property
    def places(self) -> np.ndarray:
        """int64 `(count,)`, ascending."""
        return np.flatnonzero(self.mask)

    @cached_property
    def bits(self) -> np.ndarray:
        """uint8, a bit a place, the lowest first."""
        return np.packbits(self.mask, bitorder="little")
