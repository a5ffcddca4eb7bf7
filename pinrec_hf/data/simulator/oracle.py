"""The best reachable recall of a simulated log: what no retriever can exceed in expectation.

At each request the oracle knows everything but chance: the user's true state (interest, tastes, satiation, what was
shown and acted on), the request, and the logging policy. It ranks the live items that the user has not acted on by

    P(target) = P(the policy shows it in this view) * P(save or click | shown, state)

Recall is a mean over targets, each request gives one list, so the list of the k likeliest targets has the most hits
in expectation. A retriever sees only the log: the gap to this figure is hidden state, not skill alone.

Two things are approximate. A view is a draw without repetition: P(shown) is that of a Poisson process stopped at the
view's mean length. And positions count by their mean, though likelier items are drawn, and so stand, earlier.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from pinrec_hf.data.simulator.log import load_world, log_blocks
from pinrec_hf.data.simulator.logging_policy import LoggingPolicy, Requests
from pinrec_hf.data.simulator.parameters import DAY, POSITIVE_CHOICES, SURFACES
from pinrec_hf.data.simulator.users import UserState
from pinrec_hf.data.simulator.walk import Block, fitted_policy

CELLS = 1_000_000  # requests x items that are scored at once


def target_probability(policy: LoggingPolicy, state: UserState, requests: Requests) -> np.ndarray:
    """P(an item is shown and saved or clicked in this request), float64 (n, items); 0 for gone and acted-on items."""
    world = policy.world
    n, items = len(state), np.arange(len(world.items))
    rows = np.broadcast_to(items, (n, len(items)))
    possible = world.items.live(items, requests.time[:, None])
    user, column = np.nonzero(state.acted.rows >= 0)
    possible[user, state.acted.rows[user, column]] = False
    related = np.nonzero(requests.subject >= 0)[0]
    possible[related, requests.subject[related]] = False

    share = policy.shares(state, requests) * possible
    share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-12)
    length = requests.length[:, None].astype(np.float64)
    draws = length
    for _ in range(8):  # Newton: so many draws have `length` different items in expectation
        missed = np.exp(-draws * share)
        draws = draws + (length - (1 - missed).sum(axis=1, keepdims=True)) / (share * missed).sum(axis=1, keepdims=True)
    shown = -np.expm1(-draws * share)

    click, save, both, _ = world.choices(state, rows, requests.surface, requests.time, np.zeros((1, 1), np.int64))
    place = np.arange(world.parameters.view_range[1])
    looks = world.look(requests.surface, place[None, :]) * (place < length)
    return shown * (click + save + both) * looks.sum(axis=1, keepdims=True) / np.maximum(length, 1)


@dataclass
class _Asking:
    """Shows what the logging policy shows, and ranks all items before, for some of the requests."""

    policy: LoggingPolicy
    asked: np.ndarray  # bool (users, most requests)
    most: int
    number: int = -1
    users: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    top: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    chance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # of `top`, best first
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0))  # expected number in the request

    def show(self, state: UserState, requests: Requests, rng: np.random.Generator) -> np.ndarray:
        self.number += 1
        self.users = np.nonzero(self.asked[: len(state), self.number])[0]
        step = max(1, CELLS // len(self.policy.world.items))
        found = [self._rank(state, requests, self.users[i : i + step]) for i in range(0, len(self.users), step)]
        if found:
            self.top, self.chance, self.targets = (np.concatenate(part) for part in zip(*found, strict=True))
        return self.policy.show(state, requests, rng)

    def _rank(self, state: UserState, requests: Requests, users: np.ndarray) -> tuple[np.ndarray, ...]:
        chance = target_probability(self.policy, state[users], requests[users])
        top = np.argpartition(-chance, self.most - 1, axis=1)[:, : self.most]
        top = np.take_along_axis(
            top, np.argsort(-np.take_along_axis(chance, top, axis=1), axis=1, kind="stable"), axis=1
        )
        return top, np.take_along_axis(chance, top, axis=1), chance.sum(axis=1)


def best_reachable_recall(
    folder: str | os.PathLike[str],
    ks: tuple[int, ...] = (10, 50),
    *,
    start: int | None = None,
    end: int | None = None,
    max_requests: int = 2_000,
    seed: int = 0,
) -> dict:
    """The oracle's recall on the targets of a window of a simulated log, replayed from its `world.json`.

    Targets are as `prepare` has them: saved or clicked, not acted on before (the policy shows no such item again).

    Args:
        folder: of `simulate`.   ks: cut-offs.
        start, end: window in seconds, [start, end); the log's last day by default.
        max_requests: so many requests of the window, of whole first blocks at random, are ranked.
        seed: of that choice.

    Returns:
        `requests`, `targets`; per k `recall@k` (hits / targets that happened), `expected_recall@k` (the same
        ratio of expectations over the same requests: less noisy); and `surfaces`: {surface: the same}.

    Raises:
        ValueError: not a simulated folder, an empty window, or k out of range.
    """
    world = load_world(folder)
    start = world.parameters.end - DAY if start is None else start
    end = world.parameters.end if end is None else end
    if not ks or min(ks) < 1 or max(ks) > len(world.items):
        raise ValueError(f"ks are {ks}; each must be from 1 to the catalogue's {len(world.items)} items")
    policy, rng = fitted_policy(world), np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    for block in log_blocks(world):
        if (left := max_requests - sum(map(len, rows))) <= 0:
            break
        rows.append(_block_rows(block, policy, _asked(block, start, end, left, rng), ks))
    table = np.concatenate(rows)
    if not len(table):
        raise ValueError(
            f"no request from {start} to {end}; the log has {world.parameters.start}..{world.parameters.end}"
        )
    surfaces = {name: _summary(table[table[:, 0] == k], ks) for k, name in enumerate(SURFACES)}
    return {**_summary(table, ks), "surfaces": surfaces}


def _asked(block: Block, start: int, end: int, most: int, rng: np.random.Generator) -> np.ndarray:
    schedule = block.schedule
    asked = (schedule.time >= start) & (schedule.time < end)
    asked &= np.arange(schedule.time.shape[1]) < schedule.requests[:, None]
    found = np.flatnonzero(asked)
    asked.ravel()[np.delete(found, rng.choice(len(found), min(most, len(found)), replace=False))] = False
    return asked


def _block_rows(block: Block, policy: LoggingPolicy, asked: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """One row a request: surface, targets, expected targets, then hits and expected hits of each k."""
    asking, found = _Asking(policy, asked, max(ks)), []
    for step in block.walk(asking):
        users = asking.users
        if not len(users):
            continue
        positive = np.isin(step.choice[users], POSITIVE_CHOICES)
        among = step.rows[users][:, :, None] == asking.top[:, None, :]
        columns = [step.requests.surface[users], positive.sum(axis=1), asking.targets]
        for k in ks:
            hits = (positive & among[:, :, :k].any(axis=2)).sum(axis=1)
            columns += [hits, asking.chance[:, :k].sum(axis=1)]
        found.append(np.stack(columns, axis=1).astype(np.float64))
    return np.concatenate(found) if found else np.zeros((0, 3 + 2 * len(ks)))


def _summary(table: np.ndarray, ks: tuple[int, ...]) -> dict:
    _, targets, expected, *hits = table.sum(axis=0)
    summary: dict = {"requests": len(table), "targets": int(targets)}
    for k, happened, likely in zip(ks, hits[::2], hits[1::2], strict=True):
        summary[f"recall@{k}"] = float(happened / targets) if targets else None
        summary[f"expected_recall@{k}"] = float(likely / expected) if expected else None
    return summary
