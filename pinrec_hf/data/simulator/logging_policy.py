"""The policy that wrote the log: popularity, item-kNN or keyword match, and 5 % random. It knows no truth.

It is fitted as a production system is, on a log: a pilot population (other users, never written) is walked under
the same policy before it has data (flat popularity, neighbours by title words). From the pilot's positives come the
popularity of each day, from the days before it only, and the co-occurrence neighbours.

A view's slots are drawn independently from one mixture per request; items that are gone, were acted on or are in
the view already fall out. So the probability of every item being shown is known (`shares`), and the oracle uses it.
"""

from dataclasses import dataclass, fields

import numpy as np

from pinrec_hf.data.simulator.parameters import DAY
from pinrec_hf.data.simulator.topics import SETTINGS
from pinrec_hf.data.simulator.users import NEVER, UserState
from pinrec_hf.data.simulator.world import World

SLOTS = 16  # candidates drawn for a view of at most 8
NEIGHBOUR_SKEW = 1.5  # rank of a drawn neighbour = neighbours * uniform ** skew


@dataclass(frozen=True)
class Requests:
    """One request of each of n users, int64 (n,) each: what a policy is told.

    `query` and `subject` are -1 where there is none; `length` is the number of impressions wanted.
    """

    surface: np.ndarray
    time: np.ndarray
    query: np.ndarray
    subject: np.ndarray
    length: np.ndarray

    def __getitem__(self, users: np.ndarray) -> "Requests":
        return Requests(*(getattr(self, field.name)[users] for field in fields(self)))


class LoggingPolicy:
    """Args: world; popularity float64 (days, items) > 0; neighbours int32 (items, neighbours)."""

    def __init__(
        self, world: World, popularity: np.ndarray | None = None, neighbours: np.ndarray | None = None
    ) -> None:
        self.world, parameters, topics, items = world, world.parameters, world.topics, world.items
        number, count = np.arange(len(items)), len(topics)
        keys = [
            items.topic,
            items.second_topic,
            *(count + topics.setting[t] for t in (items.topic, items.second_topic)),
        ]
        pairs = np.unique(np.concatenate([key * len(items) + number for key in keys]))
        self._posting = pairs % len(items)  # item rows by query key, see Topics.query_key
        self._first = np.searchsorted(pairs // len(items), np.arange(count + len(SETTINGS) + 1))
        popularity = np.ones((parameters.days, len(items))) if popularity is None else popularity
        self.neighbours = self._same_words() if neighbours is None else neighbours
        midnight = parameters.start + DAY * np.arange(parameters.days)[:, None]
        live = (items.available_from < midnight + DAY) & (items.available_until > midnight)
        self._popularity = popularity * live
        self._total = np.concatenate([[0.0], np.cumsum(self._popularity)])
        self._keyword_total = np.concatenate([[0.0], np.cumsum(self._popularity[:, self._posting])])
        self._shares = np.array(parameters.policy_shares)
        if parameters.identical_surfaces:
            self._shares[:] = self._shares[0]

    def _same_words(self) -> np.ndarray:
        topic = self.world.items.topic
        rng, width = self.world.parameters.generator(1, 0), self.world.parameters.neighbours
        first, size = self._first[topic], self._first[topic + 1] - self._first[topic]
        place = first[:, None] + (rng.random((len(topic), width)) * size[:, None]).astype(np.int64)
        return self._posting[place].astype(np.int32)

    def fit(self, user: np.ndarray, row: np.ndarray, time: np.ndarray) -> "LoggingPolicy":
        """The policy that learned from positive events (n,) each, ordered by user and time."""
        parameters, count = self.world.parameters, len(self.world.items)
        day = (time - parameters.start) // DAY
        by_day = np.bincount(day * count + row, minlength=parameters.days * count).reshape(parameters.days, count)
        popularity, keep = np.full((parameters.days, count), 0.3), 0.5 ** (1 / parameters.popularity_half_life_days)
        for later in range(1, parameters.days):
            popularity[later] = 0.3 + keep * (popularity[later - 1] - 0.3) + by_day[later - 1]
        return LoggingPolicy(
            self.world, popularity**parameters.popularity_power, self._co_occurring(user, row, by_day.sum(axis=0))
        )

    def _co_occurring(self, user: np.ndarray, row: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        """Items liked within three positives of one another, by count / sqrt(frequencies); short lists filled up."""
        count, width = len(frequency), self.world.parameters.neighbours
        pairs = []
        for step in (1, 2, 3):
            a, b = row[:-step], row[step:]
            together = (user[:-step] == user[step:]) & (a != b)
            pairs += [a[together] * count + b[together], b[together] * count + a[together]]
        pair, number = np.unique(np.concatenate(pairs), return_counts=True)
        a, b = pair // count, pair % count
        score = number / np.sqrt(frequency[b] + 1.0)
        order = np.lexsort((-score, a))
        a, b = a[order], b[order]
        rank = np.arange(len(a)) - np.searchsorted(a, a)
        kept = rank < width
        neighbours, filled = self.neighbours.copy(), np.bincount(a[kept], minlength=count)
        # What the title words gave moves back behind what the log gave.
        column = np.arange(width)[None, :] - filled[:, None]
        neighbours = np.where(column >= 0, np.take_along_axis(neighbours, np.maximum(column, 0), axis=1), 0)
        neighbours[a[kept], rank[kept]] = b[kept]
        return neighbours.astype(np.int32)

    def show(self, state: UserState, requests: Requests, rng: np.random.Generator) -> np.ndarray:
        """Item rows int64 (n, 8) in order of position; -1 beyond each request's length.

        Raises:
            ValueError: the world has too few live items for a view of new ones.
        """
        shown = self._first_valid(state, requests, self._candidates(state, requests, rng))
        for _ in range(50):
            short = np.nonzero((shown >= 0).sum(axis=1) < requests.length)[0]
            if not len(short):
                return shown
            some, asked = state[short], requests[short]
            more = np.hstack([shown[short], self._candidates(some, asked, rng)])
            shown[short] = self._first_valid(some, asked, more)
        raise ValueError(f"a world of {len(self.world.items)} items is too small for its users; use a larger size")

    def _first_valid(self, state: UserState, requests: Requests, candidates: np.ndarray) -> np.ndarray:
        valid = (candidates >= 0) & (candidates != requests.subject[:, None])
        valid &= self.world.items.live(candidates, requests.time[:, None])
        valid &= ~state.acted.holds(candidates.astype(np.int32))
        twice = candidates[:, :, None] == candidates[:, None, :]
        valid &= ~(twice & np.tri(candidates.shape[1], k=-1, dtype=bool)).any(axis=2)
        place = np.cumsum(valid, axis=1) - 1
        valid &= place < requests.length[:, None]
        shown = np.full((len(candidates), self.world.parameters.view_range[1]), NEVER, np.int64)
        request, slot = np.nonzero(valid)
        shown[request, place[request, slot]] = candidates[request, slot]
        return shown

    def _source(self, state: UserState, requests: Requests) -> np.ndarray:
        """Shares (n, 3) of match, popular and random; who has nothing to match gets the popular instead."""
        shares = self._shares[requests.surface]
        unmatched = self._by_neighbour(requests) & (requests.subject < 0) & (state.liked.count == 0)
        shares[unmatched, 1] += shares[unmatched, 0]
        shares[unmatched, 0] = 0.0
        return shares

    def _by_neighbour(self, requests: Requests) -> np.ndarray:
        """bool (n,): match means item-kNN, not keywords."""
        if self.world.parameters.identical_surfaces:
            return np.ones(len(requests.surface), bool)
        return requests.surface != 1

    def _day(self, requests: Requests) -> np.ndarray:
        return (requests.time - self.world.parameters.start) // DAY

    def _range(self, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        """First and last place (n,) of each query's items in the keyword totals of its day."""
        key, offset = self.world.topics.query_key(requests.query), self._day(requests) * len(self._posting)
        return offset + self._first[key], offset + self._first[key + 1]

    def _anchors(self, state: UserState, requests: Requests) -> list[tuple[np.ndarray, np.ndarray]]:
        """(item row, share) of every item whose neighbours are asked for; a missing one hands its share on."""
        own = (requests.surface != 2) | self.world.parameters.identical_surfaces
        shares = np.array(self.world.parameters.anchor_shares)
        there = np.arange(len(shares)) < state.liked.count[:, None]
        share = there * shares / np.maximum((there * shares).sum(axis=1, keepdims=True), 1e-9)
        rows = [state.liked.back(np.full(len(state), step)) for step in range(len(shares))]
        anchors = [(np.where(own, row, NEVER), share[:, step] * own) for step, row in enumerate(rows)]
        return [*anchors, (requests.subject, np.where(own, 0.0, 1.0))]

    def _candidates(self, state: UserState, requests: Requests, rng: np.random.Generator) -> np.ndarray:
        n, count = len(state), len(self.world.items)
        uniform = rng.random((3, n, SLOTS))
        cumulative = np.cumsum(self._source(state, requests), axis=1)
        source = (uniform[0] >= cumulative[:, :1]).astype(np.int8) + (uniform[0] >= cumulative[:, 1:2])
        candidates = (uniform[1] * count).astype(np.int64)  # random

        request, slot = np.nonzero(source == 1)
        begin = self._day(requests)[request] * count
        candidates[request, slot] = _within(self._total, begin, begin + count, uniform[1, request, slot]) - begin

        by_neighbour = self._by_neighbour(requests)
        match = source == 0
        request, slot = np.nonzero(match & ~by_neighbour[:, None])
        begin, end = (edge[request] for edge in self._range(requests))
        place = _within(self._keyword_total, begin, end, uniform[1, request, slot])
        candidates[request, slot] = self._posting[place % len(self._posting)]

        request, slot = np.nonzero(match & by_neighbour[:, None])
        rows, shares = (np.stack(part, axis=1) for part in zip(*self._anchors(state, requests), strict=True))
        upto = np.cumsum(shares, axis=1)[request]
        anchor = rows[request, np.minimum((uniform[2, request, slot, None] >= upto).sum(axis=1), rows.shape[1] - 1)]
        width = self.neighbours.shape[1]
        rank = (width * uniform[1, request, slot] ** NEIGHBOUR_SKEW).astype(np.int64)
        candidates[request, slot] = np.where(anchor >= 0, self.neighbours[anchor, rank], NEVER)
        return candidates

    def shares(self, state: UserState, requests: Requests) -> np.ndarray:
        """Probability float64 (n, items) of one slot's draw, before gone and acted-on items fall out."""
        count = len(self.world.items)
        source, day = self._source(state, requests), self._day(requests)
        popular = self._popularity[day] / self._popularity[day].sum(axis=1, keepdims=True)
        share = source[:, 1:2] * popular + source[:, 2:] / count

        width = self.neighbours.shape[1]
        edge = (np.arange(width + 1) / width) ** (1 / NEIGHBOUR_SKEW)
        by_neighbour = self._by_neighbour(requests)
        for row, part in self._anchors(state, requests):
            of = np.nonzero(by_neighbour & (row >= 0) & (part > 0))[0]
            weight = (source[of, 0] * part[of])[:, None] * np.diff(edge)
            np.add.at(share, (of[:, None], self.neighbours[row[of]]), weight)
        for i in np.nonzero(~by_neighbour)[0]:
            begin, end = (int(edge[i]) for edge in self._range(requests))
            weight = np.diff(self._keyword_total[begin : end + 1])
            found = self._posting[np.arange(begin, end) % len(self._posting)]
            share[i, found] += source[i, 0] * weight / max(weight.sum(), 1e-9)
        return share


def _within(total: np.ndarray, begin: np.ndarray, end: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Places in [begin, end) drawn by weight, from the running `total` of all weights (one longer)."""
    low, high = total[begin], total[end]
    place = np.searchsorted(total, low + uniform * (high - low), side="right") - 1
    return np.clip(place, begin, end - 1)
