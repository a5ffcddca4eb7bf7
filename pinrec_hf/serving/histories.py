"""Histories by user id: a SQLite file for one server, Redis for several.

Both keep an event once: a client that did not hear the answer may send the same again. User ids are compared as text.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pinrec_hf.serving.schema import MAX_EVENTS

FORMAT = 1
COLUMNS = ("item_id", "surface", "timestamp", "outcomes", "query", "context_item_id", "request_id")


class StoredHistory(dict[str, list[Any]]):
    """A history out of a store: names in it that the model does not know count as unknown, as in a log."""


class HistoryUnavailable(Exception):
    """The store cannot be read or written now; nothing of the call was kept, or it may be repeated."""


class HistoryStore(Protocol):
    """Any thread may call any method."""

    def append(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Store events (`user_id` and history columns), all or none; returns, once they are durable, how many are new.

        Raises:
            HistoryUnavailable: they may or may not be stored.
        """
        ...

    def read(self, user_id: str | int) -> StoredHistory:
        """The user's newest events, oldest first, `MAX_EVENTS` at most; equal times in the order of arrival.

        Raises:
            HistoryUnavailable: the store cannot be read.
        """
        ...

    def delete(self, user_id: str | int) -> int:
        """Remove every event of the user; returns how many there were.

        Raises:
            HistoryUnavailable: some may be left.
        """
        ...

    def close(self) -> None: ...


def open_histories(address: str) -> HistoryStore:
    """`redis://...` (or `rediss://`) or the path of a SQLite file, which is made where there is none.

    Raises:
        ValueError: a foreign file, a Redis that forgets, or none.
    """
    if address == ":memory:":
        raise ValueError("--histories :memory: would forget what it acknowledged; give a file, or redis://...")
    return RedisHistories(address) if address.startswith(("redis://", "rediss://")) else SQLiteHistories(address)


def to_columns(events: Sequence[Mapping[str, Any]]) -> StoredHistory:
    """Events to a history's columns; those without any value are left out."""
    present = [name for name in COLUMNS if any(event.get(name) is not None for event in events)]
    columns = dict.fromkeys(["item_id", "outcomes", *present]) if events else {}
    return StoredHistory({name: [event.get(name) for event in events] for name in columns})


def _text(event: Mapping[str, Any]) -> str:
    """One text for one event, whatever the order of its fields."""
    kept = {name: event[name] for name in COLUMNS if event.get(name) is not None}
    return json.dumps({"outcomes": [], **kept}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class SQLiteHistories:
    """One file, written ahead and synced at every commit: what was acknowledged survives a kill and a power cut.

    Args:
        path: the file. Several processes of one machine may share it.

    Raises:
        ValueError: no database of this kind, or a folder that cannot be written.
    """

    def __init__(self, path: str) -> None:
        try:
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._writer.execute("BEGIN IMMEDIATE")  # two servers may make the file at once
            (found,) = self._writer.execute("PRAGMA user_version").fetchone()
            if found not in (0, FORMAT):
                raise ValueError(f"{path} has the format {found}, this version reads {FORMAT}; give another file")
            if not found and self._writer.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise ValueError(f"{path} is another program's database; give another file")
            self._writer.execute(
                "CREATE TABLE IF NOT EXISTS events (sequence INTEGER PRIMARY KEY, user_id TEXT NOT NULL, "
                "timestamp INTEGER NOT NULL, event TEXT NOT NULL, UNIQUE (user_id, timestamp, event))"
            )
            self._writer.execute(f"PRAGMA user_version = {FORMAT}")
            self._writer.execute("COMMIT")
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA secure_delete = ON")  # a deleted user's bytes are overwritten
        except sqlite3.Error as error:
            made = "give a file that `pinrec serve` made, or a new one"
            raise ValueError(f"histories {path!r}: {error}; {made}") from error
        self._writing, self._reading = threading.Lock(), threading.Lock()

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        return sqlite3.connect(path, check_same_thread=False, isolation_level=None)  # the locks keep threads apart

    def append(self, events: Sequence[Mapping[str, Any]]) -> int:
        rows = [(str(event["user_id"]), event["timestamp"], _text(event)) for event in events]
        with self._write() as connection:
            statement = "INSERT OR IGNORE INTO events (user_id, timestamp, event) VALUES (?, ?, ?)"
            return connection.executemany(statement, rows).rowcount

    def read(self, user_id: str | int) -> StoredHistory:
        newest = "SELECT event FROM events WHERE user_id = ? ORDER BY timestamp DESC, sequence DESC LIMIT ?"
        try:
            with self._reading:
                rows = self._reader.execute(newest, (str(user_id), MAX_EVENTS)).fetchall()
        except sqlite3.Error as error:
            raise HistoryUnavailable(str(error)) from error
        return to_columns([json.loads(text) for (text,) in reversed(rows)])

    def delete(self, user_id: str | int) -> int:
        with self._write() as connection:
            deleted = connection.execute("DELETE FROM events WHERE user_id = ?", (str(user_id),)).rowcount
        try:
            with self._writing:  # the log written ahead holds the events too, until it is folded into the file
                (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise HistoryUnavailable(str(error)) from error
        if busy:
            raise HistoryUnavailable("another process reads the file: deleted, but not overwritten yet; delete again")
        return deleted

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise HistoryUnavailable(str(error)) from error
                raise

    def close(self) -> None:
        with self._writing, self._reading:
            self._writer.close()
            self._reader.close()


class RedisHistories:
    """A hash a user: the event's text, and its number in the order of arrival.

    Args:
        url: `redis://[:password@]host:port/db`, or `rediss://`.

    Raises:
        ValueError: no answer, or a server that says that it acknowledges what a crash may lose.
    """

    def __init__(self, url: str) -> None:
        where = url.split("@")[-1].split("?")[0]  # a password stays out of messages
        try:
            import redis
        except ImportError:
            raise ValueError(f'histories {where}: `pip install ".[redis]"` in the clone first') from None
        try:
            self._redis: Any = redis.Redis.from_url(url, decode_responses=True, socket_timeout=5)
        except ValueError:
            raise ValueError("the address of the histories is not redis://[:password@]host:port/db") from None
        self._error = redis.RedisError
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise ValueError(f"no Redis answers at {where}: {error}") from error
        try:
            settings = self._redis.config_get("append*")
        except redis.ResponseError:  # a managed server hides them: its operator answers for them
            return
        if (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
            raise ValueError(
                f"the Redis at {where} loses acknowledged events in a crash: run it with "
                "`--appendonly yes --appendfsync always`"
            )

    def append(self, events: Sequence[Mapping[str, Any]]) -> int:
        with self._available():
            last = self._redis.incrby("pinrec:sequence", len(events))
            together = self._redis.pipeline(transaction=True)
            for number, event in enumerate(events, start=last - len(events) + 1):
                together.hsetnx(self._key(event["user_id"]), _text(event), number)
            return sum(together.execute())

    def read(self, user_id: str | int) -> StoredHistory:
        with self._available():
            found = self._redis.hgetall(self._key(user_id))
        events = [(json.loads(text), int(number)) for text, number in found.items()]
        events.sort(key=lambda pair: (pair[0]["timestamp"], pair[1]))
        return to_columns([event for event, _ in events[-MAX_EVENTS:]])

    def delete(self, user_id: str | int) -> int:
        with self._available():
            key, together = self._key(user_id), self._redis.pipeline(transaction=True)
            deleted, _ = together.hlen(key).delete(key).execute()
        return int(deleted)

    @staticmethod
    def _key(user_id: str | int) -> str:
        return f"pinrec:events:{user_id}"

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise HistoryUnavailable(str(error)) from error

    def close(self) -> None:
        self._redis.close()
