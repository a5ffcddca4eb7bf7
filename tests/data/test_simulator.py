import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.contract import match_columns
from pinrec_hf.data.simulator import OUTCOMES, SURFACES, best_reachable_recall, load_world, simulate
from pinrec_hf.data.simulator.log import BlockLog
from pinrec_hf.data.simulator.logging_policy import LoggingPolicy, Requests
from pinrec_hf.data.simulator.oracle import target_probability
from pinrec_hf.data.simulator.parameters import DAY, WorldParameters
from pinrec_hf.data.simulator.users import Recent, Schedule, UserState
from pinrec_hf.data.simulator.walk import LOG, Block, fitted_policy
from pinrec_hf.data.simulator.world import World

# Whoever changes the generator changes this, raises GENERATOR_VERSION and measures every simulated result again.
PINNED = "7783b6827b41f48eaa3e0446a4ede72c47848910419c9849265c835fba585a7d"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small log of each world."""
    root = tmp_path_factory.mktemp("worlds")
    names = ("default", "no_drift", "one_taste", "identical_surfaces")
    return {name: simulate(root / name, size=20_000, world=name).folder for name in names}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["default"]


@pytest.fixture(scope="module")
def log(folder):
    return pq.read_table(folder / "log").to_pandas()


def of_world(name, **changes):
    return World(WorldParameters.create(20_000, 0, name, **changes))


def some_users(world, users=40):
    """Users with everything in their state set, and one request each."""
    state = UserState.create(world.parameters, world.topics, users, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    for part in (state.shown, state.acted, state.liked):
        part.push(rng.integers(len(world.items), size=(users, 3)), np.ones((users, 3), bool))
    time = np.full(users, world.parameters.start + 5 * DAY)
    surface, query, subject = world.begin_request(state, np.arange(users) % 3, rng.random((users, 4)))
    return state, Requests(surface, time, query, subject, np.full(users, 7))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reproducible


def test_generator_is_frozen(tmp_path):
    assert simulate(tmp_path / "w", size=2_000, seed=7).hash == PINNED


def test_same_seed_same_bytes(tmp_path):
    first, second, other = (
        simulate(tmp_path / name, size=1_000, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert files(first.folder) == files(second.folder)
    assert first.hash == second.hash != other.hash
    assert files(first.folder)["log/part-00000.parquet"] != files(other.folder)["log/part-00000.parquet"]


def test_a_block_needs_no_other_block(tmp_path):
    folder = simulate(tmp_path / "w", size=5_500, block_rows=2_000, items=300).folder
    world = load_world(folder)
    alone = BlockLog.create(Block.create(world, LOG, 1, 2_000), fitted_policy(world))
    written = pq.read_table(folder / "log" / "part-00001.parquet")
    items = [None if row < 0 else world.item_ids[row] for row in alone.row]
    assert written["item_id"].to_pylist() == items
    assert [pq.read_metadata(path).num_rows for path in sorted((folder / "log").iterdir())] == [2_000, 2_000, 1_500]
    users = [set(pq.read_table(path)["user_id"].to_pylist()) for path in sorted((folder / "log").iterdir())]
    assert len(set.union(*users)) == sum(map(len, users))


def test_world_comes_back_from_its_folder(folder):
    assert load_world(folder).parameters == WorldParameters.create(20_000, 0, "default")


@pytest.mark.parametrize("size", [1_000, 7_531])
def test_size_is_exact(tmp_path, size):
    report = simulate(tmp_path / "w", size=size)
    assert report.rows == pq.read_table(report.folder / "log").num_rows == size
    assert json.loads((report.folder / "world.json").read_text())["hash"] == report.hash


def test_items_grow_with_size():
    items = {size: WorldParameters.create(size, 0, "default").items for size in (10**5, 10**7, 10**8)}
    assert items[10**5] == 1_500
    assert 90_000 < items[10**7] < 100_000 < items[10**8]


# Contract


def test_tables_keep_the_contract(folder):
    wanted = {
        "log": {"user_id", "item_id", "surface", "timestamp", "outcomes", "request_id", "position", "query"}
        | {"context_item_id"},
        "items": {"item_id", "embedding", "available_from", "available_until"},
        "queries": {"query", "embedding"},
    }
    for table, columns in wanted.items():
        schema = pq.read_schema(folder / ("log/part-00000.parquet" if table == "log" else f"{table}.parquet"))
        assert set(match_columns(schema, table)) == columns
    # The truth is beside the log, never in it.
    assert not [name for name in pq.read_schema(folder / "log/part-00000.parquet").names if "true" in name]


def test_rows_are_what_the_contract_says(folder, log):
    items = pq.read_table(folder / "items.parquet").to_pandas().set_index("item_id")
    queries = set(pq.read_table(folder / "queries.parquet")["query"].to_pylist())
    asked, shown = log[log.item_id.isna()], log[log.item_id.notna()]
    assert set(asked.surface) == {"search"}
    assert set(log[log["query"].notna()].surface) == {"search"}
    assert set(log["query"].dropna()) <= queries
    assert not asked.outcomes.map(len).any()
    assert set(log[log.context_item_id.notna()].surface) == {"related"}
    assert log[log.surface == "related"].context_item_id.notna().all()
    assert set(shown.outcomes.map(tuple)) == {(), ("click",), ("save",), ("click", "save"), ("hide",)}
    life = items.loc[shown.item_id]
    assert not (life.available_from.to_numpy() > shown.timestamp.to_numpy()).any()
    assert not (life.available_until.to_numpy() <= shown.timestamp.to_numpy()).any()
    assert items.available_from.notna().any()
    assert items.embedding.map(len).eq(64).all()


def test_feed_views(log):
    views = log.groupby("request_id")
    assert (views[["user_id", "surface", "timestamp"]].nunique() == 1).all(axis=None)
    impressions = log[log.position > 0].groupby("request_id").position.agg(["min", "max", "count"])
    assert (impressions["min"] == 1).all()
    assert (impressions["max"] == impressions["count"]).all()
    assert impressions["count"].le(8).all()
    assert (impressions["count"] < 5).sum() <= 1  # the very last view is cut to make the size exact
    assert not log[log.position > 0].duplicated(["request_id", "item_id"]).any()
    assert log.groupby("user_id").timestamp.is_monotonic_increasing.all()


def test_no_item_is_shown_again_after_an_action(log):
    acted = log[log.outcomes.map(len) > 0]
    assert len(acted) > 3_000
    assert not acted.duplicated(["user_id", "item_id"]).any()
    first = acted.set_index(["user_id", "item_id"]).timestamp.rename("acted")
    joined = log[log.item_id.notna()].join(first, on=["user_id", "item_id"])
    assert not (joined.timestamp > joined.acted).any()


def test_subject_is_a_liked_item(log):
    liked = log[log.outcomes.map(lambda names: "save" in names or "click" in names)]
    when = liked.set_index(["user_id", "item_id"]).timestamp.to_dict()
    related = log[log.surface == "related"]
    pairs = zip(related.user_id, related.context_item_id, related.timestamp, strict=True)
    assert all(when[user, item] < time for user, item, time in pairs)


def test_log_is_neither_empty_of_actions_nor_full(log):
    rate = log[log.item_id.notna()].outcomes.map(lambda names: "save" in names or "click" in names).mean()
    assert 0.15 < rate < 0.3
    assert {"save", "click", "hide"} == set(log.outcomes.explode().dropna())


# Truth


def test_observed_rates_are_the_true_probabilities(folder, log):
    truth = pq.read_table(folder / "truth").to_pandas()
    assert (truth.request_id == log.request_id).all()
    assert (truth.position == log.position).all()
    for outcome in OUTCOMES:
        chance = truth[f"true_probability_{outcome}"]
        happened = log.outcomes.map(lambda names, outcome=outcome: outcome in names)
        # In all, and where it is likely and unlikely: a constant of the right mean would fail.
        for part in (chance >= 0, chance > chance.quantile(0.9), chance < chance.quantile(0.5)):
            spread = np.sqrt((chance[part] * (1 - chance[part])).sum())
            assert abs(happened[part].sum() - chance[part].sum()) < 4 * spread


def test_response_is_a_probability_and_knows_position_and_satiation():
    world = of_world("default")
    state, request = some_users(world)
    rows = np.random.default_rng(2).integers(len(world.items), size=(40, 6))
    rows[state.shown.holds(rows)] = 0
    first = world.response(state, rows, request.surface, request.time, np.zeros((1, 6), np.int64))
    assert first.shape == (40, 6, 3)
    assert (first > 0).all()
    assert (first < 1).all()
    lower = world.response(state, rows, request.surface, request.time, np.full((1, 6), 5))
    assert (lower < first).all()
    state.observe(world.parameters, world.items.topic[rows], rows, np.zeros((40, 6), np.int8), request.time)
    again = world.response(state, rows, request.surface, request.time, np.zeros((1, 6), np.int64))
    assert (again[..., :2] < first[..., :2]).all()
    later = world.response(state, rows, request.surface, request.time + 3 * DAY, np.zeros((1, 6), np.int64))
    quiet = world.items.trend[rows] == 0
    assert (later[quiet][:, :2].sum(axis=1) > again[quiet][:, :2].sum(axis=1)).all()


def test_chosen_outcomes_follow_their_probabilities():
    world = of_world("default")
    state, request = some_users(world)
    rows = np.arange(6)[None, :] + np.arange(40)[:, None]
    choices = world.choices(state, rows, request.surface, request.time)
    rng = np.random.default_rng(3)
    counts = sum(np.eye(5)[world.choose(choices, rng.random(rows.shape))].sum(axis=(0, 1)) for _ in range(200))
    expected = 200 * choices.sum(axis=(1, 2))
    assert np.abs(counts[1:] - expected).max() < 4 * np.sqrt(expected.max())


# Nulls: in each, the claim has nothing to find; all else is as in the default world


def interests(folder):
    truth = pq.read_table(folder / "truth", columns=["request_id", "interest"]).to_pandas()
    log = pq.read_table(folder / "log", columns=["user_id"]).to_pandas()
    return truth.assign(user=log.user_id).groupby("user").interest.nunique()


def test_interests_drift_but_in_the_world_without_drift(folders):
    assert interests(folders["default"]).median() >= 5
    assert (interests(folders["no_drift"]) == 1).all()


@pytest.mark.parametrize("world", ["no_drift", "one_taste", "identical_surfaces"])
def test_null_worlds_share_what_the_log_can_see_beforehand(folders, world):
    default, null = folders["default"], folders[world]
    for name in ("items.parquet", "queries.parquet"):
        assert (default / name).read_bytes() == (null / name).read_bytes()
    a, b = (pq.read_table(path / "log") for path in (default, null))
    columns = ["user_id", "timestamp", "request_id"]  # who comes, and when
    assert a.select(columns).equals(b.select(columns))
    assert not a.equals(b)


def test_null_parameters_differ_in_one_thing():
    default = WorldParameters.create(20_000, 0, "default")
    for world, changed in (
        ("no_drift", {"drift_in_session": 0.0, "drift_between": 0.0}),
        ("one_taste", {"one_taste": True}),
        ("identical_surfaces", {"identical_surfaces": True}),
    ):
        assert WorldParameters.create(20_000, 0, world) == replace(default, world=world, **changed)


def save_to_click(world):
    state, request = some_users(world)
    rows = np.broadcast_to(np.arange(50), (40, 50))
    click, save, both, _ = world.choices(state, rows, request.surface, request.time)
    return [np.stack([save / click, both / click])[:, request.surface == surface] for surface in range(3)]


def test_in_the_world_of_one_taste_the_kind_of_outcome_tells_nothing():
    for ratio in save_to_click(of_world("one_taste")):
        assert np.allclose(ratio, ratio[:, :1, :1], rtol=1e-9)
    for ratio in save_to_click(of_world("default")):
        assert np.log(ratio).std() > 0.3


def test_identical_surfaces_answer_and_show_the_same():
    for name, same in (("identical_surfaces", True), ("default", False)):
        world = of_world(name)
        state, request = some_users(world)
        rows = np.broadcast_to(np.arange(50), (40, 50))
        answers = [world.response(state, rows, np.full(40, surface), request.time) for surface in range(3)]
        assert np.allclose(answers[0], answers[1], rtol=1e-12) == same
        assert np.allclose(answers[0], answers[2], rtol=1e-12) == same
        none = np.full(40, -1)
        policy = LoggingPolicy(world)
        home = policy.shares(state, Requests(np.zeros(40, int), request.time, none, none, request.length))
        assert np.allclose(policy.shares(state, request)[request.surface != 0], home[request.surface != 0]) == same


def test_query_tells_the_interest_but_where_surfaces_are_identical():
    told = {}
    for name in ("default", "identical_surfaces"):
        world = of_world(name)
        state = UserState.create(world.parameters, world.topics, 4_000, np.random.default_rng(0))
        world.begin_request(state, np.ones(4_000, int), np.random.default_rng(1).random((4_000, 4)))
        told[name] = (state.context_topic == state.interest).mean()
    assert told["default"] > 0.7
    assert told["identical_surfaces"] < 0.15


# The policy


def test_policy_learns_from_days_before_only():
    world = of_world("default")
    user, row = np.repeat(np.arange(200), 20), np.random.default_rng(0).integers(len(world.items), size=4_000)
    time = world.parameters.start + np.tile(np.linspace(0, 14 * DAY - 1, 20).astype(np.int64), 200)
    later = time >= world.parameters.start + 9 * DAY
    changed = np.where(later, (row + 1) % len(world.items), row)
    popularity = [LoggingPolicy(world).fit(user, rows, time)._popularity for rows in (row, changed)]
    assert np.array_equal(popularity[0][:10], popularity[1][:10])
    assert not np.array_equal(popularity[0][10], popularity[1][10])


def test_shown_items_follow_the_policy_shares(folder):
    world = load_world(folder)
    state, request = some_users(world)
    policy = fitted_policy(world)
    share = policy.shares(state, request)
    assert np.allclose(share.sum(axis=1), 1.0, atol=1e-9)
    rng, counts = np.random.default_rng(5), np.zeros_like(share)
    for _ in range(400):
        np.add.at(counts, (np.arange(40)[:, None], policy._candidates(state, request, rng)), 1)
    expected = share * counts.sum(axis=1, keepdims=True)
    assert (np.abs(counts - expected) < 6 * np.sqrt(expected) + 3).all()


def test_two_policies_meet_the_same_users():
    world = of_world("default")
    block = Block.create(world, LOG, 0, 3_000)

    class First:
        def show(self, state, requests, rng):
            return np.broadcast_to(np.arange(8), (len(state), 8))

    for one, other in zip(block.walk(First()), block.walk(LoggingPolicy(world)), strict=True):
        assert np.array_equal(one.interest, other.interest)
        assert np.array_equal(one.requests.time, other.requests.time)
        assert not np.array_equal(one.rows, other.rows)


def test_recent_keeps_the_last_in_order():
    recent = Recent.empty(2, 3)
    recent.push(np.array([[5, 6, 7, 8], [1, 2, 3, 4]]), np.array([[1, 1, 1, 1], [0, 1, 0, 0]], bool))
    assert [recent.back(np.full(2, step)).tolist() for step in range(4)] == [[8, 2], [7, -1], [6, -1], [-1, -1]]
    assert recent.holds(np.array([[5, 6], [2, 1]])).tolist() == [[False, True], [True, False]]


def test_schedule_has_exactly_the_rows():
    parameters = WorldParameters.create(1_000, 0, "default")
    schedule = Schedule.create(parameters, 1_000, np.random.default_rng(0))
    there = np.arange(schedule.time.shape[1]) < schedule.requests[:, None]
    assert (schedule.length + (schedule.surface == SURFACES.index("search")))[there].sum() == 1_000
    assert (np.diff(schedule.time, axis=1)[there[:, 1:]] >= 19).all()
    assert schedule.time[there].min() >= parameters.start
    assert schedule.time[there].max() < parameters.end


# The oracle


def test_oracle_expects_what_happens_and_beats_popularity(folder, log):
    start = load_world(folder).parameters.start
    found = best_reachable_recall(folder, start=start + 3 * DAY, max_requests=1_500)
    assert found["targets"] > 1_000
    for k in (10, 50):
        assert abs(found[f"recall@{k}"] - found[f"expected_recall@{k}"]) < 0.04
    positive = log[log.outcomes.map(lambda names: "save" in names or "click" in names)]
    popular = positive.item_id.value_counts().index[:10]
    assert found["recall@10"] > 2 * positive.item_id.isin(popular).mean()
    assert set(found["surfaces"]) == set(SURFACES)


def test_oracle_gives_nothing_to_items_that_cannot_be_targets():
    world = of_world("default")
    state, request = some_users(world)
    chance = target_probability(LoggingPolicy(world), state, request)
    live = world.items.live(np.arange(len(world.items)), request.time[:, None])
    assert not live.all()
    assert (chance[~live] == 0).all()
    assert (np.take_along_axis(chance, state.acted.rows[:, :3].astype(int), axis=1) == 0).all()
    assert (chance.sum(axis=1) < 7).all()


def test_oracle_reads_the_default_window(folder, log):
    found = best_reachable_recall(folder, max_requests=10_000)
    last = log[log.timestamp >= log.timestamp.max().floor("D")]
    assert found["requests"] == last.request_id.nunique()
    assert found["targets"] == last.outcomes.map(lambda names: "save" in names or "click" in names).sum()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 999}, "1,000"),
        ({"size": 10**9}, "100,000,000"),
        ({"seed": -1}, "seed"),
        ({"world": "flat"}, "identical_surfaces"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "w", **arguments)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_refused(folder):
    with pytest.raises(FileExistsError, match="exists"):
        simulate(folder)


def test_too_few_items_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="too small"):
        simulate(tmp_path / "w", size=1_000, items=20)
    assert not list(tmp_path.iterdir())


def test_oracle_refuses_what_it_cannot_answer(folder, tmp_path):
    with pytest.raises(ValueError, match=r"world\.json"):
        best_reachable_recall(tmp_path)
    with pytest.raises(ValueError, match="no request"):
        best_reachable_recall(folder, start=0, end=1)
    with pytest.raises(ValueError, match="ks"):
        best_reachable_recall(folder, ks=(0,))


def test_world_of_another_generator_is_refused(folder, tmp_path):
    told = json.loads((folder / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps({**told, "generator_version": 0}))
    with pytest.raises(ValueError, match="version 0"):
        load_world(tmp_path)
