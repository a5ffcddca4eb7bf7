"""Marks on the map of interests do not hide each other."""

import numpy as np
import pytest

from pinrec_hf.retrieval.trace import spread


@pytest.mark.parametrize("count", [1, 2, 8])
def test_points_on_one_place_are_pushed_apart_around_it(count):
    moved = spread(np.full((count, 2), 5.0), 3.0)
    gaps = np.linalg.norm(moved[:, None] - moved, axis=-1) + 99 * np.eye(count)
    assert gaps.min() >= 0.99 * 3 or count == 1
    np.testing.assert_allclose(moved.mean(0), 5, atol=0.01)


def test_points_that_are_far_apart_stay():
    points = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    np.testing.assert_allclose(spread(points, 3.0), points, atol=0.01)
