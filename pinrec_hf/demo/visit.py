"""What a visitor of the page asks, what is remembered of it, and what is shown; without Gradio."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pinrec_hf.demo.answer import Answer, answer, time_after
from pinrec_hf.demo.explain import change, origin
from pinrec_hf.demo.render import Renderer, acted_on, sentences
from pinrec_hf.demo.titles import TitleSearch
from pinrec_hf.evaluation.baselines import TwoTowerModel
from pinrec_hf.evaluation.ranker import ModelRanker
from pinrec_hf.retrieval.merge import allocate_slots
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.retrieval.users import find_user, list_users

MOST_USERS, MOST_STEPS, MOST_ITEMS, SUBJECTS = 200, 8, 50, 20
ONE_TURN = 1.5
"""Seconds: moves of one control that follow each other faster are one change, held against the list before it."""

NOBODY = "Nobody: an empty history"


def no_history() -> dict[str, list[Any]]:
    return {"item_id": [], "surface": [], "timestamp": [], "outcomes": []}


@dataclass(frozen=True)
class Visit:
    """What the page remembers of a visitor."""

    user: str | None = None
    split: str | None = None
    history: dict[str, list[Any]] = field(default_factory=no_history)
    answer: Answer | None = None
    before: Answer | None = None
    control: str = ""
    answered_at: float = 0.0


def linked(shares: Sequence[float], moved: int) -> list[int]:
    """Dials that sum to 100 again after one was moved: the others keep their proportions, or are equal at zero."""
    value = round(shares[moved])
    others = np.array([share for i, share in enumerate(shares) if i != moved], float)
    if not len(others):
        return [value]
    rest = (
        allocate_slots(others if others.any() else others + 1, 100 - value).tolist()
        if value < 100
        else [0] * len(others)
    )
    return [*rest[:moved], value, *rest[moved:]]


class Demo:
    """The page of one retriever, whose visitors have a `Visit` each.

    Args:
        retriever: what answers. title: shown at the top, such as the model's name.
        data (*optional*): a folder that `pinrec prepare` wrote, whose users can be chosen.
        compare (*optional*): another model of the same catalogue, whose list stands beside.

    Raises:
        ValueError: `compare` has another catalogue.
    """

    def __init__(
        self,
        retriever: PinRecRetriever,
        title: str,
        data: str | os.PathLike[str] | None = None,
        compare: ModelRanker | None = None,
    ) -> None:
        if compare and compare.tokenizer.catalogue.fingerprint != retriever.tokenizer.catalogue.fingerprint:
            raise ValueError("--compare has another catalogue than --model; give a model trained on the same data")
        self.retriever, self.title, self.data, self.compare = retriever, title, data, compare
        self.titles = TitleSearch(retriever)
        self.render = Renderer(retriever, self.titles)
        self.config = retriever.model.config
        self.dials: list[str] = self.config.positive_outcomes
        self.compare_name = (
            "the two-tower" if compare and isinstance(compare.model, TwoTowerModel) else "the other model"
        )
        self.users = list_users(data, MOST_USERS) if data is not None else []

    # -- what happens -------------------------------------------------------------------------------------------------

    def default_shares(self, surface: str | None) -> list[int]:
        """Dials of a surface, in whole percent: its budget in the model's config, else equal shares."""
        budget = self.retriever.model.resolve_budget(surface)
        shares = [1.0] * len(self.dials) if set(budget) == {None} else [budget.get(name, 0) for name in self.dials]
        return allocate_slots(np.array(shares), 100).tolist() if shares else []

    def ask(
        self,
        control: str,
        visit: Visit,
        surface: str | None,
        query: str,
        subject: Any,
        steps: int,
        k: int,
        *shares: float,
    ) -> Visit:
        """A new visit with the answer to what the controls say; `control` is the one that was moved.

        Raises:
            ValueError: as `PinRecRetriever.recommend`; all dials at zero.
        """
        if shares and not any(shares):
            raise ValueError("All dials are at zero: turn one up.")
        goes_on = control == visit.control and time.monotonic() - visit.answered_at < ONE_TURN
        now = answer(
            self.retriever,
            {
                "user_id": visit.user,
                "history": visit.history,
                "surface": surface,
                "timestamp": time_after(visit.history),
                "query": query.strip() or None,
                "context_item_id": None if subject == "" else subject,
                "outcome_budget": dict(zip(self.dials, map(float, shares), strict=True)) if shares else None,
                "num_steps": int(steps),
                "k": int(k),
            },
            self.compare,
        )
        before = visit.before if goes_on else visit.answer
        return replace(visit, answer=now, before=before, control=control, answered_at=time.monotonic())

    def with_user(self, visit: Visit, user: str | None) -> Visit:
        """The visit with another user's history, that is, with an empty one for nobody."""
        if user is None or user == NOBODY or self.data is None:
            user, split, history = None, None, no_history()
        else:
            history, split = find_user(os.fspath(self.data), str(user).strip(), self.retriever.tokenizer)
        return replace(visit, user=user, split=split, history=history)

    def subjects(self, visit: Visit) -> list[tuple[str, Any]]:
        """`(title, item id)` to look beside: nothing, and the newest items of the history."""
        newest = list(dict.fromkeys(reversed(acted_on(visit.history))))
        rows = self.retriever.tokenizer.catalogue.rows(newest)
        known = [(item, row) for item, row in zip(newest, rows.tolist(), strict=True) if row >= 0][:SUBJECTS]
        return [("nothing", ""), *((self.titles.names(np.array([row]))[0], item) for item, row in known)]

    # -- what is seen -------------------------------------------------------------------------------------------------

    def show(self, visit: Visit) -> list[str]:
        """HTML of why, candidates, the other model's list, path and history."""
        now, before = visit.answer, visit.before
        if now is None:
            return [""] * 5
        why = sentences(change(now, before) if before else [], origin(now, self.compare_name))
        return [
            f'<section class="card"><h2>Why this list</h2>{why}</section>',
            self.render.candidates("PinRec", now, before),
            self.render.compared(self.compare_name, now) if self.compare else "",
            self.render.path(now),
            self.render.history(visit.history, visit.split),
        ]
