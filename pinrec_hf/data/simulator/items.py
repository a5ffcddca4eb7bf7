"""The catalogue: what an item truly is, and the part of it that titles and content vectors tell."""

from dataclasses import dataclass

import numpy as np

from pinrec_hf.data.simulator.parameters import DAY, WorldParameters, draw
from pinrec_hf.data.simulator.topics import NOUNS, STYLE_SYNONYMS, STYLE_WORDS, Topics

ALWAYS = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Items:
    """Row-wise truth about the items, rows as in `items.parquet`.

    Attributes:
        topic, second_topic, style, mood (items,) int64: style is half told by title and vector, mood by nothing.
        quality (2, items) float64: attraction to everybody, for a save and for a click; told by nothing.
        trend, trend_peak, trend_width (items,) float64: a bump of attraction in time (seconds), or size 0.
        available_from, available_until (items,) int64 seconds, `ALWAYS` where unbounded.
        told_style (items,) bool: the vector and the title show the style.
    """

    topic: np.ndarray
    second_topic: np.ndarray
    style: np.ndarray
    mood: np.ndarray
    quality: np.ndarray
    trend: np.ndarray
    trend_peak: np.ndarray
    trend_width: np.ndarray
    available_from: np.ndarray
    available_until: np.ndarray
    told_style: np.ndarray

    @classmethod
    def create(cls, parameters: WorldParameters, topics: Topics) -> "Items":
        rng, count = parameters.generator(0, 1), parameters.items
        topic = draw(np.cumsum(topics.share), rng.random(count))
        near = topics.successors[topic, (rng.random(count) * 3).astype(np.int64)]
        anywhere = (rng.random(count) * len(topics)).astype(np.int64)
        shared, own = rng.standard_normal(count), rng.standard_normal((2, count))
        mix = parameters.quality_shared
        quality = parameters.quality_spread * (np.sqrt(mix) * shared + np.sqrt(1 - mix) * own)
        if parameters.one_taste:
            quality[1] = quality[0]
        # A quarter of the items appears during the log, a sixth disappears, at least a day later.
        length = parameters.days * DAY
        appears = (parameters.start + rng.random(count) * 0.95 * length).astype(np.int64)
        born = np.where(rng.random(count) < 0.25, appears, ALWAYS[0])
        lives = DAY + (rng.random(count) * length).astype(np.int64)
        dies = np.where(rng.random(count) < 0.17, np.maximum(born, parameters.start) + lives, ALWAYS[1])
        return cls(
            topic=topic,
            second_topic=np.where(rng.random(count) < 0.7, near, anywhere),
            style=(rng.random(count) * parameters.styles).astype(np.int64),
            mood=(rng.random(count) * parameters.moods).astype(np.int64),
            quality=quality,
            trend=np.where(rng.random(count) < parameters.trend_share, parameters.trend_size, 0.0) * rng.random(count),
            trend_peak=parameters.start + rng.random(count) * length,
            trend_width=DAY * (0.7 + 1.5 * rng.random(count)),
            available_from=born,
            available_until=dies,
            told_style=rng.random(count) < 0.7,
        )

    def __len__(self) -> int:
        return len(self.topic)

    def live(self, rows: np.ndarray, time: np.ndarray) -> np.ndarray:
        """bool, of the broadcast shape: the item can be shown at `time` (seconds)."""
        return (self.available_from[rows] <= time) & (time < self.available_until[rows])

    def ids(self) -> list[str]:
        return [f"i{row:06d}" for row in range(len(self))]

    def titles(self, topics: Topics) -> list[str]:
        """`[style] noun setting, noun setting`: the words of both topics, the style where it is told."""
        words = topics.words()
        synonym = (np.arange(len(self)) % 2).tolist()
        style = [
            f"{(STYLE_SYNONYMS if odd else STYLE_WORDS)[s]} " if told else ""
            for s, told, odd in zip(self.style.tolist(), self.told_style.tolist(), synonym, strict=True)
        ]
        pairs = zip(style, self.topic.tolist(), self.second_topic.tolist(), strict=True)
        return [f"{prefix}{words[a]}, {words[b]}" if a != b else f"{prefix}{words[a]}" for prefix, a, b in pairs]

    def categories(self, topics: Topics) -> list[str]:
        """The noun of the first topic: a display and filter column."""
        return [NOUNS[noun] for noun in topics.noun[self.topic].tolist()]

    def vectors(self, parameters: WorldParameters, topics: Topics) -> np.ndarray:
        """Content vectors float32 (items, content_size): topics and told style, under as much noise again."""
        rng = parameters.generator(0, 2)
        noise = rng.standard_normal((len(self), parameters.content_size), dtype=np.float32)
        vectors = noise * np.float32(0.9 / np.sqrt(parameters.content_size))
        vectors += topics.latent.astype(np.float32)[self.topic]
        vectors += np.float32(0.45) * topics.latent.astype(np.float32)[self.second_topic]
        style = np.float32(0.5) * topics.style_latent.astype(np.float32)[self.style]
        vectors += style * self.told_style[:, None]
        return vectors
