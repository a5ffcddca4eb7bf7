"""What every call passes first: key, size, room, deadline; and what is logged and counted of it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from pinrec_hf.serving.batching import Batcher
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.schema import MAX_BODY

log = logging.getLogger("pinrec.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/healthz", "/readyz")
SHORTEST_KEY = 16


class JsonLines(logging.Formatter):
    """A record a line: time, level, message, and the fields that were given; never a request's content."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1]:
            line |= where(record.exc_info[1])
        return json.dumps(line, default=str)


def where(error: BaseException) -> dict[str, Any]:
    """Kind and place of an error, without its message, which may quote a history."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return {"error": type(error).__name__, "at": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]}


def read_keys(path: str) -> frozenset[str]:
    """Digests of the API keys in a file, a key a line; blank lines and `#` comments are left out.

    Raises:
        OSError: no such file. ValueError: no key in it, or one that is easily guessed.
    """
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or min(map(len, keys)) < SHORTEST_KEY:
        raise ValueError(f"{path} must hold API keys of at least {SHORTEST_KEY} characters, one a line")
    return frozenset(sha256(key.encode()).hexdigest() for key in keys)


class Guard:
    """ASGI middleware around the whole app.

    Args:
        keys: digests of the API keys; empty = none is asked for.
        deadline: seconds in which a call must be answered, its body read and its turn in the queue included.
        draining: whether the server takes leave: answers then close their connection.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        metrics: Metrics,
        batcher: Batcher,
        keys: frozenset[str],
        deadline: float,
        draining: Callable[[], bool],
    ) -> None:
        self.app, self.metrics, self.batcher = app, metrics, batcher
        self.keys, self.deadline, self.draining = keys, deadline, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.draining():
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        fields: dict[str, Any] = {}
        try:
            if refusal := self._refusal(scope):
                return await _answer(sending, *refusal)
            async with asyncio.timeout(self.deadline):
                await self.app(scope, _limited(receive), sending)
        except TimeoutError:
            if not status:
                await _answer(sending, 504, "not answered within the deadline; ask again later", 1)
        except Exception as error:
            fields = where(error)
            if not status:
                await _answer(sending, 500, "internal error; it is in the server's log")
        finally:
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.perf_counter() - start
            self.metrics.answers.labels(route, status).inc()
            self.metrics.latency.labels(route).observe(seconds)
            fields |= {"method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
            log.log(logging.ERROR if status == 500 else logging.INFO, "answered", extra={"fields": fields})

    def _refusal(self, scope: Scope) -> tuple[Any, ...] | None:
        """Status, message and seconds to wait, of a call that is not even read."""
        headers = dict(scope["headers"])
        if self.keys and scope["path"] not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or sha256(key.strip()).hexdigest() not in self.keys:
                return 401, "give an API key: `Authorization: Bearer KEY`"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return 413, f"the body is larger than {MAX_BODY} bytes; send less"
        if scope["path"].startswith("/v1/recommend") and self.batcher.full:
            return 503, "too many requests are waiting; ask again later", 1
        return None


def _limited(receive: Receive) -> Receive:
    """Stops a body that says no length, or lies about it, at the limit."""
    size = 0

    async def counting() -> MutableMapping[str, Any]:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes; send less")
        return message

    return counting


async def _answer(send: Send, status: int, problem: str, retry_after: int | None = None) -> None:
    body = json.dumps({"error": problem}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
