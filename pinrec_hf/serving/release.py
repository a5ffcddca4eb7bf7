"""Releases: model, tokenizer, catalogue and index of one folder, swapped as one and rolled back the same way."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.retrieval.encode import Generated
from pinrec_hf.retrieval.history_cache import HistoryCache
from pinrec_hf.retrieval.pretrained import best_device, find_folder
from pinrec_hf.retrieval.request import known_history
from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever
from pinrec_hf.serving.histories import StoredHistory
from pinrec_hf.serving.metrics import Metrics

log = logging.getLogger("pinrec.serve")

Request = dict[str, Any]
Answer = list[Candidate] | Exception


class MeasuredRetriever(PinRecRetriever):
    """Remembers what it generated last, and the seconds that generating has taken so far."""

    generating = 0.0
    generated: Sequence[Generated] = ()

    def generate(self, requests: Sequence[Mapping[str, Any]]) -> list[Generated]:
        start = time.perf_counter()
        generated = super().generate(requests)
        self.generating += time.perf_counter() - start
        self.generated = generated
        return generated


class Release:
    """One folder, loaded.

    Attributes:
        name: of the folder, a symbolic link resolved. served: bool a catalogue row, True once it was served.
        indexed_at: seconds since epoch, when its index was written.
    """

    def __init__(
        self, folder: Path, metrics: Metrics, adapters: Mapping[str, str], histories: HistoryCache | None
    ) -> None:
        self.name, self.metrics = folder.name, metrics
        self.retriever = MeasuredRetriever.from_pretrained(
            folder, device=best_device(), adapters=adapters, histories=histories
        )
        self.tokenizer = self.retriever.tokenizer
        self.indexed_at = (folder / "index.json").stat().st_mtime
        self.served = np.zeros(len(self.tokenizer.catalogue), bool)
        self.retriever.search([{"history": {}}], 1)  # the first call is slow: not a user's

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """For each request its candidates, or the error that is its own: a bad one does not spoil its neighbours."""
        answers: list[Answer] = [[] for _ in requests]
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request["k"], []).append(i)
        known = [self._known(request) for request in requests]
        for k, members in groups.items():
            for i, given in zip(members, self._answer([known[i] for i in members], k), strict=True):
                answers[i] = given
        self._measure(known, answers)
        return answers

    def _known(self, request: Request) -> Request:
        if not isinstance(request["history"], StoredHistory):
            return request
        return {**request, "history": known_history(request["history"], self.tokenizer)}

    def _answer(self, requests: list[Request], k: int) -> list[Answer]:
        try:
            start, before = time.perf_counter(), self.retriever.generating
            found = self.retriever.search(requests, min(k, max(1, len(self.retriever.index))))
            candidates: list[Answer] = list(self.retriever.candidates(found))
            generating = self.retriever.generating - before
            self.metrics.stages["encode"].observe(generating)
            self.metrics.stages["search"].observe(time.perf_counter() - start - generating)
            self._measure_generated(found.names, k)
            return candidates
        except Exception as error:
            if len(requests) == 1:
                return [error]
            half = len(requests) // 2
            return [*self._answer(requests[:half], k), *self._answer(requests[half:], k)]

    def _measure_generated(self, names: Sequence[str | None], k: int) -> None:
        for written in self.retriever.generated:
            for outcome, weight in zip(written.outcomes.tolist(), written.weights.tolist(), strict=True):
                self.metrics.asked.labels(names[outcome] or "any").inc(k * weight)
            self.metrics.norm.observe(written.norm(self.retriever.model.config.hidden_size))

    def _measure(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        metrics, items = self.metrics, []
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Exception):
                continue
            items += [item for item in request["history"].get("item_id") or () if item is not None]
            times = request["history"].get("timestamp") or ()
            newest = next((t for t in reversed(times) if t is not None), None)
            if newest is not None and request.get("timestamp") is not None:
                metrics.history_age.observe(max(0, request["timestamp"] - newest))
            for candidate in answer:
                metrics.delivered.labels(candidate.outcome or "any").inc()
            self.served[[candidate.row for candidate in answer]] = True
        if items:
            metrics.items.inc(len(items))
            metrics.unknown.inc(int((self.tokenizer.catalogue.rows(items) < 0).sum()))


class Releases:
    """The release that answers, and its successor.

    Args:
        name: a folder, best a symbolic link to one, or a Hub repo. adapters: of surfaces, likewise. `reload` looks
            again at what they name.
        computed: histories that were computed, shared by all releases; None = each request is computed whole.

    Raises:
        FileNotFoundError, ValueError: see `PinRecRetriever.from_pretrained`.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        metrics: Metrics,
        *,
        revision: str | None = None,
        adapters: Mapping[str, str] | None = None,
        computed: HistoryCache | None = None,
    ) -> None:
        self._name, self._revision, self._adapters, self._metrics = name, revision, adapters or {}, metrics
        self.computed = computed
        self._loading = threading.Lock()
        self.current = self._load()

    def _load(self) -> Release:
        release = Release(
            find_folder(self._name, self._revision).resolve(), self._metrics, self._adapters, self.computed
        )
        self._metrics.released(release)
        return release

    def answer(self, requests: Sequence[Request]) -> tuple[str, list[Answer]]:
        """The name of one release, and what it answers to all of these requests."""
        release = self.current
        return release.name, release.answer(requests)

    def reload(self) -> None:
        """Load what the name stands for now; the present release answers until that is whole, or if it is refused."""
        with self._loading:
            before = self.current.name
            try:
                self.current = self._load()
                self._metrics.releases.labels("loaded").inc()
                log.info("release loaded", extra={"fields": {"release": self.current.name, "before": before}})
            except Exception as error:  # whatever is wrong with the new one, the present one is whole
                self._metrics.releases.labels("refused").inc()
                log.error("release refused", extra={"fields": {"kept": before, "reason": str(error)}})
