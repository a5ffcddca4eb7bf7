"""Calls that no client should make, against a server: by schemathesis from its OpenAPI document, and broken bodies."""

import asyncio
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from loopback_load import Connection

CASES, MALFORMED, SECONDS = 10_000, 1_000, 20
OPERATIONS = 3  # that schemathesis varies: those that take a body; the others have a case or two
TESTED = re.compile(r"([\d,]+) generated")


def hostile(port: int, bodies: list[bytes]) -> dict[str, Any]:
    """Cases, their 5xx (as the server counts them) and calls without an answer in `SECONDS`."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{port}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "fuzzing", "--mode", "all", "--seed", "0"]
    command += ["--max-examples", str(-(-CASES // OPERATIONS)), "--no-color", "--request-timeout", str(SECONDS)]
    run = subprocess.run([*command, "--suppress-health-check", "all"], capture_output=True, text=True)
    if (tested := TESTED.search(run.stdout)) is None:
        raise RuntimeError(f"schemathesis tells no number of cases:\n{run.stdout[-2_000:]}{run.stderr[-2_000:]}")
    statuses = asyncio.run(send_malformed(port, bodies))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    answers: dict[str, int] = {}
    for status, count in re.findall(r'pinrec_http_responses_total\{.*status="(\d+)"\} (\S+)', text):
        answers[status] = answers.get(status, 0) + int(float(count))
    return {
        "cases": int(tested[1].replace(",", "")),
        "schemathesis_exit_code": run.returncode,
        "malformed": len(statuses),
        "5xx": sum(count for status, count in answers.items() if status[0] == "5"),
        "hung": statuses.count(None) + answers.get("0", 0),
        "answers": dict(sorted(answers.items())),
    }


async def send_malformed(port: int, bodies: list[bytes]) -> list[int | None]:
    """Status of `MALFORMED` bodies, None without an answer: bytes of right ones cut, changed, doubled, or noise."""
    rng = np.random.default_rng(0)
    statuses: list[int | None] = []
    for number in range(MALFORMED):
        body = bytearray(bodies[number % len(bodies)])
        kind, place = number % 4, int(rng.integers(len(body)))
        if kind == 0:
            del body[place:]
        elif kind == 1:
            for at in rng.integers(len(body), size=3):
                body[at] = int(rng.integers(256))
        elif kind == 2:
            body[place:place] = body[place : place + 40]
        else:
            body = bytearray(rng.bytes(place))
        route = ("/v1/recommend", "/v1/recommend/batch", "/v1/events")[number % 3]
        connection = Connection(port)
        try:
            async with asyncio.timeout(SECONDS):
                statuses.append((await connection.post(route, bytes(body)))[0])
        except TimeoutError:
            statuses.append(None)
        finally:
            connection.close()
    return statuses
