"""The walk of one block of users through their requests: drift, request, view, answer, memory.

A policy is anything with `show(state, requests, rng) -> item rows (n, 8)`: the logging policy here, a retriever
with a ranker in an online test. Users, schedule, drift and the chance in their answers come from streams of their
own, so that two policies meet the same users in the same mood.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pinrec_hf.data.simulator.logging_policy import LoggingPolicy, Requests
from pinrec_hf.data.simulator.parameters import POSITIVE_CHOICES
from pinrec_hf.data.simulator.users import Schedule, UserState
from pinrec_hf.data.simulator.world import World

PILOT, LOG = 2, 3  # stages of the random streams; an online test takes another one
USERS_A_BLOCK = 10_000  # ids of a block's users start at block * this


class Policy(Protocol):
    """Chooses what is shown."""

    def show(self, state: UserState, requests: Requests, rng: np.random.Generator) -> np.ndarray:
        """Item rows int64 (n, 8), best position first, -1 beyond a request's length."""
        ...


@dataclass(frozen=True)
class Step:
    """The `number`-th request of the block's first n users (those who have one), and what came of it.

    Attributes:
        rows int64 (n, 8), -1 = none;   choice int8 (n, 8), index into `CHOICES`;
        probability float64 (n, 8, 3): true probabilities of save, click, hide;   interest int64 (n,): true topic.
    """

    number: int
    requests: Requests
    rows: np.ndarray
    choice: np.ndarray
    probability: np.ndarray
    interest: np.ndarray


@dataclass(frozen=True)
class Block:
    """A number of users and their schedule; the same (stage, number, rows) gives the same block."""

    world: World
    stage: int
    number: int
    schedule: Schedule

    @classmethod
    def create(cls, world: World, stage: int, number: int, rows: int) -> "Block":
        rng = world.parameters.generator(stage, number, 0)
        return cls(world, stage, number, Schedule.create(world.parameters, rows, rng))

    def walk(self, policy: Policy) -> Iterator[Step]:
        """One step a request number, all users that have it at once."""
        world, schedule = self.world, self.schedule
        parameters, items = world.parameters, world.items
        tastes, mood, chance = (parameters.generator(self.stage, self.number, k) for k in (1, 2, 3))
        users = UserState.create(parameters, world.topics, len(schedule.requests), tastes)
        before = schedule.time[:, 0]
        for number in range(schedule.time.shape[1]):
            n = int((schedule.requests > number).sum())
            state, time = users[:n], schedule.time[:n, number]
            world.drift(state, time - before[:n], mood.random((n, 4)))
            surface, query, subject = world.begin_request(state, schedule.surface[:n, number], mood.random((n, 4)))
            requests = Requests(surface, time, query, subject, schedule.length[:n, number])
            rows = policy.show(state, requests, chance)
            choices = world.choices(state, rows, surface, time)
            choice = np.where(rows >= 0, world.choose(choices, mood.random(rows.shape)), 0).astype(np.int8)
            click, save, both, hide = choices
            probability = np.stack([save + both, click + both, hide], axis=-1)
            interest = state.interest.copy()
            state.observe(parameters, items.topic[rows], rows, choice, time)
            before = time
            yield Step(number, requests, rows, choice, probability, interest)


def fitted_policy(world: World) -> LoggingPolicy:
    """The logging policy of a world, fitted on the walk of its pilot population."""
    parameters = world.parameters
    policy, found = LoggingPolicy(world), []
    sizes = np.diff(np.append(np.arange(0, parameters.pilot_rows, parameters.block_rows), parameters.pilot_rows))
    for number, rows in enumerate(sizes.tolist()):
        for step in Block.create(world, PILOT, number, rows).walk(policy):
            user, slot = np.nonzero(np.isin(step.choice, POSITIVE_CHOICES))
            event = (number * USERS_A_BLOCK + user, np.full(len(user), step.number), slot, step.rows[user, slot])
            found.append(np.stack([*event, step.requests.time[user]]))
    user, step_number, slot, row, time = np.concatenate(found, axis=1)
    order = np.lexsort((slot, step_number, user))
    return policy.fit(user[order], row[order], time[order])
