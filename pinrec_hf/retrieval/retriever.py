"""`PinRecRetriever`: requests to candidates.

    request -> embeddings, of each outcome in its budget at each step -> similar ones merged -> each its own search of
            the index -> lists take turns for the k slots, each outcome its share -> candidates

A global top k over the lists would favour one outcome (Multi-Embedding Retrieval, arXiv 2506.23060).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.eligible import Eligibility
from pinrec_hf.retrieval.encode import (
    Generated,
    encode_items,
    encoder_fingerprint,
    generate_requests,
    reading_fingerprint,
)
from pinrec_hf.retrieval.history_cache import HistoryCache
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.item_table import ItemTable
from pinrec_hf.retrieval.merge import allocate_slots, merge_similar, round_robin
from pinrec_hf.retrieval.pretrained import check_belongs, find_folder, load_pretrained
from pinrec_hf.retrieval.request import check_fields, list_each, one_each, readable

SIMILAR = 0.9
"""Embeddings of one request and outcome with a higher cosine than this are one (PinRec v4, section 3.4)."""

REQUESTS_AT_ONCE = 512
MOST = 1_000_000  # items or steps
Request = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """An item for a slot.

    Attributes:
        item_id: its id. row: its catalogue row.
        score: inner product of the embedding that brought it and the item's; comparable within one outcome.
        outcome: the outcome that brought it, None = unspecified. step: the generation step, from 1.
        columns: its display columns, as far as they were asked for.
    """

    item_id: str | int
    row: int
    score: float
    outcome: str | None
    step: int = 1
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> Any:
        """The column `title`; None if there is none, or it was not asked for."""
        return self.columns.get("title")


@dataclass(frozen=True)
class Retrieved:
    """Candidates of many requests as arrays `(requests, k)`, best first.

    Attributes:
        rows: int64 catalogue rows, -1 where fewer than k items remain. scores: float32, -inf there.
        outcomes: int64, which of `names` brought it, -1 there. names: outcomes, None = unspecified.
        steps: int64, the step that brought it, from 1, -1 there.
        norms: float64 `(requests,)`, mean length of what was searched for, see `Generated.norm`; empty if unknown.
    """

    rows: np.ndarray
    scores: np.ndarray
    outcomes: np.ndarray
    steps: np.ndarray
    names: list[str | None]
    norms: np.ndarray = field(default_factory=lambda: np.zeros(0))


class PinRecRetriever:
    """Recommends items of an index to users. Make one with `from_pretrained` or `build`.

    Args:
        model, tokenizer: of one pretraining.
        index: of this model's items.
        items (*optional*): display and filter columns.
        num_steps: steps to generate for requests that do not say.
        similar: cosine above which embeddings of one request and outcome are one.
        histories: what was computed of users' histories, for requests with a `user_id` (`search`, `rank`).

    Raises:
        ValueError: they do not belong together.
    """

    def __init__(
        self,
        model: PinRecModel,
        tokenizer: PinRecTokenizer,
        index: ItemIndex,
        items: ItemTable | None = None,
        num_steps: int = 1,
        similar: float = SIMILAR,
        histories: HistoryCache | None = None,
    ) -> None:
        check_belongs(model, tokenizer)
        made_by = index.encoder_fingerprint, index.catalogue_fingerprint
        if made_by != (encoder_fingerprint(model), tokenizer.catalogue.fingerprint):
            raise ValueError(
                "the index was made by another model or catalogue; make it again with `pinrec index` or "
                "PinRecRetriever.build"
            )
        self.model, self.tokenizer, self.index, self.items = model.eval(), tokenizer, index, items
        self.num_steps, self.similar, self.histories = num_steps, similar, histories
        self._fingerprint = "" if histories is None else reading_fingerprint(model, tokenizer)
        self._items_to_feed: tuple[int, torch.Tensor] | None = None  # of an index of so many rows
        self._eligibility = Eligibility(tokenizer.catalogue, items)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        histories: HistoryCache | None = None,
    ) -> Self:
        """Load model, tokenizer, index and item columns, which are released together.

        Args:
            name: a folder, or a repo on the Hub. revision: of the repo.
            device: where the model runs; the CPU by default.
            adapters: of surfaces, `{"search": "pinrec-base/adapters/search"}`: their requests are answered by them, in
                one pass with those of other surfaces, which the base answers; see `load_surface_adapters`.
            histories: see the class.

        Raises:
            FileNotFoundError: no such folder or repo, or it has no index yet.
            ValueError: something in it is foreign, truncated, or does not belong to the rest.
        """
        folder = find_folder(name, revision)
        model, tokenizer = load_pretrained(folder, device=device, adapters=adapters)
        index = ItemIndex.load(
            folder,
            encoder_fingerprint=encoder_fingerprint(model),
            catalogue_fingerprint=tokenizer.catalogue.fingerprint,
        )
        path = folder / "items.parquet"
        items = ItemTable(path, tokenizer.catalogue) if path.exists() else None
        return cls(model, tokenizer, index, items, histories=histories)

    @classmethod
    def build(
        cls,
        model: PinRecModel,
        tokenizer: PinRecTokenizer,
        items: ItemTable | None = None,
        *,
        kind: str | None = None,
    ) -> PinRecRetriever:
        """Embed the catalogue and index it in memory; `kind` as in `ItemIndex.build`."""
        check_belongs(model, tokenizer)
        index = ItemIndex.build(
            encode_items(model, tokenizer),
            encoder_fingerprint=encoder_fingerprint(model),
            catalogue_fingerprint=tokenizer.catalogue.fingerprint,
            kind=kind,
        )
        return cls(model, tokenizer, index, items)

    def recommend(
        self,
        histories: Sequence[Mapping[str, Sequence]] | Mapping[str, Sequence],
        *,
        surface: str | Sequence[str | None] | None = None,
        timestamp: int | Sequence[int | None] | None = None,
        query: str | Sequence[str | None] | None = None,
        query_embedding: Any = None,
        context_item_id: Any = None,
        request_features: Sequence[Any] | None = None,
        outcome_budget: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        num_steps: int | None = None,
        k: int = 100,
        exclude: Sequence[Any] | None = None,
        filters: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        columns: Sequence[str] = (),
    ) -> list[list[Candidate]]:
        """Recommend k items to each user: new to them, live at the request's time, and passing its filters.

        Every argument but `histories`, `num_steps`, `k` and `columns` is one for all requests, or a list of one each.

        Args:
            histories: a dict of columns a user (`item_id`, `surface`, `timestamp`, `outcomes`, ...), oldest event
                first; `{}` is a user without any.
            surface, query, context_item_id: where and about what the request is. None = unknown.
            timestamp: of the request, seconds since epoch, UTC; None = unknown.
            query_embedding: floats `(query_size,)`, of a query whose vector the model does not have.
            request_features: strings such as `device=ios`, for a model that reads them.
            outcome_budget: shares of the k slots, `{"save": 0.7, "click": 0.3}`; by default what the model's config
                says of the surface, else an unspecified outcome gets them all.
            num_steps: events ahead that are generated; the retriever's own number by default.
            k: items a request; fewer come only where fewer exist.
            exclude: item ids not to be recommended, besides those acted on in the history and the subject item;
                ids that the catalogue lacks do no harm.
            filters: `{column: value or list of values}` over the columns of `items`.
            columns: of `items`, to be put into each candidate, such as `["title"]`.

        Raises:
            ValueError: k below 1, an unknown name, a budget that divides nothing, lists of another length than
                `histories`, filters or columns that `items` lacks, no step or more than the model has positions for.
        """
        k = _checked("k", k)
        histories = [histories] if isinstance(histories, Mapping) else list(histories)
        for name, value in (("exclude", exclude), ("request_features", request_features)):
            if isinstance(value, str | int):
                raise ValueError(f"{name} is {value!r}; give a list")
        fields: dict[str, list[Any]] = {
            "surface": one_each("surface", surface, len(histories)),
            "timestamp": one_each("timestamp", timestamp, len(histories)),
            "query": one_each("query", query, len(histories)),
            "context_item_id": one_each("context_item_id", context_item_id, len(histories)),
            "outcome_budget": one_each("outcome_budget", outcome_budget, len(histories)),
            "filters": one_each("filters", filters, len(histories)),
            "exclude": list_each("exclude", exclude, len(histories)),
            "query_embedding": list_each("query_embedding", query_embedding, len(histories)),
            "request_features": list_each("request_features", request_features, len(histories)),
        }
        requests = [
            {"history": history, "num_steps": num_steps, **{name: values[i] for name, values in fields.items()}}
            for i, history in enumerate(histories)
        ]
        return self.candidates(self.search(requests, k), columns)

    def search(self, requests: Sequence[Request], k: int) -> Retrieved:
        """As `recommend`, for dicts of the request schema (their own `k` is not read), as arrays.

        Raises:
            ValueError: as `recommend`.
        """
        k = _checked("k", k)
        check_fields(requests)
        depth = min(k, max(1, len(self.index)))
        rows = np.full((len(requests), k), -1, np.int64)
        scores = np.full((len(requests), k), -np.inf, np.float32)
        outcomes, steps = np.full((2, len(requests), k), -1, np.int64)
        norms = np.zeros(len(requests))
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            part = requests[start : start + REQUESTS_AT_ONCE]
            for i, (found, found_scores, by) in enumerate(self.lists(part, depth, self.similar), start=start):
                slots = allocate_slots(by.weights, depth, by.outcomes)
                merged = round_robin(found, found_scores, slots, depth, by.outcomes)
                rows[i, :depth], scores[i, :depth], source = merged
                outcomes[i, :depth] = np.where(source >= 0, by.outcomes[source], -1)
                steps[i, :depth] = np.where(source >= 0, by.steps[source], -1)
                norms[i] = by.norm(self.model.config.hidden_size)
        return Retrieved(rows, scores, outcomes, steps, [None, *self.model.config.outcomes], norms)

    def rank(self, requests: Sequence[Request], k: int) -> np.ndarray:
        """Catalogue rows int64 `(requests, k)`, -1 where fewer remain: what `evaluate` asks of a ranker; of requests as
        the model can read them (`readable`)."""
        return self.search(readable(requests, self.tokenizer), k).rows

    def rank_each(self, requests: Sequence[Request], k: int) -> np.ndarray:
        """The list of each embedding on its own, int64 `(requests, embeddings, k)`, for unordered recall.

        Similar ones are not merged. There are as many embeddings as positive outcomes, steps and time offsets, or as
        many as a request asks for by itself, if that is more; where a request has fewer, the rest is -1.
        """
        config = self.model.config
        most = max(1, len(config.positive_outcomes)) * max(1, len(config.time_offsets)) * self.num_steps
        lists: list[np.ndarray] = []
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            part = readable(requests[start : start + REQUESTS_AT_ONCE], self.tokenizer)
            lists += [found for found, _, _ in self.lists(part, k, np.inf)]
        rows = np.full((len(lists), max([most, *map(len, lists)]), k), -1, np.int64)
        for i, found in enumerate(lists):
            rows[i, : len(found), : found.shape[1]] = found
        return rows

    def candidates(self, retrieved: Retrieved, columns: Sequence[str] = ()) -> list[list[Candidate]]:
        """`Candidate`s of what `search` found, a list a request, with the `columns` asked for.

        Raises:
            ValueError: a column that the items lack.
        """
        there = retrieved.rows >= 0
        rows = retrieved.rows[there]
        if columns and self.items is None:
            raise ValueError(f"columns {list(columns)}: items.parquet is missing from the model's folder")
        shown = {name: self.items.values(name, rows) for name in columns if self.items is not None}
        flat = [
            Candidate(item_id, row, score, retrieved.names[outcome], step, {name: shown[name][i] for name in shown})
            for i, (item_id, row, score, outcome, step) in enumerate(
                zip(
                    self.tokenizer.catalogue.ids(rows),
                    rows.tolist(),
                    retrieved.scores[there].tolist(),
                    retrieved.outcomes[there].tolist(),
                    retrieved.steps[there].tolist(),
                    strict=True,
                )
            )
        ]
        ends = np.cumsum(there.sum(axis=1)).tolist()
        return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """The embeddings of each request, with outcome, step and weight; between steps the nearest item that it might
        be given is fed back.

        Raises:
            ValueError: an unknown name, a budget that divides nothing, a number of steps that does not fit.
        """
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            steps = request.get("num_steps")
            groups.setdefault(_checked("num_steps", self.num_steps if steps is None else steps), []).append(i)
        generated: dict[int, Generated] = {}
        for steps, members in groups.items():
            some = [requests[i] for i in members]
            feedback: dict[str, Any] = {}
            if steps != 1:
                feedback = {"item_embeddings": self._item_embeddings(), "item_masks": self._item_masks}
            found = generate_requests(
                self.model, self.tokenizer, some, num_steps=steps, **feedback,
                histories=self.histories, fingerprint=self._fingerprint,
            )  # fmt: skip
            generated.update(zip(members, found, strict=True))
        return [generated[i] for i in range(len(requests))]

    def _item_embeddings(self) -> torch.Tensor:
        if self._items_to_feed is None or self._items_to_feed[0] != len(self.index.rows):
            embeddings = torch.zeros(len(self.tokenizer.catalogue), self.index.dimension)
            known = torch.tensor(self.index.catalogue_embeddings())
            embeddings[: len(known)] = known
            self._items_to_feed = len(self.index.rows), embeddings.to(self.model.device)
        return self._items_to_feed[1]

    def _item_masks(self, requests: Sequence[Request]) -> np.ndarray:
        return self._eligibility.masks(requests, self.index.rows[self.index.live.places])

    def lists(
        self, requests: Sequence[Request], k: int, similar: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Generated]]:
        """For each request its embeddings' ranked lists, rows and scores `(embeddings, <= k)`, and what wrote them.

        Embeddings of one outcome with a higher cosine than `similar` are one.
        """
        written = []
        for by in self.generate(requests):
            # the last dimensions of a dot product's embedding are what meets the item's biases
            directions = by.embeddings[:, : self.model.config.hidden_size]
            kept, weights = merge_similar(directions, by.weights, by.outcomes, similar)
            parts = {name: getattr(by, name)[kept] for name in ("embeddings", "outcomes", "steps", "offsets")}
            written.append(Generated(**parts, weights=weights, fed_rows=by.fed_rows))
        excluded = self._eligibility.excluded_rows(requests)
        groups: dict[str, list[int]] = {}
        keys = [self._eligibility.key(request) for request in requests]
        for i, key in enumerate(keys):
            groups.setdefault(repr(key), []).append(i)
        depth = max(1, min(k, len(self.index)))  # of each list: other lists may take what it has first
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for members in groups.values():
            counts = [len(written[i].weights) for i in members]
            scores, rows = self.index.search(
                np.concatenate([written[i].embeddings for i in members]),
                depth,
                allowed=self._eligibility.mask(keys[members[0]]),
                excluded_rows=[excluded[i] for i, count in zip(members, counts, strict=True) for _ in range(count)],
            )
            ends = np.cumsum(counts)
            for i, start, end in zip(members, ends - counts, ends, strict=True):
                found[i] = rows[start:end], scores[start:end]
        for i in range(len(requests)):
            yield *found[i], written[i]


def _checked(name: str, count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= MOST:
        raise ValueError(f"{name} is {count!r}; ask for a whole number, at least 1 and at most {MOST:,}")
    return int(count)
