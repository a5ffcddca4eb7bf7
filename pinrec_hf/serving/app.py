"""The HTTP application: routes, and what each error looks like from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import pinrec_hf
from pinrec_hf.retrieval.retriever import Candidate
from pinrec_hf.serving import schema
from pinrec_hf.serving.batching import Batcher, Overloaded
from pinrec_hf.serving.guard import Guard
from pinrec_hf.serving.histories import HistoryStore, HistoryUnavailable, to_columns
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.release import Releases

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Problem, "description": "no API key, or a wrong one"},
    413: {"model": schema.Problem, "description": "the body is too large"},
    422: {"model": schema.Problem, "description": "the message names the field and the remedy"},
    503: {"model": schema.Problem, "description": "overloaded, or no histories: see Retry-After"},
    504: {"model": schema.Problem, "description": "not answered within the deadline"},
}
LATER = {"Retry-After": "1"}


class App(FastAPI):
    """The application. `draining` = True makes it unready, while it still answers."""

    draining = False


def create_app(
    releases: Releases,
    metrics: Metrics,
    histories: HistoryStore | None = None,
    *,
    keys: frozenset[str] = frozenset(),
    max_batch: int = 32,
    max_wait: float = 0.002,
    max_pending: int = 96,
    deadline: float = 10.0,
) -> App:
    """The application around loaded releases.

    Args:
        histories: where `user_id` is looked up and events go; without it both are refused.
        keys, deadline: see `Guard`. max_batch, max_wait, max_pending: see `Batcher`.
    """
    batcher = Batcher(releases.answer, metrics, max_batch=max_batch, max_wait=max_wait, max_pending=max_pending)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()
        if histories is not None:
            histories.close()

    app = App(title="pinrec", version=pinrec_hf.__version__, lifespan=lifespan, responses=PROBLEMS)
    app.add_middleware(
        Guard, metrics=metrics, batcher=batcher, keys=keys, deadline=deadline, draining=lambda: app.draining
    )
    _explain_errors(app)

    def stored() -> HistoryStore:
        if histories is None:
            raise HTTPException(422, "this server stores no histories: send `history`, or start it with --histories")
        return histories

    async def answered(requests: Sequence[schema.RecommendRequest], one: bool = False) -> tuple[str, list[list[dict]]]:
        rows: list[dict[str, Any]] = []
        for request in requests:
            row = request.model_dump(exclude_unset=True) | {"k": request.k}
            if row.get("history") is None:
                user = row.get("user_id")
                row["history"] = {} if user is None else await asyncio.to_thread(stored().read, user)
            rows.append(row)
        release, answers = await batcher.submit(rows)
        for i, answer in enumerate(answers):
            if isinstance(answer, ValueError):
                raise HTTPException(422, str(answer) if one else f"requests[{i}]: {answer}")
            if isinstance(answer, Exception):
                raise answer
        return release, [list(map(_item, answer)) for answer in answers]

    @app.post("/v1/recommend", response_model=schema.Recommendation)
    async def recommend(request: schema.RecommendRequest) -> Response:
        """Recommend `k` items to one user."""
        release, (candidates,) = await answered([request], one=True)
        return _json({"release": release, "candidates": candidates})

    @app.post("/v1/recommend/batch", response_model=schema.BatchRecommendation)
    async def recommend_batch(batch: schema.BatchRequest) -> Response:
        """Recommend to several users, by one release; one bad request refuses them all."""
        release, results = await answered(batch.requests)
        return _json({"release": release, "results": results})

    @app.post("/v1/events", response_model=schema.Appended)
    async def append_events(body: schema.EventsRequest) -> Response:
        """Append events to users' histories. The answer comes once they are durable; the next request sees them."""
        store, events = stored(), [event.model_dump() for event in body.events]

        def append() -> int:
            try:
                releases.current.tokenizer.encode([to_columns([event]) for event in events], strict=True)
            except ValueError as error:
                raise HTTPException(422, f"events: {error}") from error
            return store.append(events)

        appended = await asyncio.to_thread(append)
        metrics.events.inc(appended)
        return _json({"appended": appended})

    @app.delete("/v1/users/{user_id:path}", response_model=schema.Deleted)
    async def delete_user(user_id: str) -> Response:
        """Remove every event of a user."""
        try:
            deleted = await asyncio.to_thread(stored().delete, user_id)
            if releases.computed is not None:
                await batcher.submit([])  # first in, first out: whoever read the history before has been answered then
        finally:
            if releases.computed is not None:
                releases.computed.forget(user_id)
        return _json({"deleted": deleted})

    @app.get("/healthz", response_model=schema.Status)
    async def healthz() -> Response:
        """The process lives."""
        return _json({"status": "ok"})

    @app.get("/readyz", response_model=schema.Status)
    async def readyz() -> Response:
        """New requests may be sent here."""
        if app.draining:
            return _json({"status": "draining"}, 503)
        return _json({"status": "ready", "release": releases.current.name})

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _item(candidate: Candidate) -> dict[str, Any]:
    return {
        "item_id": candidate.item_id,
        "score": candidate.score,
        "outcome": candidate.outcome,
        "step": candidate.step,
    }


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def _problem(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    # what a client sent may hold half a character, which is no UTF-8
    return _json({"error": message.encode("utf-8", "backslashreplace").decode()}, status, headers)


def _explain_errors(app: FastAPI) -> None:
    """Every error is `{"error": ...}`: never a trace, never what was sent."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return _problem("send JSON, with the header `content-type: application/json`", 422)
        first, more = error.errors()[0], len(error.errors()) - 1
        place = ".".join(map(str, first["loc"][1:])) or "the body"
        return _problem(f"{place}: {first['msg']}" + (f" (and {more} more)" if more else ""), 422)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _problem(str(error.detail), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return _problem("too many requests are waiting; ask again later", 503, LATER)

    @app.exception_handler(HistoryUnavailable)
    async def unavailable(_: Request, error: HistoryUnavailable) -> Response:
        return _problem("histories cannot be read or written now; ask again later", 503, LATER)
