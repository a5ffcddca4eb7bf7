"""Intervals cover, pairing narrows, and the detectable effect is detected as often as it says."""

import numpy as np
import pytest

from pinrec_hf.evaluation.bootstrap import intervals, paired_differences


def clustered(rng, users, rate=0.3):
    """Hits and targets of users who differ in taste and in number of targets."""
    targets = rng.integers(1, 9, size=users)
    taste = rng.beta(2, 2 * (1 - rate) / rate, size=users)
    return rng.binomial(targets, taste).astype(float)[:, None], targets.astype(float)[:, None]


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        (figure,) = intervals(*clustered(rng, 150), resamples=200, seed=seed)
        covered.append(figure.low <= 0.3 <= figure.high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_users_are_resampled_not_targets():
    hits = np.repeat([[0.0], [1.0]], 50, axis=0)
    (single,) = intervals(hits, np.ones((100, 1)), resamples=500)
    (many,) = intervals(hits * 10, np.full((100, 1), 10.0), resamples=500)
    assert (many.low, many.high) == (single.low, single.high)  # ten equal events tell no more than one
    assert many.users == 100


def test_same_seed_same_interval():
    hits, targets = clustered(np.random.default_rng(0), 80)
    assert intervals(hits, targets, seed=4) == intervals(hits, targets, seed=4)
    assert intervals(hits, targets, seed=4) != intervals(hits, targets, seed=5)


def test_a_figure_without_counts_is_nan():
    (figure,) = intervals(np.zeros((5, 1)), np.zeros((5, 1)))
    assert np.isnan([figure.value, figure.low, figure.high]).all()
    assert figure.users == 0


def test_pairing_narrows_and_relative_is_percent_of_b():
    rng = np.random.default_rng(2)
    hits, targets = clustered(rng, 400)
    better = np.minimum(hits + (rng.random(hits.shape) < 0.15), targets)
    (paired,) = paired_differences((better[None], targets[None]), (hits[None], targets[None]))
    shuffled = rng.permutation(400)
    (unpaired,) = paired_differences((better[None], targets[None]), (hits[None, shuffled], targets[None, shuffled]))
    assert paired.low > 0
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert paired.difference == pytest.approx((better.sum() - hits.sum()) / targets.sum())
    assert paired.relative_percent == pytest.approx(100 * (better.sum() / hits.sum() - 1))
    assert paired.relative_low < paired.relative_percent < paired.relative_high


def test_seeds_that_disagree_widen_the_interval():
    hits, targets = clustered(np.random.default_rng(2), 300)
    up, down = np.minimum(hits + 1, targets), np.maximum(hits - 1, 0)
    baseline = (hits[None], targets[None])
    agree = paired_differences((np.stack([hits] * 3), np.stack([targets] * 3)), baseline)[0]
    differ = paired_differences((np.stack([up, hits, down]), np.stack([targets] * 3)), baseline)[0]
    assert agree.low == agree.high == 0
    assert np.isnan(agree.minimum_detectable_effect)
    assert differ.low < -0.03
    assert differ.high > 0.03


def test_what_cannot_be_paired_is_refused():
    one, two, three = (np.ones((n, 5, 1)) for n in (1, 2, 3))
    with pytest.raises(ValueError, match="cannot pair 2 seeds with 3"):
        paired_differences((two, two), (three, three))
    with pytest.raises(ValueError, match="cannot pair 5 users with 4"):
        paired_differences((one, one), (one[:, :4], one[:, :4]))


def test_the_detectable_effect_is_found_in_80_percent_of_experiments():
    rng = np.random.default_rng(5)
    ones = np.ones((1, 250, 1))
    noise = rng.normal(size=(200, 1, 250, 1))
    first = paired_differences((5 + noise[0], ones), (5 * ones, ones), resamples=4000)[0]
    effect = first.minimum_detectable_effect
    assert effect == pytest.approx(2.8016 * first.standard_error, rel=0.05)
    found = [
        paired_differences((5 + effect + sample, ones), (5 * ones, ones), resamples=200)[0].low > 0 for sample in noise
    ]
    assert 0.7 <= np.mean(found) <= 0.9


def test_few_seeds_cover_the_truth():
    """Two systems of equal quality that training seeds move far more than users do."""
    rng = np.random.default_rng(6)
    ones = np.ones((3, 200, 1))
    covered = []
    for seed in range(200):
        moved = 5 + rng.normal(size=(3, 1, 1)) + rng.normal(scale=0.1, size=(3, 200, 1))
        (found,) = paired_differences((moved, ones), (5 * ones, ones), resamples=400, seed=seed)
        covered.append(found.low <= 0 <= found.high)
        assert found.minimum_detectable_effect > (found.high - found.low) / 2
    assert 0.9 <= np.mean(covered) <= 0.99
