"""Servers on loopback, spoken to over real HTTP, and the offline answers that they must give."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(app):
    """`served(app)`: a client of the app, which a uvicorn in another thread serves."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=limits) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process(*arguments):
    """`pinrec serve --model MODEL ...` of its own, and a client; its log lies in `MODEL.log`."""
    port = free_port()
    command = [sys.executable, "-m", "pinrec_hf", "serve", "--port", str(port), *map(str, arguments)]
    log = open(f"{arguments[1]}.log", "w+")  # noqa: SIM115 - closed below; beside the model
    server = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            for _ in range(1_200):
                try:
                    client.get("/readyz")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, Path(log.name).read_text()
                    time.sleep(0.05)
            yield server, client
    finally:
        server.kill()
        server.wait()
        log.close()


def offline(retriever, request):
    """What `PinRecRetriever` answers to a request, as the server writes it."""
    fields = {name: value for name, value in request.items() if name not in ("history", "user_id")}
    (candidates,) = retriever.recommend([request.get("history") or {}], **fields)
    return [(c.item_id, c.outcome, c.step, pytest.approx(c.score, rel=1e-5, abs=1e-4)) for c in candidates]


def told(candidates):
    return [(c["item_id"], c["outcome"], c["step"], c["score"]) for c in candidates]
