"""The online test: it counts what happened, tells a better retriever, and tells nothing where there is nothing."""

import json

import numpy as np
import pytest

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.simulator import simulate
from pinrec_hf.data.simulator.parameters import OUTCOMES, SURFACES
from pinrec_hf.evaluation.ab import (
    DESIGNS,
    compare_answers,
    false_positive_rates,
    run_online_test,
    user_sums,
    write_online_test,
)
from pinrec_hf.evaluation.online_walk import Answers, OnlineWorld
from pinrec_hf.evaluation.popularity import DecayedPopularity

K = 15
OPTIONS = {"names": ("a", "b"), "k": 50, "splits": 40, "resamples": 200, "seed": 0, "ranker_auc": {"save": 0.7}}


class AtRandom:
    """The same random candidates for every request."""

    def __init__(self, catalogue, seed=0):
        self.order = np.random.default_rng(seed).permutation(len(catalogue))

    def rank(self, requests, k):
        return np.tile(self.order[:k], (len(requests), 1))


@pytest.fixture(scope="module")
def rankers(world_data, world_catalogue):
    return DecayedPopularity.fit(world_data[1], world_catalogue), AtRandom(world_catalogue)


@pytest.fixture(scope="module")
def days(world_data, world_catalogue, responses, rankers):
    """The answers to popularity and to chance."""
    return OnlineWorld(*world_data, world_catalogue).walk(rankers, responses, K, progress=False)


def answers(user, surface, drawn, expected=None):
    drawn = np.asarray(drawn)
    return Answers(
        user=np.asarray(user),
        surface=np.asarray(surface),
        impressions=np.full(len(drawn), 6),
        drawn=drawn,
        expected=drawn.astype(float) if expected is None else np.asarray(expected, float),
    )


def some_answers(users=60, seed=0, saves=1.0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 5, users))
    generous = np.exp(0.5 * rng.standard_normal(users))[user]
    rate = np.stack([saves * generous, generous, 0.3 * generous], axis=1)
    return answers(user, rng.integers(0, 3, len(user)), rng.poisson(rate), rate)


def test_sums_are_counted_by_user_surface_and_outcome():
    part = answers([7, 3, 7], [0, 1, 0], [[1, 2, 0], [0, 1, 1], [2, 0, 0]], [[0.5, 1, 0], [0.1, 1, 1], [1.5, 0, 0]])
    tops, bottoms = user_sums(part, np.array([3, 7]), expected=False)
    assert tops.reshape(2, 4, 3)[:, 0].tolist() == [[0, 1, 1], [3, 2, 0]]  # all surfaces
    assert tops.reshape(2, 4, 3)[1].tolist() == [[3, 2, 0], [3, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert bottoms.reshape(2, 4, 3)[:, :, 0].tolist() == [[1, 0, 1, 0], [2, 2, 0, 0]]
    assert user_sums(part, np.array([3, 7]), expected=True)[0][1, 0] == 2.0


def test_paired_compares_expected_answers_of_the_same_users():
    a, b = some_answers(saves=1.2), some_answers()
    test = compare_answers(a, b, design="paired", **OPTIONS)
    figure = test.figures["all"]["save"]
    assert figure.a == pytest.approx(a.expected[:, 0].mean())
    assert figure.relative_percent == pytest.approx(20)
    assert figure.relative_low == pytest.approx(20)  # everybody saves a fifth more
    assert test.figures["search"]["click"].difference == pytest.approx(0)
    assert list(test.figures) == ["all", *SURFACES]
    assert test.totals["a"]["requests"] == len(a)
    assert test.totals["b"]["drawn"]["hide"] == b.drawn[:, 2].sum()


def test_split_compares_drawn_answers_of_different_users():
    a, b = some_answers(), some_answers()
    ones = np.ones_like(a.drawn)

    def split(drawn_a, drawn_b, seed=0):
        sides = (answers(part.user, part.surface, drawn) for part, drawn in ((a, drawn_a), (b, drawn_b)))
        return compare_answers(*sides, design="split", **{**OPTIONS, "seed": seed}).figures["all"]["save"]

    figure = split(ones, 0 * ones)
    assert (figure.a, figure.b, figure.low, figure.high) == (1, 0, 1, 1)
    assert split(a.drawn, b.drawn).difference != split(a.drawn, b.drawn, seed=1).difference  # another split
    number = a.user[:, None] * np.ones((1, 3), int)  # each answer tells its user
    assert split(number, number).difference != 0


def test_a_retriever_against_itself(days):
    test = compare_answers(days[0], days[0], design="paired", **OPTIONS)
    for group in test.figures.values():
        for figure in group.values():
            assert (figure.difference, figure.low, figure.high) == (0, 0, 0)


def test_popularity_beats_chance_and_the_report_says_so(days, world_data, rankers, responses, tmp_path):
    options = {**OPTIONS, "names": ("popular", "random"), "k": K, "ranker_auc": responses.validation_auc}
    split = compare_answers(*days, design="split", **options)
    test = compare_answers(*days, design="paired", **options)
    figure = test.figures["all"]["click"]
    assert figure.low > 0
    assert split.figures["all"]["click"].standard_error > 2 * figure.standard_error  # what pairing is for
    assert split.totals == test.totals  # the same days
    del options["ranker_auc"]
    assert run_online_test(*world_data, *rankers, progress=False, **options).to_dict() == test.to_dict()

    folder = write_online_test(tmp_path / "ab", test)
    content = json.loads((folder / "online_test.json").read_text())
    assert content["figures"]["all"]["click"]["difference"] == figure.difference
    assert content["design"] == "paired"
    text = (folder / "online_test.md").read_text()
    assert "A = popular, B = random" in text
    assert text.count("\n|") == 2 + len(OUTCOMES) * (1 + len(SURFACES))
    with pytest.raises(FileExistsError, match="exists"):
        write_online_test(tmp_path / "ab", test)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"design": "both"}, "choose one of"),
        ({"k": 0}, "give 1 to 352"),
        ({"k": 353}, "give 1 to 352"),
        ({"splits": 0}, "splits is 0"),
    ],
)
def test_refuses(world_data, world_catalogue, option, message):
    ranker = AtRandom(world_catalogue)
    with pytest.raises(ValueError, match=message):
        run_online_test(*world_data, ranker, ranker, **option)


def test_refuses_a_ranker_of_another_catalogue(world_data, world_catalogue):
    with pytest.raises(ValueError, match=r"AtRandom\.rank gave row"):
        run_online_test(*world_data, AtRandom(range(1_000)), AtRandom(world_catalogue), progress=False)


# -- A/A -------------------------------------------------------------------------------------------------------------


def null_sums(users, seed=0):
    """Per-user sums of two retrievers with different answers and no difference: what each design's test is of."""
    a, b = some_answers(users, seed), some_answers(users, seed)
    other = np.random.default_rng(seed + 1).poisson(b.expected)
    b = answers(b.user, b.surface, other)
    return tuple(user_sums(part, np.arange(users), expected=False) for part in (a, b))


@pytest.mark.parametrize("design", DESIGNS)
def test_one_test_in_twenty_is_a_false_positive(design):
    a, b = null_sums(300)
    rates = false_positive_rates(a, b if design == "paired" else None, splits=250, resamples=400)
    assert rates.shape == (12,)
    assert 0.02 <= rates.mean() <= 0.09
    wide = false_positive_rates(a, b if design == "paired" else None, splits=250, resamples=400, level=0.8)
    assert 0.14 <= wide.mean() <= 0.26  # the share follows the level: it is measured


def test_users_not_requests_are_what_is_uncertain():
    """Users who answer alike at all their requests: intervals that forgot it would be far too narrow."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 8)
    drawn = np.repeat(rng.poisson(1, (200, 3)), 8, axis=0)
    sums = user_sums(answers(user, user % 3, drawn), np.arange(200), expected=False)
    assert false_positive_rates(sums, None, splits=200, resamples=400)[0] <= 0.1
    naive = user_sums(answers(np.arange(1600), user % 3, drawn), np.arange(1600), expected=False)
    spread = [np.sqrt(part[0][:, 0].var() / len(part[0])) / part[1][:, 0].mean() for part in (sums, naive)]
    assert spread[0] > 2 * spread[1]


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_false_positives_of_2000_splits(tmp_path, design):
    """On the answers of a simulated world: 3.5 to 6.5 % on each figure with enough answers to test by."""
    simulate(tmp_path / "world", size=100_000)
    paths = {name: str(tmp_path / "world" / f"{name}.parquet") for name in ("items", "queries")}
    prepare(str(tmp_path / "world" / "log"), **paths, negative_outcomes=["hide"], output_dir=tmp_path / "data")
    catalogue = build_catalogue(tmp_path / "data")
    rankers = DecayedPopularity.fit(tmp_path / "data", catalogue), AtRandom(catalogue)
    test = run_online_test(tmp_path / "world", tmp_path / "data", *rankers, design=design, progress=False)
    assert test.splits == 2_000
    for outcome in ("save", "click"):
        assert 0.035 <= test.false_positives["all"][outcome] <= 0.065
