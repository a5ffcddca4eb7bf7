"""The process: signals, the drain, and logs. SIGHUP = swap the release, SIGTERM or SIGINT = answer, then go."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pinrec_hf.serving.app import App
from pinrec_hf.serving.guard import JsonLines, log
from pinrec_hf.serving.release import Releases


def check_host(host: str, keys: frozenset[str]) -> None:
    """Refuse to be reached from other machines without API keys.

    Raises:
        ValueError: as said.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not keys:
        raise ValueError(f"--host {host} can be reached from other machines: give --api-key-file, or bind 127.0.0.1")


class Server(uvicorn.Server):
    """uvicorn that takes leave in three steps: unready, but answering; no new connections; gone.

    Args:
        drain: seconds of the first step, in which load balancers notice. A second signal cuts it short.
    """

    def __init__(self, app: App, releases: Releases, *, host: str, port: int, drain: float) -> None:
        # load balancers keep idle connections for a minute: the side that closes first must not be this one
        config = uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, timeout_keep_alive=75)
        super().__init__(config)
        self.app, self.releases, self.drain = app, releases, drain

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, loop)
        loop.add_signal_handler(signal.SIGHUP, self._swap)
        yield

    def _swap(self) -> None:  # a thread of its own: loading takes seconds, and the present release answers meanwhile
        threading.Thread(target=self.releases.reload, daemon=True).start()

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.app.draining:
            self.should_exit = True
            return
        log.info("draining", extra={"fields": {"seconds": self.drain}})
        self.app.draining = True
        loop.call_later(self.drain, setattr, self, "should_exit", True)


def log_as_json() -> None:
    """Everything that the process logs goes to stderr, an object a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def serve(app: App, releases: Releases, **options: Any) -> None:
    """Serve until a signal ends it; options as for `Server`."""
    gc.collect()
    gc.freeze()  # of what is loaded nothing is garbage, and looking it through stops the event loop for 0.3 s
    Server(app, releases, **options).run()
