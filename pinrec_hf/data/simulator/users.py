"""The users of one block: when they come, what they like, and the state that their walk changes."""

from dataclasses import dataclass, fields

import numpy as np

from pinrec_hf.data.simulator.parameters import DAY, WorldParameters, draw
from pinrec_hf.data.simulator.topics import Topics

ACTED_MEMORY = 160  # more than a user of `requests_range` acts on; what was acted on is not shown again
NEVER = -1


class Recent:
    """The last `size` item rows of each user, a ring per user (int32; -1 where empty)."""

    def __init__(self, rows: np.ndarray, count: np.ndarray) -> None:
        self.rows, self.count = rows, count

    @classmethod
    def empty(cls, users: int, size: int) -> "Recent":
        return cls(np.full((users, size), NEVER, np.int32), np.zeros(users, np.int64))

    def __getitem__(self, users: slice | np.ndarray) -> "Recent":
        return Recent(self.rows[users], self.count[users])

    def push(self, rows: np.ndarray, mask: np.ndarray) -> None:
        """Appends `rows[mask]` (both (users, m)), left to right."""
        place = self.count[:, None] + np.cumsum(mask, axis=1) - 1
        user, column = np.nonzero(mask)
        self.rows[user, place[user, column] % self.rows.shape[1]] = rows[user, column]
        self.count += mask.sum(axis=1)

    def back(self, steps: np.ndarray) -> np.ndarray:
        """int64 (users,): the row `steps` (0 = the last) before the end, -1 where there is none."""
        place = self.count - 1 - steps
        found = self.rows[np.arange(len(self.rows)), place % self.rows.shape[1]]
        return np.where((place >= 0) & (steps < self.rows.shape[1]), found, NEVER).astype(np.int64)

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """bool (users, m): `rows` (users, m) are among the user's rows."""
        return (self.rows[:, None, :] == rows[:, :, None]).any(axis=2)


@dataclass
class UserState:
    """Tastes (fixed) and state (changing) of n users; `response` needs nothing else about them.

    Attributes:
        stable (n, 2, topics), style (n, 2, styles), mood (n, 2, moods) float64: tastes for (save, click).
        stable_topics (n, 2, stable_topics) int64: the topics where `stable` is not 0.
        interest (n,) int64: the topic that drifts.   satiation (n, topics) float64 and satiation_time (n,) int64.
        shown, acted, liked: last items shown, acted on (either way), acted on positively.
        context_topic, context_style, context_mood (n,) int64: what this request asks for, -1 = nothing.
    """

    stable: np.ndarray
    stable_topics: np.ndarray
    style: np.ndarray
    mood: np.ndarray
    interest: np.ndarray
    satiation: np.ndarray
    satiation_time: np.ndarray
    context_topic: np.ndarray
    context_style: np.ndarray
    context_mood: np.ndarray
    shown: Recent
    acted: Recent
    liked: Recent

    @classmethod
    def create(cls, parameters: WorldParameters, topics: Topics, users: int, rng: np.random.Generator) -> "UserState":
        shape, by_share = (users, 2, parameters.stable_topics), np.cumsum(topics.share)
        stable_topics = draw(by_share, rng.random(shape))
        strength = 0.6 + 0.8 * rng.random(shape)
        style = rng.standard_normal((users, 2, parameters.styles))
        mood = rng.standard_normal((users, 2, parameters.moods))
        interest = draw(by_share, rng.random(users))
        if parameters.one_taste:
            for taste in (stable_topics, strength, style, mood):
                taste[:, 1] = taste[:, 0]
        stable = np.zeros((users, 2, len(topics)))
        np.put_along_axis(stable, stable_topics, strength, axis=2)
        return cls(
            stable=stable,
            stable_topics=stable_topics,
            style=style,
            mood=mood,
            interest=interest,
            satiation=np.zeros((users, len(topics))),
            satiation_time=np.full(users, parameters.start),
            context_topic=np.full(users, NEVER, np.int64),
            context_style=np.full(users, NEVER, np.int64),
            context_mood=np.full(users, NEVER, np.int64),
            shown=Recent.empty(users, parameters.shown_memory),
            acted=Recent.empty(users, ACTED_MEMORY),
            liked=Recent.empty(users, len(parameters.anchor_shares)),
        )

    def __len__(self) -> int:
        return len(self.interest)

    def __getitem__(self, users: slice | np.ndarray) -> "UserState":
        """Some of the users: a slice shares memory (the walk changes it), an index array copies."""
        return UserState(**{field.name: getattr(self, field.name)[users] for field in fields(self)})

    def observe(
        self, parameters: WorldParameters, topic: np.ndarray, rows: np.ndarray, choice: np.ndarray, time: np.ndarray
    ) -> None:
        """What a view leaves behind: `rows` (n, m) of `topic` (n, m) were shown at `time`; row -1 = no impression."""
        shown, acted = rows >= 0, choice > 0
        self.shown.push(rows, shown)
        self.acted.push(rows, acted)
        self.liked.push(rows, (choice > 0) & (choice < 4))
        self.satiation *= np.exp((self.satiation_time - time) / (3_600.0 * parameters.satiation_hours))[:, None]
        self.satiation_time[:] = time
        gain = parameters.satiation_gain[0] * shown + parameters.satiation_gain[1] * acted
        np.add.at(self.satiation, (np.arange(len(rows))[:, None], topic), gain)


@dataclass(frozen=True)
class Schedule:
    """Who comes when: users sorted by number of requests, most first, so that those still there are a prefix.

    Attributes:
        requests (users,) int64.
        time (users, most) int64 seconds; surface, length (users, most) int64: impressions wanted. Past a user's
        `requests` the cells mean nothing.
    """

    requests: np.ndarray
    time: np.ndarray
    surface: np.ndarray
    length: np.ndarray

    @classmethod
    def create(cls, parameters: WorldParameters, rows: int, rng: np.random.Generator) -> "Schedule":
        """Users enough for exactly `rows` log rows (impressions, and one a search): the last one is cut short."""
        lowest, most = parameters.requests_range
        users = rows // 50 + 50  # three times what is needed
        typical = np.log(parameters.requests_median) + parameters.requests_spread * rng.standard_normal(users)
        requests = np.clip(np.rint(np.exp(typical)), lowest, most).astype(np.int64)
        surface = draw(np.cumsum(parameters.surface_shares), rng.random((users, most)))
        low, high = parameters.view_range
        length = low + (rng.random((users, most)) * (high - low + 1)).astype(np.int64)

        there = np.arange(most) < requests[:, None]
        used = np.where(there, length + (surface == 1), 0)
        if used.sum() < rows:
            raise ValueError(
                f"{users} users of some {parameters.requests_median:g} requests make {used.sum()} of {rows} rows; "
                "raise requests_median or view_range"
            )
        before = np.cumsum(used.ravel()).reshape(used.shape) - used
        requests = (there & (before < rows)).sum(axis=1)
        users = int((requests > 0).sum())
        left = np.where(there, rows - before, length)[:users] - (surface[:users] == 1)
        order = np.argsort(-requests[:users], kind="stable")
        most = int(requests[order[0]])
        return cls(
            requests=requests[order],
            time=_times(parameters, requests[order], most, rng),
            surface=surface[order, :most],
            length=np.minimum(length[:users], left)[order, :most],
        )


def _times(parameters: WorldParameters, requests: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Request times (users, most): sessions at the hours that a user prefers, minutes between their requests."""
    shape = (len(requests), most)
    begins = rng.random(shape) >= parameters.session_stay
    begins[:, 0] = True
    day = (rng.random(shape) * parameters.days).astype(np.int64)
    midday = rng.random(shape) < 0.35
    hour = np.where(midday, 12.5, 19.5) + 2.0 * rng.standard_normal((len(requests), 1))
    second = np.clip(hour + 1.5 * rng.standard_normal(shape), 0.0, 21.5) * 3_600
    gap = 30.0 - 90.0 * np.log1p(-rng.random(shape))
    session = np.maximum.accumulate(np.where(begins, np.arange(most), 0), axis=1)
    since = np.cumsum(gap, axis=1)
    start = np.take_along_axis(day * DAY + second, session, axis=1)
    time = start + since - np.take_along_axis(since, session, axis=1)
    time = np.sort(np.where(np.arange(most) < requests[:, None], time, np.inf), axis=1)
    # Sessions may fall on one another: at least 20 s between two requests of a user.
    spaced = np.maximum.accumulate(time - 20.0 * np.arange(most), axis=1) + 20.0 * np.arange(most)
    return parameters.start + np.where(np.isfinite(spaced), spaced, 0.0).astype(np.int64)
