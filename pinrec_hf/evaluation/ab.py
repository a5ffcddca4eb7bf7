"""A simulated online test of two retrievers: saves, clicks and hides a request, and whether the difference is real.

Two designs. `paired`: every user lives the test days twice, once under each retriever, and what counts are the true
probabilities of what was shown; chance is left in who the users are and in what earlier answers left behind. A
simulator can do that, no live system can; users do not meet, so the difference estimated is the same, with far less
noise. `split`: what a live test sees. Half of the users at random get A, the others B, and answers are counted as
chance had them. Intervals resample users in both, since a user's requests are not independent.

Whether a design's intervals can be trusted is measured beside it by A/A tests: how often they tell a difference where
there is none. For `split`, the users of B against each other in random halves; for `paired`, A against B with the two
answers of random users exchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.data.dataset_folder import build_catalogue
from pinrec_hf.data.output import new_directory
from pinrec_hf.data.simulator.parameters import OUTCOMES, SURFACES
from pinrec_hf.evaluation.bootstrap import Difference, interval_ends, paired_differences, quantiles, ratio, user_weights
from pinrec_hf.evaluation.evaluate import Ranker
from pinrec_hf.evaluation.online_walk import Answers, OnlineWorld
from pinrec_hf.evaluation.report import Table, difference_row, without_nan
from pinrec_hf.evaluation.response_model import ResponseModel

DESIGNS = ("paired", "split")
ALL = "all"
GROUPS = (ALL, *SURFACES)
SPLITS_AT_ONCE = 250
Sums = tuple[np.ndarray, np.ndarray]  # numerators and denominators, float64 (users, figures)


@dataclass(frozen=True)
class OnlineTest:
    """Two retrievers on the test days of a simulated world.

    Attributes:
        a, b: their names. design: of `DESIGNS`. k: candidates a request. seed: of everything drawn here.
        figures: {"all" or surface: {"save" | "click" | "hide": answers a request, A minus B}}.
        totals: {"a" | "b": {requests, impressions, users, drawn: {outcome: n}, expected: {outcome: n}}}, of all users.
        false_positives: {figure: share of A/A tests with an interval that excludes 0}. splits: number of A/A tests.
        ranker_auc: per outcome, of the response model on the validation days.
    """

    a: str
    b: str
    design: str
    k: int
    seed: int
    figures: dict[str, dict[str, Difference]]
    totals: dict[str, dict[str, Any]]
    false_positives: dict[str, dict[str, float]]
    splits: int
    ranker_auc: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; NaN where nothing was counted is null."""
        content: dict[str, Any] = without_nan(asdict(self))
        return content

    def table(self) -> Table:
        """A row a surface and outcome."""
        rows = [
            [group, *difference_row(outcome, d), f"{self.false_positives[group][outcome]:.1%}"]
            for group, outcomes in self.figures.items()
            for outcome, d in outcomes.items()
        ]
        header = ["surface", "outcome", "A", "B", "difference", "relative", "could have shown", "users", "A/A"]
        return Table(f"A = {self.a}, B = {self.b}: answers a request", header, rows)

    def summary(self) -> str:
        """What the table's figures are, in sentences."""
        told = {
            "paired": "Paired: every user lived the test days under both; answers in expectation.",
            "split": "Split: half of the users got A, the others B; answers as chance had them.",
        }[self.design]
        counts = "; ".join(
            f"{side.upper()}: {t['requests']:,} requests of {t['users']:,} users, {t['impressions']:,} impressions"
            for side, t in self.totals.items()
        )
        auc = ", ".join(f"{name} {value:.3f}" for name, value in self.ranker_auc.items())
        return (
            f"{told} {counts}. {self.k} candidates a request, ordered by one ranker that knows the log only (AUC on "
            f"validation: {auc}). Brackets: 95 % intervals over users. A/A: share of {self.splits:,} tests without a "
            "difference whose interval excludes 0; about 5 % where the intervals can be trusted."
        )


def run_online_test(
    world: str | Path,
    data: str | Path,
    a: Ranker,
    b: Ranker,
    *,
    names: tuple[str, str] = ("A", "B"),
    k: int = 50,
    design: str = "paired",
    splits: int = 2_000,
    resamples: int = 1_000,
    seed: int = 0,
    progress: bool = True,
) -> OnlineTest:
    """Fit the response model on the log, let the users live the test days under both retrievers, and compare.

    Args:
        world: a folder that `pinrec simulate` wrote. data: what `pinrec prepare` made of it.
        a, b: retrievers whose rows are the dataset's catalogue rows (its `items.parquet`). names: theirs.
        k: candidates a request, from which the response model fills a view of 5 to 8.
        design: "paired" or "split", see above. splits: number of A/A tests.
        resamples, seed: of the bootstrap; of split, bootstrap and response model. The world has its own.

    Raises:
        ValueError: an argument out of range, or a world and data that do not belong together (`OnlineWorld`).
    """
    catalogue = build_catalogue(data)
    if design not in DESIGNS:
        raise ValueError(f"design is {design!r}; choose one of {DESIGNS}")
    if splits < 1 or resamples < 1:
        raise ValueError(f"splits is {splits} and resamples {resamples}; give at least 1")
    if not 1 <= k <= len(catalogue):
        raise ValueError(f"k is {k}; give 1 to {len(catalogue)} candidates, the items that there are")
    online = OnlineWorld(world, data, catalogue)
    responses = ResponseModel.fit(data, catalogue, seed=seed)
    answers = online.walk([a, b], responses, k, progress=progress)
    return compare_answers(
        *answers,
        names=names,
        k=k,
        design=design,
        splits=splits,
        resamples=resamples,
        seed=seed,
        ranker_auc=responses.validation_auc,
    )


def compare_answers(
    a: Answers,
    b: Answers,
    *,
    names: tuple[str, str],
    k: int,
    design: str,
    splits: int,
    resamples: int,
    seed: int,
    ranker_auc: dict[str, float],
) -> OnlineTest:
    """The statistics of `run_online_test`, for what `OnlineWorld.walk` found."""
    users = np.unique(np.concatenate([a.user, b.user]))
    sums_a, sums_b = (user_sums(part, users, expected=design == "paired") for part in (a, b))
    if design == "split":
        false_positives = false_positive_rates(sums_b, None, splits=splits, resamples=resamples, seed=seed)
        gets_a = _halves(len(users), 1, [seed, 2])
        sums_a = sums_a[0] * gets_a, sums_a[1] * gets_a
        sums_b = sums_b[0] * ~gets_a, sums_b[1] * ~gets_a
    else:
        false_positives = false_positive_rates(sums_a, sums_b, splits=splits, resamples=resamples, seed=seed)
    differences = paired_differences(
        (sums_a[0][None], sums_a[1][None]), (sums_b[0][None], sums_b[1][None]), resamples=resamples, seed=seed
    )
    return OnlineTest(
        a=names[0],
        b=names[1],
        design=design,
        k=k,
        seed=seed,
        figures=_by_group(differences),
        totals={"a": _totals(a), "b": _totals(b)},
        false_positives=_by_group(false_positives.tolist()),
        splits=splits,
        ranker_auc=ranker_auc,
    )


def user_sums(answers: Answers, users: np.ndarray, *, expected: bool) -> Sums:
    """Answers and requests per user and figure: a figure is an outcome in a group, group by group (`GROUPS`)."""
    user = np.searchsorted(users, answers.user)
    counted = answers.expected if expected else answers.drawn
    tops, bottoms = [], []
    for group in GROUPS:
        inside = np.ones(len(answers), bool) if group == ALL else answers.surface == SURFACES.index(group)
        requests = np.bincount(user[inside], minlength=len(users)).astype(np.float64)
        for outcome in range(len(OUTCOMES)):
            tops.append(np.bincount(user[inside], counted[inside, outcome], minlength=len(users)))
            bottoms.append(requests)
    return np.stack(tops, axis=1), np.stack(bottoms, axis=1)


def false_positive_rates(
    a: Sums, b: Sums | None, *, splits: int = 2_000, resamples: int = 1_000, seed: int = 0, level: float = 0.95
) -> np.ndarray:
    """How often tests without a difference tell one: float64 (figures,), the share of intervals that exclude 0.

    By the same percentile bootstrap over users as the figures'. In a resample, a test's difference is one of weighted
    sums over users, so a matrix product does all resamples of a whole batch of tests.

    Args:
        a, b: sums of each user under both retrievers, exchanged for random users; or b None, and the users of `a` in
            random halves against each other.
        splits: number of tests. resamples, seed, level: of the bootstrap.
    """
    tops, bottoms = ((x, np.zeros_like(x) if b is None else y) for x, y in zip(a, b or a, strict=True))
    weights = np.concatenate(list(user_weights(len(a[0]), resamples, seed)))
    wrong = np.zeros(a[0].shape[1])
    for start in range(0, splits, SPLITS_AT_ONCE):
        number = min(SPLITS_AT_ONCE, splits - start)
        mine = (_halves if b is None else _coins)(len(a[0]), number, [seed, 3, start]).astype(np.float64)
        for figure in range(a[0].shape[1]):
            first, second = [], []
            for x, y in (tops, bottoms):
                one, two = x[:, figure, None], y[:, figure, None]
                first.append(weights @ (mine * (one - two)) + weights @ two)
                second.append(weights @ (one + two) - first[-1])
            change = ratio(*first) - ratio(*second)
            low, high = quantiles(change, *interval_ends(level))
            wrong[figure] += np.count_nonzero((low > 0) | (high < 0))
    return wrong / splits


def _halves(users: int, number: int, seed: Any) -> np.ndarray:
    """bool (users, number): each column a random half of the users."""
    place: np.ndarray = np.random.default_rng(seed).random((users, number)).argsort(axis=0).argsort(axis=0)
    return place < users // 2


def _coins(users: int, number: int, seed: Any) -> np.ndarray:
    """bool (users, number): heads or tails for each user."""
    return np.random.default_rng(seed).random((users, number)) < 0.5


def write_online_test(output_dir: str | os.PathLike[str], test: OnlineTest) -> Path:
    """Write `online_test.json` and `online_test.md` into a new directory.

    Raises:
        FileExistsError: `output_dir` exists.
    """
    with new_directory(output_dir) as folder:
        text = json.dumps(test.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "online_test.json").write_text(text + "\n", encoding="utf-8")
        markdown = f"# Simulated online test\n\n{test.summary()}\n\n{test.table().markdown()}"
        (folder / "online_test.md").write_text(markdown, encoding="utf-8")
    return Path(output_dir)


def _by_group(figures: Sequence[Any]) -> dict[str, dict[str, Any]]:
    each = iter(figures)
    return {group: {outcome: next(each) for outcome in OUTCOMES} for group in GROUPS}


def _totals(answers: Answers) -> dict[str, Any]:
    return {
        "requests": len(answers),
        "users": len(np.unique(answers.user)),
        "impressions": int(answers.impressions.sum()),
        "drawn": dict(zip(OUTCOMES, answers.drawn.sum(axis=0).tolist(), strict=True)),
        "expected": dict(zip(OUTCOMES, answers.expected.sum(axis=0).tolist(), strict=True)),
    }
