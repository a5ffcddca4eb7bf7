"""The users of a simulated world live its test days again, and are shown what a retriever finds.

Up to the test days every user lives exactly what the log says: the recorded views are shown again, and the world's
random streams (drift, queries, chance of an answer) do not depend on what is shown. From then on a retriever gives
candidates, the response model orders them, the first ones fill the view, and users answer by their true
probabilities, which leave their mark: what was shown satiates, what was liked becomes a subject item, and all of it
is in the history that the retriever reads at the next request. So two retrievers meet the same users at the same
times in the same mood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pinrec_hf.data.dataset_folder import read_metadata
from pinrec_hf.data.simulator.log import load_world, log_blocks
from pinrec_hf.data.simulator.logging_policy import Requests
from pinrec_hf.data.simulator.parameters import CHOICES, OUTCOMES, SURFACES
from pinrec_hf.data.simulator.users import UserState
from pinrec_hf.data.simulator.walk import USERS_A_BLOCK, Block, fitted_policy
from pinrec_hf.evaluation.evaluate import Ranker, checked_ranking
from pinrec_hf.evaluation.events import split_files
from pinrec_hf.evaluation.response_model import ResponseModel
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

COLUMNS = ("item_id", "surface", "timestamp", "outcomes", "request_id", "query", "context_item_id")
History = dict[str, list[Any]]


@dataclass(frozen=True)
class Answers:
    """What came of the requests of the test days under one retriever; one entry a request.

    Attributes:
        user: int64, index into the world's users. surface: int64, index into `SURFACES`. impressions: int64.
        drawn: int64 (requests, 3), impressions that were saved, clicked, hidden (`OUTCOMES`), as chance had it.
        expected: float64 (requests, 3), the same in expectation: the sum of the impressions' true probabilities.
    """

    user: np.ndarray
    surface: np.ndarray
    impressions: np.ndarray
    drawn: np.ndarray
    expected: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


class OnlineWorld:
    """A simulated world at the start of the test days of a dataset that was prepared from its log.

    Args:
        world: a folder that `pinrec simulate` wrote. data: what `pinrec prepare` made of it.
        catalogue: of the dataset's items; the retrievers' rows are its rows.

    Raises:
        ValueError: no simulated world, or data that were not prepared from its log (other items, users, times or
            names, hides that are no negative outcome, a leave-one-out split).
    """

    def __init__(self, world: str | Path, data: str | Path, catalogue: Catalogue) -> None:
        self.world, self.data, self.catalogue = load_world(world), Path(data), catalogue
        metadata = read_metadata(data)
        if metadata["split"]["kind"] != "time":
            raise ValueError(f"{data} was split leave-one-out; an online test needs test days: prepare it by time")
        names = metadata["surfaces"], metadata["outcomes"], metadata["negative_outcomes"]
        if (set(names[0]), set(names[1]), names[2]) != (set(SURFACES), set(OUTCOMES), ["hide"]):
            raise ValueError(
                f"{data} has surfaces, outcomes and negative outcomes {names}; an online test needs all of {SURFACES} "
                f"and {OUTCOMES}, prepared with --negative-outcome hide"
            )
        self.start, self.end = (int(metadata["split"][name]) for name in ("validation_end", "test_end"))
        ids = self.world.item_ids
        self._rows = catalogue.rows(ids)  # by world row
        if len(catalogue) != len(ids) or (self._rows < 0).any():
            raise ValueError(
                f"{data} has {len(catalogue)} items, {world} {len(ids)} others: prepare the log of {world}"
            )
        self._world_rows = np.argsort(self._rows)
        self._queries = self.world.topics.query_table()[0]
        self._histories = self._read_histories()
        self._check_requests(world)

    def walk(
        self, rankers: Sequence[Ranker], responses: ResponseModel, k: int, *, progress: bool = True
    ) -> list[Answers]:
        """The test days once under each of `rankers`, whose best k candidates a request `responses` orders."""
        policy = fitted_policy(self.world)
        found: list[list[Answers]] = [[] for _ in rankers]
        with tqdm(desc="online test", unit="request", disable=not progress) as bar:
            for block in log_blocks(self.world):
                logged = [step.rows for step in block.walk(policy)]
                for ranker, answers in zip(rankers, found, strict=True):
                    online = _Online(self, block, logged, ranker, responses, k)
                    for part in online.answers():
                        answers.append(part)
                        bar.update(len(part))
        return [
            Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in Answers.__dataclass_fields__))
            for parts in found
        ]

    def asks(self, time: np.ndarray) -> np.ndarray:
        """bool: `time` (seconds) lies in the test days."""
        return (time >= self.start) & (time < self.end)

    def _read_histories(self) -> dict[str, tuple[History, list[int]]]:
        """Per user of the test split: the history before the test days, and the times of the requests in them."""
        histories = {}
        for file in split_files(self.data, "test"):
            for row in pq.read_table(file, columns=["user_id", "target_start", *COLUMNS]).to_pylist():
                start = row["target_start"]
                times = sorted(set(row["timestamp"][start:]))
                histories[row["user_id"]] = {name: row[name][:start] for name in COLUMNS}, times
        return histories

    def _check_requests(self, world: str | Path) -> None:
        """The users of the world have the requests that the data say."""
        users = 0
        for block in log_blocks(self.world):
            schedule = block.schedule
            asked = self.asks(schedule.time) & (np.arange(schedule.time.shape[1]) < schedule.requests[:, None])
            for user in np.flatnonzero(asked.any(axis=1)).tolist():
                name = user_name(block, user)
                if self._histories.get(name, ({}, []))[1] != schedule.time[user, asked[user]].tolist():
                    raise ValueError(f"user {name} of {world} has other requests in {self.data}: prepare its log")
                users += 1
        if users < 2:
            raise ValueError(f"{users} users of {world} have requests in the test days: use a larger world")

    def history(self, block: Block, user: int) -> History:
        """A fresh copy of a user's history before the test days."""
        return {name: list(values) for name, values in self._histories[user_name(block, user)][0].items()}


def user_name(block: Block, user: int) -> str:
    """The id that the log gives to a block's user."""
    return f"u{block.number * USERS_A_BLOCK + user:07d}"


class _Online:
    """A `Policy` of the walk: the log's views before the test days, the retriever's within them."""

    def __init__(
        self,
        online: OnlineWorld,
        block: Block,
        logged: list[np.ndarray],
        ranker: Ranker,
        responses: ResponseModel,
        k: int,
    ) -> None:
        self.online, self.block, self.logged, self.k = online, block, logged, k
        self.ranker, self.responses = ranker, responses
        self.histories: dict[int, History] = {}
        self.number = -1
        self.users = np.zeros(0, np.int64)  # those who ask in this step

    def answers(self) -> Iterator[Answers]:
        several = np.array([[name in choice for name in OUTCOMES] for choice in CHOICES])
        for step in self.block.walk(self):
            users = self.users
            if not len(users):
                continue
            shown = step.rows[users] >= 0
            self._remember(users, step.requests[users], step.rows[users], step.choice[users])
            yield Answers(
                user=self.block.number * USERS_A_BLOCK + users,
                surface=step.requests.surface[users],
                impressions=shown.sum(axis=1),
                drawn=several[step.choice[users]].sum(axis=1),
                expected=(step.probability[users] * shown[:, :, None]).sum(axis=1),
            )

    def show(self, state: UserState, requests: Requests, rng: np.random.Generator) -> np.ndarray:
        self.number += 1
        rows = self.logged[self.number].copy()
        self.users = np.flatnonzero(self.online.asks(requests.time))
        if len(self.users):
            rows[self.users] = self._view(state[self.users], requests[self.users], rows.shape[1])
        return rows

    def _view(self, state: UserState, requests: Requests, width: int) -> np.ndarray:
        """World rows (n, width) of the retriever's candidates in the response model's order, -1 past the length."""
        asked = [self._request(user, requests, i) for i, user in enumerate(self.users.tolist())]
        name = str(getattr(self.ranker, "name", type(self.ranker).__name__))
        shape, items = (len(asked), self.k), len(self.online.catalogue)
        ranked = self.responses.best(asked, checked_ranking(self.ranker.rank(asked, self.k), shape, items, name))
        rows = np.where(ranked >= 0, self.online._world_rows[ranked], -1)
        # what no server would show, whatever a retriever says: gone, acted on, or the subject item itself
        shown = (rows >= 0) & (rows != requests.subject[:, None]) & ~state.acted.holds(rows.astype(np.int32))
        shown &= self.online.world.items.live(rows, requests.time[:, None])
        place = np.cumsum(shown, axis=1) - 1
        shown &= place < requests.length[:, None]
        view = np.full((len(rows), width), -1, np.int64)
        request, column = np.nonzero(shown)
        view[request, place[request, column]] = rows[request, column]
        return view

    def _request(self, user: int, requests: Requests, i: int) -> dict[str, Any]:
        if user not in self.histories:
            self.histories[user] = self.online.history(self.block, user)
        request: dict[str, Any] = {
            "user_id": user_name(self.block, user),
            "history": self.histories[user],
            "surface": SURFACES[requests.surface[i]],
            "timestamp": int(requests.time[i]),
        }
        if requests.query[i] >= 0:
            request["query"] = self.online._queries[requests.query[i]]
        if requests.subject[i] >= 0:
            request["context_item_id"] = self.online.world.item_ids[requests.subject[i]]
        return request

    def _remember(self, users: np.ndarray, requests: Requests, rows: np.ndarray, choice: np.ndarray) -> None:
        """Puts the views into the histories, as the log would have them."""
        ids = self.online.world.item_ids
        for i, user in enumerate(users.tolist()):
            history, asked = self.histories[user], self._request(user, requests, i)
            query = asked.get("query")
            events: list[tuple[Any, list[str]]] = [(None, [])] if query is not None else []
            events += [
                (ids[row], list(CHOICES[chosen]))
                for row, chosen in zip(rows[i].tolist(), choice[i].tolist(), strict=True)
                if row >= 0
            ]
            number = max(history["request_id"], default=-1) + 1
            for item, outcomes in events:
                values = (
                    item,
                    asked["surface"],
                    asked["timestamp"],
                    outcomes,
                    number,
                    query,
                    asked.get("context_item_id"),
                )
                for name, value in zip(COLUMNS, values, strict=True):
                    history[name].append(value)
