"""Every number of a simulated world, in one frozen record that is written to `world.json`.

The generator is frozen: what is measured on a world holds only for the generator that wrote it. Whoever changes a
default here, or any draw in this package, raises `GENERATOR_VERSION`; a test pins the hash of a tiny world.
"""

from dataclasses import dataclass, replace

import numpy as np

GENERATOR_VERSION = 1

SURFACES = ("homefeed", "search", "related")
OUTCOMES = ("save", "click", "hide")
# What a user does with one impression, exactly one of these. The order of the last four is that of
# `World.choices`; a set may hold both positive outcomes.
CHOICES: tuple[tuple[str, ...], ...] = ((), ("click",), ("save",), ("click", "save"), ("hide",))
POSITIVE_CHOICES = (1, 2, 3)
WORLDS = ("default", "no_drift", "one_taste", "identical_surfaces")
DAY = 86_400
MOST_TOPICS = 384  # pairs of words

# Columns of the weights below: how much each true reason counts, per surface, for (save, click).
REASONS = ("interest", "stable", "style", "mood", "context", "context_style", "context_mood")
_WEIGHTS = (
    ((3.9, 2.6, 0.4, 0.4, 0.0, 0.0, 0.0), (4.7, 1.8, 0.4, 0.4, 0.0, 0.0, 0.0)),  # homefeed
    ((1.5, 1.0, 0.9, 0.2, 3.4, 0.8, 0.0), (2.0, 0.6, 0.3, 0.8, 3.6, 0.3, 0.0)),  # search
    ((1.4, 0.9, 0.2, 0.6, 3.0, 1.0, 0.4), (2.0, 0.6, 0.7, 0.2, 3.0, 0.3, 1.0)),  # related
)


@dataclass(frozen=True)
class WorldParameters:
    """A world, completely: the same record gives the same world and the same log, to the byte.

    Utilities are on the scale of a logit; times are in seconds unless named otherwise.
    """

    size: int  # rows of the log
    seed: int
    world: str
    items: int
    topics: int
    pilot_rows: int  # rows of the unwritten log that the logging policy is fitted on
    content_size: int = 64
    start: int = 1_704_067_200  # Monday 2024-01-01 00:00 UTC
    days: int = 14
    block_rows: int = 400_000  # rows of users that are walked together: memory and speed

    # Activity: requests a user = clip(exp(N(log median, spread))); a session goes on with p = session_stay.
    requests_median: float = 18.0
    requests_spread: float = 0.6
    requests_range: tuple[int, int] = (4, 80)
    session_stay: float = 0.6
    surface_shares: tuple[float, ...] = (0.5, 0.27, 0.23)
    view_range: tuple[int, int] = (5, 8)

    # Drift: before each request the interest moves with p = in_session + between * (1 - exp(-gap / hours)),
    # to one of three successors on the topic graph, now and then back to a stable taste.
    drift_in_session: float = 0.12
    drift_between: float = 0.45
    drift_hours: float = 8.0
    successor_shares: tuple[float, ...] = (0.75, 0.15, 0.1)
    return_share: float = 0.1
    successor_affinity: tuple[float, ...] = (0.35, 0.2, 0.2)

    # Tastes and items.
    stable_topics: int = 4
    styles: int = 8
    moods: int = 6
    quality_spread: float = 0.8
    quality_shared: float = 0.5  # correlation of an item's quality for saves and for clicks
    trend_share: float = 0.3
    trend_size: float = 1.4
    topic_surface_spread: float = 0.4

    # Response.
    weights: tuple[tuple[tuple[float, ...], ...], ...] = _WEIGHTS
    intercepts: tuple[tuple[float, ...], ...] = (  # click, save, both, hide
        (-3.8, -4.0, -4.7, -4.2),
        (-3.8, -4.5, -4.9, -4.8),
        (-4.3, -4.1, -5.1, -4.8),
    )
    hide_slope: float = 0.5
    examination: tuple[float, ...] = (0.08, 0.16, 0.06)  # P(look at position p, from 0) = 1 / (1 + x p)
    satiation_gain: tuple[float, float] = (0.15, 0.35)  # per impression of a topic, and more per action
    satiation_hours: float = 24.0
    satiation_size: float = 2.0
    repeat_penalty: float = 0.8  # an item among the last `shown_memory` shown
    shown_memory: int = 32
    query_from_interest: float = 0.75  # else from a stable taste
    query_style_share: float = 0.4
    query_short_share: float = 0.45  # the setting alone, which several topics share: the history tells which

    # Logging policy: per surface the shares of (match, popular, random); match is item-kNN of the user's last
    # positive items on the home feed, keyword match on search, item-kNN of the subject on related.
    policy_shares: tuple[tuple[float, ...], ...] = ((0.6, 0.35, 0.05), (0.7, 0.25, 0.05), (0.7, 0.25, 0.05))
    anchor_shares: tuple[float, ...] = (0.3, 0.22, 0.16, 0.13, 0.1, 0.09)
    neighbours: int = 60
    popularity_half_life_days: float = 7.0
    popularity_power: float = 1.5

    # Nulls.
    one_taste: bool = False
    identical_surfaces: bool = False

    @classmethod
    def create(cls, size: int, seed: int, world: str, **changes: object) -> "WorldParameters":
        """Parameters of `world` at `size` log rows; `changes` replaces single fields.

        Raises:
            ValueError: a size outside 10^3..10^8, a negative seed, an unknown world or field.
        """
        if not 1_000 <= size <= 100_000_000:
            raise ValueError(f"size is {size}; a simulated log has 1,000 to 100,000,000 rows")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give an integer >= 0")
        if world not in WORLDS:
            raise ValueError(f"world {world!r} is unknown; choose one of {list(WORLDS)}")
        if unknown := sorted(set(changes) - set(cls.__dataclass_fields__)):
            raise ValueError(f"unknown world parameters {unknown}; known: {list(cls.__dataclass_fields__)}")
        items = max(120, round(1_500 * (size / 1e5) ** 0.9))
        topics = min(MOST_TOPICS, round(12 * (items / 100) ** 0.45))
        base = cls(size, seed, world, items, topics, pilot_rows=25 * items)
        nulls: dict[str, dict[str, object]] = {
            "default": {},
            "no_drift": {"drift_in_session": 0.0, "drift_between": 0.0},
            "one_taste": {"one_taste": True},
            "identical_surfaces": {"identical_surfaces": True},
        }
        return replace(base, **{**nulls[world], **changes})  # type: ignore[arg-type]

    @property
    def end(self) -> int:
        """First second after the log."""
        return self.start + self.days * DAY

    def generator(self, *stream: int) -> np.random.Generator:
        """The random stream of one purpose, e.g. (stage, block): independent of every other one."""
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence([self.seed, *stream])))


def draw(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Indexes drawn by inverse transform: `cumulative` (n,) of shares, `uniform` in [0, 1)."""
    index = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.minimum(index, len(cumulative) - 1)
