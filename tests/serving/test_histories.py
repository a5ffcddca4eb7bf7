"""Both stores keep every event once, in order, and forget a user wholly."""

import shutil
import sqlite3
import subprocess
import threading
import time

import pytest
from loopback import free_port

from pinrec_hf.serving import histories
from pinrec_hf.serving.histories import HistoryUnavailable, RedisHistories, SQLiteHistories, open_histories


def event(user, item, timestamp, **fields):
    return {"user_id": user, "item_id": item, "timestamp": timestamp, "surface": "feed", "outcomes": ["save"], **fields}


def start_redis(folder, *options):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    import redis

    client = redis.Redis(port=port)
    for _ in range(200):
        try:
            client.ping()
            return server, f"redis://127.0.0.1:{port}/0"
        except redis.ConnectionError:
            time.sleep(0.05)
    raise TimeoutError("redis-server does not start")


DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(params=["sqlite", "redis"])
def store(request, tmp_path):
    if request.param == "sqlite":
        opened = open_histories(str(tmp_path / "events.sqlite"))
        yield opened
        opened.close()
    else:
        pytest.importorskip("redis")
        server, url = start_redis(tmp_path, *DURABLE)
        opened = open_histories(url)
        yield opened
        opened.close()
        server.kill()
        server.wait()


def test_events_come_back_by_time_then_arrival(store):
    assert store.append([event("u", "b", 20), event("u", "a", 20), event("v", "x", 1)]) == 3
    assert store.append([event("u", "late", 10, outcomes=[]), event("u", None, 30, query="blue sofa")]) == 2
    assert store.read("u") == {
        "item_id": ["late", "b", "a", None],
        "outcomes": [[], ["save"], ["save"], ["save"]],
        "surface": ["feed"] * 4,
        "timestamp": [10, 20, 20, 30],
        "query": [None, None, None, "blue sofa"],
    }
    assert store.read("nobody") == {}


def test_a_repeated_event_is_kept_once_and_at_its_place(store):
    first, second = event("u", "a", 1), event("u", "b", 1)
    assert store.append([first, second, first]) == 2
    assert store.append([second, {**first, "outcomes": ["click"]}]) == 1
    assert store.read("u")["item_id"] == ["a", "b", "a"]


def test_ids_keep_their_type_and_characters_and_users_are_text(store):
    for item in (7, "7", 'q"uote', "new\nline", "🛋️", "\x00"):
        store.append([event(17, item, 1)])
    assert store.read("17")["item_id"] == [7, "7", 'q"uote', "new\nline", "🛋️", "\x00"]
    assert store.delete("17") == 6
    assert store.read(17) == {}


def test_deleting_a_user_leaves_the_others(store):
    store.append([event("u", "a", 1), event("u2", "b", 1), event("u", "c", 2)])
    assert [store.delete("u"), store.delete("u")] == [2, 0]
    assert store.read("u") == {}
    assert store.read("u2")["item_id"] == ["b"]
    assert store.append([event("u", "a", 1)]) == 1


def test_only_the_newest_events_are_read(store, monkeypatch):
    monkeypatch.setattr(histories, "MAX_EVENTS", 5)
    store.append([event("u", n, n) for n in range(9)])
    assert store.read("u")["item_id"] == [4, 5, 6, 7, 8]


def test_threads_lose_nothing(store):
    def append(thread):
        for n in range(25):
            store.append([event("u", f"{thread}-{n}", n), event(f"u{thread}", n, n)])
            assert len(store.read(f"u{thread}")["item_id"]) == n + 1

    threads = [threading.Thread(target=append, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(store.read("u")["item_id"])) == 100


def test_a_delete_that_another_reader_holds_up_says_so(tmp_path):
    path = tmp_path / "events.sqlite"
    store, other = SQLiteHistories(str(path)), sqlite3.connect(path)
    store.append([event("secret", "a", 1)])
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM events").fetchone()
    store._writer.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(HistoryUnavailable, match="delete again"):
        store.delete("secret")
    other.close()
    assert store.delete("secret") == 0
    assert b"secret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_another_programs_database_is_refused_untouched(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE events (what TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another program's database"):
        SQLiteHistories(str(path))
    assert path.read_bytes() == before


def test_sqlite_commits_are_synced(tmp_path):
    store = SQLiteHistories(str(tmp_path / "events.sqlite"))
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_write_that_fails_stores_nothing_and_says_so(tmp_path, monkeypatch):
    store = SQLiteHistories(str(tmp_path / "events.sqlite"))
    store.append([event("u", "a", 1)])
    store._writer.execute("PRAGMA max_page_count = 8")
    with pytest.raises(HistoryUnavailable, match="full"):
        store.append([event("u", "x" * 500, n) for n in range(500)])
    store._writer.execute("PRAGMA max_page_count = 1000000")
    assert store.read("u")["item_id"] == ["a"]
    assert store.append([event("u", "b", 2)]) == 1


def test_a_write_that_breaks_off_leaves_the_file_to_others(tmp_path):
    store, other = (SQLiteHistories(str(tmp_path / "events.sqlite")) for _ in range(2))
    with pytest.raises(OverflowError):
        store.append([event("u", "x", 0), event("u", "y", 2**70)])
    assert other.append([event("u", "a", 1)]) == 1
    assert store.append([event("u", "b", 2)]) == 1
    with pytest.raises(ValueError, match="would forget"):
        open_histories(":memory:")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(ValueError, match="give a file that `pinrec serve` made"):
        open_histories(str(tmp_path / "text"))
    with sqlite3.connect(tmp_path / "newer") as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="has the format 9"):
        open_histories(str(tmp_path / "newer"))


def test_a_redis_that_forgets_is_refused_and_one_that_dies_is_said(tmp_path):
    pytest.importorskip("redis")
    with pytest.raises(ValueError, match=r"no Redis answers at 127\.0\.0\.1:1/0") as error:
        RedisHistories("redis://:secret@127.0.0.1:1/0")
    assert "secret" not in str(error.value)
    (tmp_path / "a").mkdir()
    server, url = start_redis(tmp_path / "a", "--appendonly", "no")
    with pytest.raises(ValueError, match="--appendfsync always"):
        RedisHistories(url)
    server.kill()
    server.wait()
    server, url = start_redis(tmp_path, *DURABLE)
    store = RedisHistories(url)
    store.append([event("u", n, n) for n in range(50)])
    server.kill()
    server.wait()
    with pytest.raises(HistoryUnavailable):
        store.read("u")
    server, url = start_redis(tmp_path, *DURABLE)
    assert len(RedisHistories(url).read("u")["item_id"]) == 50
    server.kill()
    server.wait()
