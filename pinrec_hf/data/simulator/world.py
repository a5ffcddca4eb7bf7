"""The world: topics, items, and how a user truly answers an impression.

The users are of another family than any model here: interests walk on a topic graph, tastes are tables over
topics, styles and moods, topics and items satiate, positions hide, items have trends. An impression at position p
is looked at with a probability; who looks chooses exactly one of: ignore, click, save, both, hide, by a
multinomial logit. So in the world of one taste, where the attraction is the same for both outcomes, *which*
positive outcome follows depends on nothing but the surface.
"""

from functools import cached_property

import numpy as np

from pinrec_hf.data.simulator.items import Items
from pinrec_hf.data.simulator.parameters import REASONS, SURFACES, WorldParameters, draw
from pinrec_hf.data.simulator.topics import Topics
from pinrec_hf.data.simulator.users import NEVER, UserState


class World:
    """A world built from its parameters alone.

    Attributes:
        parameters, topics, items: see there.
    """

    def __init__(self, parameters: WorldParameters) -> None:
        self.parameters = parameters
        self.topics = Topics.create(parameters)
        self.items = Items.create(parameters, self.topics)
        weights, intercepts = np.array(parameters.weights), np.array(parameters.intercepts)
        examination = np.array(parameters.examination)
        spread = parameters.generator(0, 3).standard_normal((len(SURFACES), len(self.topics)))
        if parameters.one_taste:  # the mean of both, for both
            weights = np.broadcast_to(weights.mean(axis=1, keepdims=True), weights.shape)
        if parameters.identical_surfaces:  # the home feed's
            weights, intercepts, examination, spread = (
                np.broadcast_to(table[:1], table.shape) for table in (weights, intercepts, examination, spread)
            )
        self._weights, self._intercepts, self._examination = weights, intercepts, examination
        self._topic_appeal = parameters.topic_surface_spread * spread

    def response(
        self,
        state: UserState,
        item_rows: np.ndarray,
        surface: np.ndarray,
        time: np.ndarray,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """True probability of each outcome, if the items were shown in this very request.

        Args:
            state: n users; their context as `begin_request` set it.
            item_rows: int (n, m), catalogue rows.
            surface: int (n,), index into `SURFACES`.   time: int64 (n,), seconds.
            position: int (n, m), 0 = top; None = the order of `item_rows`.

        Returns:
            float64 (n, m, 3): probabilities of save, click and hide (`OUTCOMES`); save and click may both happen.
        """
        click, save, both, hide = self.choices(state, item_rows, surface, time, position)
        return np.stack([save + both, click + both, hide], axis=-1)

    def choices(
        self,
        state: UserState,
        item_rows: np.ndarray,
        surface: np.ndarray,
        time: np.ndarray,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """float64 (4, n, m): click only, save only, both, hide; what is left to 1 is ignoring. See `response`."""
        save, click = self._attraction(state, item_rows, surface, time)
        mean = 0.5 * (save + click)
        base = self._intercepts[surface][:, :, None]
        choice = np.stack([click, save, mean, -self.parameters.hide_slope * mean])
        choice += base.transpose(1, 0, 2)
        np.exp(choice, out=choice)
        if position is None:
            position = np.arange(item_rows.shape[1])[None, :]
        choice *= self.look(surface, position) / (1.0 + choice.sum(axis=0))
        return choice

    def look(self, surface: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Probability (n, m) that the impressions at `position` (n or 1, m) are looked at."""
        return 1.0 / (1.0 + self._examination[surface][:, None] * position)

    def choose(self, choices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """int8 (n, m), index into `CHOICES`, for `uniform` (n, m) in [0, 1)."""
        below = (uniform < np.cumsum(choices, axis=0)).sum(axis=0)
        return np.where(below == 0, 0, 5 - below).astype(np.int8)

    def _attraction(
        self, state: UserState, rows: np.ndarray, surface: np.ndarray, time: np.ndarray
    ) -> list[np.ndarray]:
        """Utility over the intercept, (n, m) each, for a save and for a click."""
        items, parameters, user = self.items, self.parameters, np.arange(len(rows))[:, None]
        topic, style, mood = items.topic[rows], items.style[rows], items.mood[rows]
        second = items.second_topic[rows]
        reasons = dict.fromkeys(REASONS, np.zeros(1))
        for reason, wanted in (("interest", state.interest), ("context", state.context_topic)):
            nearness = self.topics.affinity[wanted]  # (n, topics); context -1 has weight 0 or is masked
            reasons[reason] = np.maximum(nearness[user, topic], 0.5 * nearness[user, second])
        reasons["context"] = reasons["context"] * (state.context_topic >= 0)[:, None]
        reasons["context_style"] = style == state.context_style[:, None]
        reasons["context_mood"] = mood == state.context_mood[:, None]

        tired = state.satiation[user, topic]
        rest = np.exp((state.satiation_time - time) / (3_600.0 * parameters.satiation_hours))
        tired = tired * rest[:, None]
        shared = -parameters.satiation_size * tired / (1.0 + tired)
        shared -= parameters.repeat_penalty * state.shown.holds(rows)
        shared += self._topic_appeal[surface[:, None], topic]
        away = (time[:, None] - items.trend_peak[rows]) / items.trend_width[rows]
        shared += items.trend[rows] * np.exp(-away * away)

        attraction = []
        for outcome in range(2):
            reasons["stable"] = state.stable[user, outcome, topic]
            reasons["style"] = state.style[user, outcome, style]
            reasons["mood"] = state.mood[user, outcome, mood]
            weights = self._weights[surface, outcome]
            total = shared + items.quality[outcome, rows]
            for column, reason in enumerate(REASONS):
                total += weights[:, column, None] * reasons[reason]
            attraction.append(total)
        return attraction

    def drift(self, state: UserState, gap: np.ndarray, uniform: np.ndarray) -> None:
        """Moves the interests on, `gap` (n,) seconds after the last request; `uniform` (n, 4)."""
        parameters = self.parameters
        moves = parameters.drift_in_session + parameters.drift_between * -np.expm1(
            -gap / (3_600.0 * parameters.drift_hours)
        )
        column = draw(np.cumsum(parameters.successor_shares), uniform[:, 1])
        onward = self.topics.successors[state.interest, column]
        stable = state.stable_topics.reshape(len(state), -1)
        taste = stable[np.arange(len(state)), (uniform[:, 3] * stable.shape[1]).astype(np.int64)]
        moved = np.where(uniform[:, 2] < parameters.return_share, taste, onward)
        state.interest[:] = np.where(uniform[:, 0] < moves, moved, state.interest)

    def begin_request(
        self, state: UserState, surface: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sets what this request asks for; `uniform` (n, 4).

        Returns:
            surface (a user who liked nothing yet has no subject item and gets the home feed), query number and
            subject item row, each int64 (n,), -1 where the surface has none.
        """
        parameters, topics, items, user = self.parameters, self.topics, self.items, np.arange(len(state))
        subject = state.liked.back((uniform[:, 0] * 3).astype(np.int64))
        subject = np.where(subject < 0, state.liked.back(np.zeros(len(state), np.int64)), subject)
        surface = np.where((surface == 2) & (subject < 0), 0, surface)
        search, related = surface == 1, surface == 2

        stable = state.stable_topics.reshape(len(state), -1)
        taste = stable[user, (uniform[:, 1] * stable.shape[1]).astype(np.int64)]
        wanted = np.where(uniform[:, 0] < parameters.query_from_interest, state.interest, taste)
        style = state.style[:, 0].argmax(axis=1)
        said = np.where(uniform[:, 2] < parameters.query_style_share, style, NEVER)
        short = uniform[:, 3] < parameters.query_short_share
        if parameters.identical_surfaces:  # query and subject are decoration
            wanted = draw(np.cumsum(topics.share), uniform[:, 0])
            subject = (uniform[:, 1] * len(items)).astype(np.int64)
            said = np.where(said >= 0, (uniform[:, 1] * parameters.styles).astype(np.int64), NEVER)
        query = np.where(search, topics.query(wanted, said, short), NEVER)
        subject = np.where(related, subject, NEVER)
        state.context_topic[:] = np.where(search, wanted, np.where(related, items.topic[subject], NEVER))
        state.context_style[:] = np.where(search & ~short, said, np.where(related, items.style[subject], NEVER))
        state.context_mood[:] = np.where(related, items.mood[subject], NEVER)
        return surface, query, subject

    @cached_property
    def item_ids(self) -> list[str]:
        """Ids by catalogue row."""
        return self.items.ids()
