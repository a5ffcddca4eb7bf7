"""What `/metrics` says (Prometheus): how fast, how full, how fresh, and whether budgets were delivered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

if TYPE_CHECKING:
    from pinrec_hf.serving.release import Release

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
HOUR, DAY = 3_600, 86_400


class Metrics:
    """The server's figures, in a registry of their own. Nothing in them grows with users or items."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        new: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("pinrec_http_responses", "answers by route and status", ["route", "status"], **new)
        self.latency = Histogram("pinrec_http_seconds", "time in the server", ["route"], buckets=SECONDS, **new)
        stage = Histogram("pinrec_stage_seconds", "queue of calls, work of batches", ["stage"], buckets=SECONDS, **new)
        self.stages = {name: stage.labels(name) for name in ("queue", "encode", "search")}
        self.batch_size = Histogram("pinrec_batch_size", "requests in a batch", buckets=SIZES, **new)
        self.pending = Gauge("pinrec_pending_requests", "requests that wait or run", **new)
        self.events = Counter("pinrec_events_appended", "new events stored", **new)
        self.items = Counter("pinrec_history_items", "items in the histories of requests", **new)
        self.unknown = Counter("pinrec_unknown_history_items", "those of them that the catalogue lacks", **new)
        self.history_age = Histogram(
            "pinrec_history_age_seconds",
            "request's time less its last event's",
            buckets=(60, HOUR, 6 * HOUR, DAY, 7 * DAY, 28 * DAY, 365 * DAY),
            **new,
        )
        self.asked = Counter("pinrec_slots_asked", "slots by the budget", ["outcome"], **new)
        self.delivered = Counter("pinrec_slots_delivered", "items by the outcome that brought them", ["outcome"], **new)
        self.norm = Summary("pinrec_user_embedding_norm", "length of user embeddings", **new)
        self.norm_at_training = Gauge(
            "pinrec_user_embedding_norm_at_training", "on validation, by the model's record; NaN without", **new
        )
        self.releases = Counter("pinrec_release_loads", "releases loaded, refused", ["result"], **new)
        self.release = Gauge("pinrec_release_loaded_seconds", "when it was loaded (epoch)", ["release"], **new)
        self.index_age = Gauge("pinrec_index_age_seconds", "since the index was written", **new)
        self.catalogue = Gauge("pinrec_catalogue_items", "items of the release's catalogue", **new)
        self.coverage = Gauge("pinrec_distinct_items_served", "distinct items since the release was loaded", **new)

    def released(self, release: Release) -> None:
        """From now on the figures of a release are this one's."""
        self.release.clear()
        self.release.labels(release.name).set(time.time())
        self.catalogue.set(len(release.served))
        at_training = release.retriever.model.config.embedding_norm
        self.norm_at_training.set(float("nan") if at_training is None else at_training)
        self.index_age.set_function(lambda: time.time() - release.indexed_at)
        self.coverage.set_function(lambda: float(np.count_nonzero(release.served)))

    def text(self) -> bytes:
        return generate_latest(self.registry)
