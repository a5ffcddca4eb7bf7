"""An evaluation's figures against counting by hand; comparisons pair what belongs together."""

import numpy as np
import pytest

from pinrec_hf.evaluation.evaluate import compare, evaluate, popularity_quartiles
from pinrec_hf.evaluation.protocol import load_requests


class Fixed:
    """Ranks by a score a request and item, drawn from the seed and the request's user and time."""

    def __init__(self, seed=0, boost=None):
        self.seed, self.boost = seed, boost or {}

    def rank(self, requests, k):
        lists = []
        for request in requests:
            key = [self.seed, int(request["user_id"][1:]), request["timestamp"]]
            scores = np.random.default_rng(key).random(20)
            scores[list(self.boost)] += list(self.boost.values())
            lists.append(np.argsort(-scores)[:k])
        return np.array(lists)


class Several(Fixed):
    """Also with two embeddings a request."""

    def rank_each(self, requests, k):
        other = Fixed(self.seed + 1, self.boost)
        return np.stack([self.rank(requests, k), other.rank(requests, k)], axis=1)


@pytest.fixture
def requests(write_dataset, random_users, catalogue):
    return load_requests(write_dataset(random_users), "test", catalogue)


def test_figures_as_counted_by_hand(requests, catalogue):
    ranker = Fixed()
    found = evaluate(ranker, requests, catalogue, ks=(5, 3), batch_size=7, resamples=50, progress=False)
    lists = ranker.rank(list(requests.requests), 5)
    ranks = [
        list(lists[i]).index(row) if row in lists[i] else -1
        for i, row in zip(requests.request_index, requests.item_row, strict=True)
    ]
    assert found.rank_of_target.tolist() == ranks
    assert found.rank_of_target.dtype == np.int32
    hit = np.array([0 <= rank < 3 for rank in ranks])
    assert found.metrics["recall@3"].value == pytest.approx(hit.mean())
    assert found.metrics["recall@3"].low < hit.mean() < found.metrics["recall@3"].high
    by_user = [hit[requests.user == user].mean() for user in np.unique(requests.user)]
    assert found.metrics["user_recall@3"].value == pytest.approx(np.mean(by_user))
    assert abs(np.mean(by_user) - hit.mean()) > 1e-3  # users have different numbers of targets
    surface = np.array(requests.surface)
    both = np.array([s == "feed" and "click" in o for s, o in zip(surface, requests.outcomes, strict=True)])
    assert found.groups["surface"]["search"]["recall@3"].value == pytest.approx(hit[surface == "search"].mean())
    assert found.groups["surface, outcome"]["feed, click"]["recall@3"].value == pytest.approx(hit[both].mean())
    saved = np.array(["save" in names for names in requests.outcomes])
    assert found.groups["outcome"]["save"]["recall@3"].value == pytest.approx(hit[saved].mean())
    short = (requests.history_length >= 1) & (requests.history_length <= 4)
    assert found.groups["history length"]["1-4"]["recall@3"].value == pytest.approx(hit[short].mean())
    quartile = popularity_quartiles(requests.item_counts)[requests.item_row]
    popular = found.groups["item popularity"]["4 (most popular)"]["recall@3"]
    assert popular.value == pytest.approx(hit[quartile == 4].mean())
    assert popular.users == len(set(requests.user[quartile == 4]))
    assert found.coverage == {
        "coverage@3": len(set(lists[:, :3].ravel())),
        "coverage@5": len(set(lists.ravel())),
    }
    assert {"ndcg@3", "mrr@3", "intra_list_diversity@3", "tail_share@5"} < set(found.metrics)
    assert found.embeddings == 1
    assert found.slots == {"merged": {"@3": 3, "@5": 5}}


def test_groups_of_a_kind_hold_every_target(requests, catalogue):
    found = evaluate(Fixed(), requests, catalogue, ks=(3,), resamples=10, progress=False)
    for kind in ("surface", "history length", "item popularity"):
        users = {name: group["recall@3"] for name, group in found.groups[kind].items()}
        assert users
        number = len(set(requests.user))
        assert (
            max(figure.users for figure in users.values()) <= number <= sum(figure.users for figure in users.values())
        )


def test_several_embeddings_are_reported_with_their_slots(requests, catalogue):
    found = evaluate(Several(), requests, catalogue, ks=(3, 5), resamples=10, progress=False)
    assert found.embeddings == 2
    assert found.slots["unordered"] == {"@3": 6, "@5": 10}
    assert found.metrics["unordered_recall@3"].value > found.metrics["recall@3"].value
    assert found.to_dict()["embeddings_per_request"] == 2


def test_diversity_takes_given_vectors(requests, catalogue):
    alike = evaluate(Fixed(), requests, catalogue, ks=(4,), item_vectors=np.ones((20, 2)), resamples=10, progress=False)
    assert alike.metrics["intra_list_diversity@4"].value == pytest.approx(0)
    content = evaluate(Fixed(), requests, catalogue, ks=(4,), resamples=10, progress=False)
    assert 0.5 < content.metrics["intra_list_diversity@4"].value < 1.5


def test_compare_pairs_by_user_and_seed(requests, catalogue):
    popular = {int(row): 0.5 for row in np.argsort(-np.bincount(requests.item_row))[:5]}
    options = {"ks": (5,), "resamples": 10, "progress": False}
    better = [evaluate(Fixed(s, popular), requests, catalogue, **options) for s in range(3)]
    plain = [evaluate(Fixed(s), requests, catalogue, **options) for s in range(3)]
    found = compare(better, plain)
    figure = found.metrics["recall@5"]
    assert found.seeds == 3
    assert figure.difference == pytest.approx(
        np.mean([b.metrics["recall@5"].value - p.metrics["recall@5"].value for b, p in zip(better, plain, strict=True)])
    )
    assert figure.low > 0
    assert figure.minimum_detectable_effect > (figure.high - figure.low) / 2
    assert "feed" in found.groups["surface"]
    assert compare(better[0], better[0]).metrics["recall@5"].difference == 0
    assert compare(better, plain[0]).metrics["recall@5"].b == plain[0].metrics["recall@5"].value


def test_what_cannot_be_compared_is_refused(requests, catalogue, table):
    options = {"resamples": 10, "progress": False}
    one = evaluate(Fixed(), requests, catalogue, ks=(5,), **options)
    with pytest.raises(ValueError, match="other requests or depths"):
        compare(one, evaluate(Fixed(), requests, catalogue, ks=(3,), **options))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda n: np.zeros((n, 2), dtype=np.int64), r"must give int64 \("),
        (lambda n: np.zeros((n, 3)), "gave float64"),
        (lambda n: np.tile([0, 1, 20], (n, 1)), "gave row 20"),
        (lambda n: np.tile([0, 4, 4], (n, 1)), "gave row 4 twice"),
    ],
)
def test_a_ranker_that_breaks_its_contract_is_refused(requests, catalogue, rows, message):
    class Broken:
        def rank(self, requests, k):
            return rows(len(requests))

    with pytest.raises(ValueError, match=f"Broken.rank {message}|{message}"):
        evaluate(Broken(), requests, catalogue, ks=(3,), progress=False)


@pytest.mark.parametrize("ks", [(0,), (-1, 5), ()])
def test_impossible_depths_are_refused(requests, catalogue, ks):
    with pytest.raises(ValueError, match="each at least 1"):
        evaluate(Fixed(), requests, catalogue, ks=ks)


def test_a_depth_beyond_the_catalogue_is_all_of_it(requests, catalogue):
    class Whole:
        def rank(self, requests, k):
            return np.tile(np.arange(k), (len(requests), 1))

    found = evaluate(Whole(), requests, catalogue, ks=(3, len(catalogue) + 30), progress=False)
    assert found.metrics[f"recall@{len(catalogue) + 30}"].value == 1
    assert found.metrics["recall@3"].value < 1


def test_short_lists_are_legal(requests, catalogue):
    class Short:
        def rank(self, requests, k):
            return np.full((len(requests), k), -1)

    found = evaluate(Short(), requests, catalogue, ks=(3,), resamples=10, progress=False)
    assert found.metrics["recall@3"].value == 0
    assert found.coverage == {"coverage@3": 0}
    assert np.isnan(found.metrics["tail_share@3"].value)
    assert "intra_list_diversity@3" not in found.metrics
