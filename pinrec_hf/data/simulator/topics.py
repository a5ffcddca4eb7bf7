"""Topics: the graph along which interests drift, their words, and the queries that can be typed."""

from dataclasses import dataclass

import numpy as np

from pinrec_hf.data.simulator.parameters import WorldParameters

# fmt: off
NOUNS = (
    "sofa", "lamp", "rug", "curtain", "shelf", "desk", "mirror", "cushion", "vase", "candle", "dress", "jacket",
    "boots", "scarf", "bag", "hat", "ring", "necklace", "cake", "bread", "soup", "salad", "pasta", "pie", "cookie",
    "cocktail", "tattoo", "nail", "braid", "pergola", "fence", "pond", "planter", "herb", "rose", "quilt", "crochet",
    "knitting", "origami", "pottery", "bench", "mural", "poster", "lettering", "camper", "bicycle", "basket", "stool",
)
SETTINGS = ("bedroom", "kitchen", "garden", "wedding", "winter", "party", "travel", "studio")
STYLE_WORDS = ("rustic", "minimal", "boho", "vintage", "modern", "pastel", "bold", "gothic")
STYLE_SYNONYMS = ("farmhouse", "simple", "woven", "retro", "sleek", "soft", "colourful", "dark")
# fmt: on


@dataclass(frozen=True)
class Topics:
    """The topics of a world.

    Attributes:
        share (topics,) float64: how popular each topic is; sums to 1.
        successors (topics, 3) int64: where an interest goes next: on along a ring, two along, or across it.
        affinity (topics, topics) float64: how well an item of topic [., j] serves an interest in topic [i, .].
        noun, setting (topics,) int64: its two words; topics may share either, never both.
        latent (topics, content_size), style_latent (styles, content_size) float64: what content vectors show.
    """

    share: np.ndarray
    successors: np.ndarray
    affinity: np.ndarray
    noun: np.ndarray
    setting: np.ndarray
    latent: np.ndarray
    style_latent: np.ndarray

    @classmethod
    def create(cls, parameters: WorldParameters) -> "Topics":
        rng, count = parameters.generator(0, 0), parameters.topics
        ring = np.argsort(rng.random(count))
        place = np.argsort(ring)
        across = ring[(place + 3 + (rng.random(count) * (count - 6)).astype(np.int64)) % count]
        successors = np.stack([ring[(place + 1) % count], ring[(place + 2) % count], across], axis=1)
        affinity = np.eye(count)
        for column, value in enumerate(parameters.successor_affinity):
            affinity[np.arange(count), successors[:, column]] = value
        share = 1.0 / (3.0 + np.argsort(rng.random(count))) ** 0.7
        number = np.arange(count)
        noun = number % len(NOUNS)
        own = rng.standard_normal((count, parameters.content_size))
        # Neighbours on the ring look a little alike, so content tells a part of the graph.
        latent = own + 0.6 * own[ring[(place - 1) % count]]
        return cls(
            share=share / share.sum(),
            successors=successors,
            affinity=affinity,
            noun=noun,
            setting=(5 * number + number // len(NOUNS)) % len(SETTINGS),
            latent=_unit(latent),
            style_latent=_unit(rng.standard_normal((parameters.styles, parameters.content_size))),
        )

    def __len__(self) -> int:
        return len(self.share)

    def words(self) -> list[str]:
        """`noun setting` of every topic."""
        return [f"{NOUNS[n]} {SETTINGS[s]}" for n, s in zip(self.noun, self.setting, strict=True)]

    # Queries are numbered: topic * (styles + 1) + (0, or 1 + style), then one a setting.

    def query(self, topic: np.ndarray, style: np.ndarray, short: np.ndarray) -> np.ndarray:
        """Query numbers int64 (n,) for wanted topics; style -1 = not said; short = the setting alone."""
        styles = len(self.style_latent)
        return np.where(short, len(self) * (styles + 1) + self.setting[topic], topic * (styles + 1) + 1 + style)

    def query_key(self, query: np.ndarray) -> np.ndarray:
        """What keyword match looks up: the topic's two words (< topics), else topics + setting."""
        styles = len(self.style_latent)
        full = len(self) * (styles + 1)
        return np.where(query < full, query // (styles + 1), query - full + len(self))

    def query_table(self) -> tuple[list[str], np.ndarray]:
        """All queries that can be typed: texts, and vectors float32 (queries, content_size) in the items' space."""
        styles = len(self.style_latent)
        texts, vectors = [], []
        for words, latent in zip(self.words(), self.latent, strict=True):
            texts += [words, *(f"{STYLE_WORDS[s]} {words}" for s in range(styles))]
            vectors += [latent[None], latent + 0.5 * self.style_latent]
        texts += SETTINGS
        vectors += [self.latent[self.setting == s].mean(axis=0, keepdims=True) for s in range(len(SETTINGS))]
        return texts, np.concatenate(vectors).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True))
