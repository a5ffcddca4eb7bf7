"""Dynamic batching: requests that wait at the same time are answered together, by one thread."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pinrec_hf.serving.metrics import Metrics


class Overloaded(Exception):
    """As many requests wait as may; ask again later."""


@dataclass
class _Job:
    """The requests of one HTTP call, which are never split, and the future of their answers."""

    requests: Sequence[Any]
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Collects jobs until a batch is full or the first has waited long enough.

    Args:
        answer: requests to whatever their callers get, one release for all: `(release name, answers)`.
        max_batch: requests in a batch; a job of several may exceed it.
        max_wait: seconds that the first job waits for others, if the last batch had several: where calls come one by
            one, waiting gains nothing. While a batch runs, the next gathers anyway.
        max_pending: requests that wait or run; more are refused at once.
    """

    def __init__(
        self,
        answer: Callable[[list[Any]], tuple[str, list[Any]]],
        metrics: Metrics,
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
        max_pending: int = 96,
    ) -> None:
        self._answer, self._metrics = answer, metrics
        self.max_batch, self.max_wait, self.max_pending = max_batch, max_wait, max_pending
        self.pending = 0  # touched by the event loop's thread alone
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pinrec-batches", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        return self.pending >= self.max_pending

    async def submit(self, requests: Sequence[Any]) -> tuple[str, list[Any]]:
        """Name of the release that answered, and the answers in the requests' order.

        Raises:
            Overloaded: at once, if too many are pending.
        """
        if self.pending and self.pending + len(requests) > self.max_pending:
            raise Overloaded
        loop = asyncio.get_running_loop()
        job = _Job(requests, loop.create_future(), loop)
        self._count(len(requests))
        self._jobs.put(job)
        return await job.future

    def close(self) -> None:
        """Answer what waits, then stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _count(self, change: int) -> None:
        self.pending += change
        self._metrics.pending.set(self.pending)

    def _work(self) -> None:
        jobs: list[_Job] = []
        while (first := self._jobs.get()) is not None:
            until = time.perf_counter() + (self.max_wait if len(jobs) > 1 else 0)
            jobs, size = [first], len(first.requests)
            last = False
            while size < self.max_batch and not last:
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.perf_counter()))
                except queue.Empty:
                    break
                if job is None:
                    last = True
                else:
                    jobs.append(job)
                    size += len(job.requests)
            self._run(jobs)
            if last:
                return

    def _run(self, jobs: list[_Job]) -> None:
        now = time.perf_counter()
        live = [job for job in jobs if not job.future.cancelled()]  # nobody waits for the others any more
        release, error = "", None
        answers: list[Any] = []
        if live:
            requests = [request for job in live for request in job.requests]
            self._metrics.batch_size.observe(len(requests))
            for job in live:
                self._metrics.stages["queue"].observe(now - job.since)
            try:
                release, answers = self._answer(requests)
            except Exception as raised:
                error = raised
        results = iter(answers)
        for job in jobs:
            given: Any = error
            if error is None and job in live:
                given = release, [next(results) for _ in job.requests]
            job.loop.call_soon_threadsafe(self._finish, job, given)

    def _finish(self, job: _Job, given: Any) -> None:
        self._count(-len(job.requests))
        if job.future.done():
            return
        if isinstance(given, Exception):
            job.future.set_exception(given)
        else:
            job.future.set_result(given)
