"""The process `pinrec serve`: signals under load, a kill between two events, and what it writes down."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from loopback import offline, process, told

from pinrec_hf import PinRecRetriever
from pinrec_hf.cli import main
from pinrec_hf.serving.histories import SQLiteHistories
from pinrec_hf.serving.server import check_host

NOW = 1_700_006_400 + 7 * 86_400


class Load:
    """Clients that ask until an answer closes their connection: then they go to another replica."""

    def __init__(self, url, body, clients=8):
        self.url, self.body, self.answers, self.lost = url, body, [], []
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self):
        with httpx.Client(base_url=self.url, timeout=20) as client:
            while True:
                try:
                    answer = client.post("/v1/recommend", json=self.body)
                except httpx.HTTPError as error:
                    self.lost.append(error)
                    return
                self.answers.append((answer.status_code, answer.json()))
                if answer.headers.get("connection") == "close":
                    return

    def join(self):
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_swap_and_a_leave_under_load(saved_model, other_model, tmp_path):
    body = {"surface": "homefeed", "timestamp": NOW, "k": 20, "user_id": "a-user-of-ours"}
    right = {
        folder.name: offline(PinRecRetriever.from_pretrained(folder), body) for folder in (saved_model, other_model)
    }
    current = tmp_path / "current"
    current.symlink_to(saved_model)
    with process("--model", current, "--histories", tmp_path / "events.sqlite", "--drain", 1) as (server, client):
        assert client.get("/readyz").json() == {"status": "ready", "release": saved_model.name}
        load = Load(str(client.base_url), body)
        time.sleep(0.5)
        (tmp_path / "next").symlink_to(other_model)
        (tmp_path / "next").rename(current)
        server.send_signal(signal.SIGHUP)
        while client.get("/readyz").json()["release"] != other_model.name:
            time.sleep(0.02)
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with httpx.Client(base_url=client.base_url) as late:  # a load balancer that asks in the meantime
            assert late.get("/readyz").status_code == 503
            assert late.get("/healthz").status_code == 200
            late.post("/v1/recommend", json=body).raise_for_status()
        load.join()
        assert server.wait(20) == 0
    assert load.lost == []
    assert len(load.answers) > 16
    assert {answer["release"] for _, answer in load.answers} == set(right)
    for status, answer in load.answers:
        assert status == 200
        assert told(answer["candidates"]) == right[answer["release"]]

    lines = [json.loads(line) for line in (tmp_path / "current.log").read_text().splitlines()]
    answered = [line for line in lines if line["message"] == "answered" and line["route"] == "/v1/recommend"]
    assert len(answered) == len(load.answers) + 1  # and the late one
    assert set(answered[0]) == {"time", "level", "message", "method", "route", "status", "ms"}
    assert "a-user-of-ours" not in (tmp_path / "current.log").read_text()
    (loaded,) = [line for line in lines if line["message"] == "release loaded"]
    assert (loaded["before"], loaded["release"]) == (saved_model.name, other_model.name)


def test_a_kill_loses_no_acknowledged_event(saved_model, tmp_path):
    acknowledged: dict[str, int] = {}
    (tmp_path / "current").symlink_to(saved_model)
    events = tmp_path / "events.sqlite"
    with process("--model", tmp_path / "current", "--histories", events) as (server, client):

        def append(user):
            with httpx.Client(base_url=client.base_url) as mine:
                for n in range(10**6):
                    batch = [{"user_id": user, "item_id": f"p{i}", "timestamp": NOW + n} for i in range(3)]
                    try:
                        answer = mine.post("/v1/events", json={"events": batch})
                    except httpx.HTTPError:
                        return
                    assert answer.json() == {"appended": 3}
                    acknowledged[user] = n + 1

        with ThreadPoolExecutor(4) as threads:
            for user in range(4):
                threads.submit(append, f"u{user}")
            time.sleep(1.5)
            os.kill(server.pid, signal.SIGKILL)
    store = SQLiteHistories(str(events))
    assert len(acknowledged) == 4
    assert min(acknowledged.values()) > 5
    for user, count in acknowledged.items():
        stored = len(store.read(user)["item_id"])
        # one more POST may have been stored and not acknowledged; never a part of one
        assert stored in (3 * count, 3 * count + 3)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_need_keys(host, saved_model, capsys):
    with pytest.raises(ValueError, match="give --api-key-file"):
        check_host(host, frozenset())
    check_host(host, frozenset({"a key"}))
    assert main(["serve", "--model", str(saved_model), "--host", host]) == 2
    assert "--api-key-file" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    check_host(host, frozenset())


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path / "none")]) == 2
    assert "neither a folder here nor a repo" in capsys.readouterr().err
