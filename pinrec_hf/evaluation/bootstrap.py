"""Intervals by resampling users, differences of two systems, and what difference the data could have shown.

A user's events are not independent of each other, so users are what is drawn with replacement (cluster
bootstrap: Davison and Hinkley 1997, section 3.8). Every figure here is a ratio of sums over users, such as
hits / targets: a resample is then a weighted sum of per-user sums, and one matrix product resamples all
figures at once, from the same draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK_DRAWS = 4_000_000  # draws held at once: 32 MB each of indexes and of weights


def user_weights(num_users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn in each resample, in chunks: float64 of shape (some resamples, users)."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_DRAWS // max(num_users, 1))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(num_users, size=(rows, num_users)) + np.arange(rows)[:, None] * num_users
        yield (np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users).astype(np.float64))


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """numerators / denominators, NaN where nothing was counted."""
    return np.divide(numerators, denominators, out=np.full(np.shape(numerators), np.nan), where=denominators > 0)


@dataclass(frozen=True)
class Interval:
    """A figure, the ends of its interval, and the number of users behind it."""

    value: float
    low: float
    high: float
    users: int


@dataclass(frozen=True)
class Difference:
    """System a minus system b, on the same users: absolute, and relative in percent of b, with intervals.

    `minimum_detectable_effect` is the absolute difference that this data would have shown (80 % power, alpha
    .05); NaN where no resample differed, which tells nothing.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    relative_percent: float
    relative_low: float
    relative_high: float
    standard_error: float
    minimum_detectable_effect: float
    users: int


def intervals(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Percentile bootstrap over users of every ratio of sums.

    Args:
        numerators, denominators: float64 of shape (users, figures): per-user sums; a figure is
            `numerators[:, f].sum() / denominators[:, f].sum()`.
        resamples, seed, level: number of resamples, seed of the draws, and the intervals' coverage.
    """
    estimates = np.concatenate(
        [
            ratio(weights @ numerators, weights @ denominators)
            for weights in user_weights(len(numerators), resamples, seed)
        ]
    )
    value = ratio(numerators.sum(axis=0), denominators.sum(axis=0))
    low, high = quantiles(estimates, *interval_ends(level))
    users = np.count_nonzero(denominators, axis=0)
    figures = zip(value.tolist(), low.tolist(), high.tolist(), users.tolist(), strict=True)
    return [Interval(*figure) for figure in figures]


def paired_differences(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Difference]:
    """Differences of two systems on the same users, paired by user and by training seed.

    Args:
        a, b: (numerators, denominators) of each system, float64 of shape (seeds, users, figures). Seed i of a
            is paired with seed i of b; a system of one seed (popularity has no randomness) is paired with
            every seed of the other.
        resamples, seed, level: as in `intervals`.

    Users are resampled. Training seeds are few, so that drawing them again would say too little of how they vary: to
    each resample's difference a draw of Student's t with `seeds - 1` degrees of freedom is added, at the standard error
    of the seeds' own differences. An interval of two seeds is wide, then, if they disagree.
    """
    seeds, users = max(len(a[0]), len(b[0])), a[0].shape[1]
    if {len(a[0]), len(b[0])} - {1, seeds}:
        raise ValueError(
            f"cannot pair {len(a[0])} seeds with {len(b[0])}: give both systems the same seeds, or one of them just one"
        )
    if users != b[0].shape[1]:
        raise ValueError(f"cannot pair {users} users with {b[0].shape[1]}: evaluate both on the same requests")
    # a's and b's numerators and denominators, summed over seeds: (4, users, figures), resampled by the same draws
    sums = np.stack([np.broadcast_to(part, (seeds, *part.shape[1:])).sum(axis=0) for part in (*a, *b)])
    flat = np.moveaxis(sums, 1, 0).reshape(users, -1)
    drawn = np.concatenate([weights @ flat for weights in user_weights(users, resamples, seed)])
    top_a, bottom_a, top_b, bottom_b = np.moveaxis(drawn.reshape(resamples, 4, -1), 1, 0)
    estimate_a, estimate_b = ratio(top_a, bottom_a), ratio(top_b, bottom_b)
    value_a, value_b = (ratio(*(part.sum(axis=(0, 1)) for part in system)) for system in (a, b))

    each_a, each_b = (ratio(*(part.sum(axis=1) for part in system)) for system in (a, b))  # (seeds or 1, figures)
    error_of_seeds, relative_error_of_seeds = (
        _standard_error(each) for each in (each_a - each_b, 100 * (ratio(each_a, each_b) - 1))
    )
    t = np.random.default_rng([seed, 1]).standard_t(max(seeds - 1, 1), size=(resamples, 1))
    change = estimate_a - estimate_b
    relative = 100 * (ratio(estimate_a, estimate_b) - 1) + t * relative_error_of_seeds
    some = ~np.isnan(change)
    centred = np.where(some, change - np.sum(change, axis=0, where=some) / np.maximum(some.sum(axis=0), 1), 0)
    variance = np.square(centred).sum(axis=0) / np.maximum(some.sum(axis=0) - 1, 1)
    error = np.sqrt(variance + np.square(error_of_seeds))
    deviation = np.where(some, centred + t * error_of_seeds, np.nan)
    columns = [
        value_a,
        value_b,
        value_a - value_b,
        *quantiles(change + t * error_of_seeds, *interval_ends(level)),
        100 * (ratio(value_a, value_b) - 1),
        *quantiles(relative, *interval_ends(level)),
        error,
        np.where(error > 0, minimum_detectable_effect(deviation), np.nan),
        np.count_nonzero(sums[1] + sums[3], axis=0),
    ]
    return [Difference(*figure) for figure in zip(*(column.tolist() for column in columns), strict=True)]


def _standard_error(each: np.ndarray) -> np.ndarray:
    """Of the mean of `(seeds, figures)` over seeds: `(figures,)`, 0 for one seed or where nothing was counted."""
    if len(each) == 1:
        return np.zeros(each.shape[1])
    return np.nan_to_num(each.std(axis=0, ddof=1) / np.sqrt(len(each)))


def minimum_detectable_effect(deviations: np.ndarray, *, power: float = 0.8, alpha: float = 0.05) -> np.ndarray:
    """The smallest true difference that a two-sided test at `alpha` finds with probability `power`.

    Where chance alone moves an estimate by normal deviations, 2.80 standard errors for .05 and .8 (Bloom, Evaluation
    Review 1995); here by those that were drawn, which are more where few seeds disagree. Of two or three seeds it is a
    rough guide: their own spread, which it takes for the truth, may be a fifth or twice of it.

    Args:
        deviations: float64 `(draws, figures)` of estimates from the truth, NaN where nothing was counted.

    Returns:
        float64 `(figures,)`
    """
    low, high, lift = quantiles(deviations, *interval_ends(1 - alpha), power)
    return (high - low) / 2 + lift


def interval_ends(level: float) -> tuple[float, float]:
    """The quantiles between which a share `level` lies.

    >>> interval_ends(0.5)
    (0.25, 0.75)
    """
    return (1 - level) / 2, (1 + level) / 2


def quantiles(estimates: np.ndarray, *at: float) -> np.ndarray:
    """float64 `(len(at), figures)`: these quantiles of each column, NaN where no resample counted anything."""
    found = np.full((len(at), estimates.shape[1]), np.nan)
    some = ~np.isnan(estimates).all(axis=0)
    if some.any():
        found[:, some] = np.nanquantile(estimates[:, some], at, axis=0)
    return found
