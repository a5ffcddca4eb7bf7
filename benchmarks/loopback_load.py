"""A load generator of few instructions, so that it takes little of the machine from the server it measures."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson


@dataclass
class Tally:
    """What clients saw. Latencies in seconds; `lost` counts requests without an answer.

    `check` gets each answer when it comes, with its request's number: minutes of answers do not fit into memory.
    """

    check: Callable[[int, dict], None]
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    lost: int = 0
    failed: int = 0


class Connection:
    """One keep-alive HTTP/1.1 connection."""

    def __init__(self, port: int) -> None:
        self.port, self.streams, self.closing = port, None, False

    async def post(self, route: str, body: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
        content = await reader.readexactly(length)
        self.closing = b"connection: close" in answer
        if self.closing:
            self.close()
        return int(answer.split(b" ")[1]), content

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def ask(connection: Connection, tally: Tally, number: int, body: bytes) -> None:
    start = time.perf_counter()
    try:
        status, content = await connection.post("/v1/recommend", body)
    except (OSError, EOFError):
        tally.lost += 1
        connection.close()
        connection.closing = True
        return
    seconds = time.perf_counter() - start
    if status == 200:
        tally.latencies.append(seconds)
        tally.check(number, orjson.loads(content))
    elif status == 503:
        tally.refusals.append(seconds)
    else:
        tally.failed += 1


async def closed_loop(
    port: int, bodies: list[bytes], clients: int, seconds: float, check: Callable[[int, dict], None]
) -> Tally:
    """Each client asks again when it was answered, until time is over or the server closes its connection."""
    tally, until = Tally(check), time.perf_counter() + seconds

    async def client(first: int) -> None:
        connection, number = Connection(port), first
        while time.perf_counter() < until and not connection.closing:
            await ask(connection, tally, number % len(bodies), bodies[number % len(bodies)])
            number += clients
        connection.close()

    await asyncio.gather(*map(client, range(clients)))
    return tally


async def open_loop(
    port: int, bodies: list[bytes], rate: float, seconds: float, check: Callable[[int, dict], None]
) -> Tally:
    """Requests come at a rate, whatever the server does with them."""
    tally, idle, tasks = Tally(check), [], set()
    start = time.perf_counter()

    async def one(number: int) -> None:
        connection = idle.pop() if idle else Connection(port)
        await ask(connection, tally, number % len(bodies), bodies[number % len(bodies)])
        if not connection.closing:
            idle.append(connection)

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        tasks.add(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return tally


async def append_until_killed(port: int, client: int, kill: Callable[[], None] | None, seconds: float) -> int:
    """Appends events one after another; returns how many were acknowledged when the server was gone."""
    connection, acknowledged, start = Connection(port), 0, time.perf_counter()
    with contextlib.suppress(OSError, EOFError):
        while True:
            if kill is not None and time.perf_counter() - start > seconds:
                kill()
                kill = None
            event = {"user_id": f"killed-{client}", "item_id": "item-1", "timestamp": acknowledged}
            status, _ = await connection.post("/v1/events", orjson.dumps({"events": [event]}))
            if status == 200:
                acknowledged += 1
    return acknowledged
