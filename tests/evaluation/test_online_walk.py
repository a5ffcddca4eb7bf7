"""The walk of the test days: the log's users and past, a retriever's views, a history that remembers them."""

import json
import shutil

import numpy as np
import pytest

from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.simulator import simulate
from pinrec_hf.data.simulator.log import log_blocks
from pinrec_hf.data.simulator.walk import fitted_policy
from pinrec_hf.evaluation.online_walk import OnlineWorld, _Online
from pinrec_hf.retrieval.eligible import seen_rows


class Anything:
    """Ranks at random, by user and time; keeps the requests that it was asked."""

    def __init__(self, catalogue, seed=0):
        self.items, self.seed, self.asked = len(catalogue), seed, []

    def rank(self, requests, k):
        self.asked += [{**r, "history": {name: list(v) for name, v in r["history"].items()}} for r in requests]
        lists = [np.random.default_rng([self.seed, r["timestamp"]]).permutation(self.items)[:k] for r in requests]
        return np.array(lists)


@pytest.fixture(scope="module")
def online(world_data, world_catalogue):
    return OnlineWorld(*world_data, world_catalogue)


def test_before_the_test_days_users_live_the_log(online, responses, world_catalogue):
    policy = fitted_policy(online.world)
    for block in log_blocks(online.world):
        logged = list(block.walk(policy))
        arm = _Online(online, block, [step.rows for step in logged], Anything(world_catalogue), responses, 50)
        changed = 0
        for step, old in zip(block.walk(arm), logged, strict=True):
            before = old.requests.time < online.start
            for name in ("rows", "choice", "probability", "interest"):
                assert np.array_equal(getattr(step, name)[before], getattr(old, name)[before])
            assert np.array_equal(step.interest, old.interest)  # moods owe nothing to what is shown
            changed += (step.rows != old.rows).any(axis=1).sum()
        assert changed > 100


def test_the_retriever_reads_what_the_user_did(online, responses, world_catalogue, monkeypatch):
    """The history's items are the world's own memory of what was acted on, at every request."""
    plain, checked = _Online._view, []

    def view(self, state, requests, width):
        for i, user in enumerate(self.users.tolist()):
            asked = self._request(user, requests, i)
            acted = np.unique(self.online._rows[state.acted.rows[i][state.acted.rows[i] >= 0]])
            assert acted.tolist() == seen_rows(asked, world_catalogue).tolist()
            assert all(time < asked["timestamp"] for time in asked["history"]["timestamp"])
            assert len({len(values) for values in asked["history"].values()}) == 1
            checked.append(user)
        return plain(self, state, requests, width)

    monkeypatch.setattr(_Online, "_view", view)
    ranker = Anything(world_catalogue)
    (answers,) = online.walk([ranker], responses, 80, progress=False)
    assert len(checked) == len(answers) == len(ranker.asked)
    assert len(checked) > 1.5 * len(set(checked))  # several requests a user
    searches = [request for request in ranker.asked if request["surface"] == "search"]
    assert searches
    assert all(request["query"] in online._queries for request in searches)
    assert all(("context_item_id" in r) == (r["surface"] == "related") for r in ranker.asked)


def test_views_hold_candidates_that_can_be_shown(online, responses, world_catalogue):
    seen = []

    class Careless(Anything):
        """Offers gone, acted-on and subject items too, and few of them."""

        def rank(self, requests, k):
            found = super().rank(requests, k)
            for i, request in enumerate(requests):
                bad = seen_rows(request, world_catalogue)[:3].tolist()
                if request.get("context_item_id"):
                    bad = list({*bad, *world_catalogue.rows([request["context_item_id"]]).tolist()})
                others = found[i][~np.isin(found[i], bad)]
                found[i] = [*bad, *others][: found.shape[1]]
                found[i, -2:] = -1
            seen.append(found)
            return found

    policy = fitted_policy(online.world)
    items, full = online.world.items, 0
    for block in log_blocks(online.world):
        logged = [step.rows for step in block.walk(policy)]
        arm = _Online(online, block, logged, Careless(world_catalogue), responses, 12)
        for step in block.walk(arm):
            for place, user in enumerate(arm.users.tolist()):
                shown = step.rows[user][step.rows[user] >= 0]
                assert set(online._rows[shown]) <= set(seen[-1][place])
                assert len(set(shown)) == len(shown) <= step.requests.length[user]
                assert step.requests.subject[user] not in shown
                assert items.live(shown, step.requests.time[user]).all()
                acted = arm._request(user, step.requests, user)["history"]
                assert not set(online._rows[shown]) & set(seen_rows({"history": acted}, world_catalogue))
                full += len(shown) == step.requests.length[user]
    assert full > 20


def test_answers_are_drawn_from_their_probabilities(online, responses, world_catalogue):
    rankers = [Anything(world_catalogue), Anything(world_catalogue), Anything(world_catalogue, seed=1)]
    first, again, other = online.walk(rankers, responses, 50, progress=False)
    for name in ("user", "surface", "drawn", "expected"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.expected, other.expected)
    assert np.array_equal(np.sort(first.user), np.sort(other.user))
    drawn, expected = first.drawn.sum(axis=0), first.expected.sum(axis=0)
    assert (np.abs(drawn - expected) < 4 * np.sqrt(expected) + 1).all()
    assert (first.impressions > 0).mean() > 0.95


def test_refuses_data_of_another_world(world_data, world_catalogue, tmp_path):
    world, data = world_data
    other = simulate(tmp_path / "other", size=20_000, seed=1).folder
    with pytest.raises(ValueError, match="has other requests in"):
        OnlineWorld(other, data, world_catalogue)
    larger = simulate(tmp_path / "larger", size=30_000).folder
    with pytest.raises(ValueError, match="prepare the log of"):
        OnlineWorld(larger, data, world_catalogue)
    with pytest.raises(ValueError, match=r"no world\.json"):
        OnlineWorld(data, data, world_catalogue)
    with pytest.raises(FileNotFoundError, match=r"no metadata\.json"):
        OnlineWorld(world, world, world_catalogue)
    log, items = str(world / "log"), str(world / "items.parquet")
    prepare(log, items=items, output_dir=tmp_path / "positive")
    with pytest.raises(ValueError, match="--negative-outcome hide"):
        OnlineWorld(world, tmp_path / "positive", world_catalogue)
    shutil.copytree(data, tmp_path / "loo")
    metadata = json.loads((data / "metadata.json").read_text())
    (tmp_path / "loo" / "metadata.json").write_text(json.dumps({**metadata, "split": {"kind": "leave_one_out"}}))
    with pytest.raises(ValueError, match="leave-one-out"):
        OnlineWorld(world, tmp_path / "loo", world_catalogue)
