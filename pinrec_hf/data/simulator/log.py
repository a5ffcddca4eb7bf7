"""Writing a world out of core: one part of log and truth a block of users, then items, queries and `world.json`."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pinrec_hf.data.output import new_directory
from pinrec_hf.data.simulator.items import ALWAYS
from pinrec_hf.data.simulator.parameters import (
    CHOICES,
    GENERATOR_VERSION,
    OUTCOMES,
    POSITIVE_CHOICES,
    SURFACES,
    WorldParameters,
)
from pinrec_hf.data.simulator.walk import LOG, USERS_A_BLOCK, Block, Policy, fitted_policy
from pinrec_hf.data.simulator.world import World


@dataclass(frozen=True)
class SimulationReport:
    """What was written.

    Attributes:
        folder: where.   hash: sha256 of parameters and output (ids, times and answers, not parquet's bytes).
        rows, users, items, queries: numbers of log rows (query events too), users, items and possible queries.
        positive_rate: share of impressions that were saved or clicked.   outcomes: {surface: {outcome: number}}.
        seconds: wall-clock time in all, the pilot too.
    """

    folder: Path
    hash: str
    rows: int
    users: int
    items: int
    queries: int
    positive_rate: float
    outcomes: dict[str, dict[str, int]]
    seconds: float


@dataclass(frozen=True)
class BlockLog:
    """The log rows of a block, ordered by user, time and position: one array a column, (rows,) each.

    Attributes:
        user: number in the block.   request: user * the most requests + number of the request.
        surface, time (seconds), query, subject: of the request, -1 = none.
        row: catalogue row, -1 = the query event.   position: from 1; 0 = the query event.
        choice: index into `CHOICES`.   probability float32 (rows, 3): true ones of save, click and hide.
        interest: the topic that the user's interest had drifted to.
    """

    user: np.ndarray
    request: np.ndarray
    surface: np.ndarray
    time: np.ndarray
    query: np.ndarray
    subject: np.ndarray
    row: np.ndarray
    position: np.ndarray
    choice: np.ndarray
    probability: np.ndarray
    interest: np.ndarray

    @classmethod
    def create(cls, block: Block, policy: Policy) -> "BlockLog":
        """Walks the block; every row's place is known beforehand from the schedule."""
        schedule, most = block.schedule, block.schedule.time.shape[1]
        there = np.arange(most) < schedule.requests[:, None]
        used = np.where(there, schedule.length + (schedule.surface == SURFACES.index("search")), 0)
        first = np.cumsum(used.ravel()).reshape(used.shape) - used
        total = int(used.sum())
        cell = np.repeat(np.arange(used.size), used.ravel())
        surface, query, subject, interest = (np.full(used.shape, -1, np.int32) for _ in range(4))
        row, choice = np.full(total, -1, np.int32), np.zeros(total, np.int8)
        probability = np.zeros((total, len(OUTCOMES)), np.float32)
        for step in block.walk(policy):
            n = len(step.rows)
            column = (slice(n), step.number)
            surface[column], query[column] = step.requests.surface, step.requests.query
            subject[column], interest[column] = step.requests.subject, step.interest
            shown = step.rows >= 0
            place = (first[column] + (step.requests.query >= 0))[:, None] + np.arange(step.rows.shape[1])
            place = place[shown]
            row[place], choice[place] = step.rows[shown], step.choice[shown]
            probability[place] = step.probability[shown]
        surface, query, subject, interest = (table.ravel()[cell] for table in (surface, query, subject, interest))
        return cls(
            user=cell // most,
            request=cell,
            surface=surface,
            time=schedule.time.ravel()[cell],
            query=query,
            subject=subject,
            row=row,
            position=(np.arange(total) - first.ravel()[cell] + (query < 0)).astype(np.int32),
            choice=choice,
            probability=probability,
            interest=interest,
        )

    def update(self, digest: "hashlib._Hash") -> None:
        """Adds every drawn value to a hash; the probabilities are what the answers were drawn from."""
        for name in ("user", "request", "surface", "time", "query", "subject", "row", "position", "choice"):
            digest.update(getattr(self, name).astype("<i8" if name == "time" else "<i4").tobytes())


def log_blocks(world: World) -> Iterator[Block]:
    """The blocks of a world's log, in order; together they have exactly `size` rows."""
    size, step = world.parameters.size, world.parameters.block_rows
    for number, begin in enumerate(range(0, size, step)):
        yield Block.create(world, LOG, number, min(step, size - begin))


def simulate(
    output_dir: str | os.PathLike[str], *, size: int = 100_000, seed: int = 0, world: str = "default", **changes: object
) -> SimulationReport:
    """Simulates a multi-surface log in the data contract, out of core.

    Writes `log/part-*.parquet`, `items.parquet`, `queries.parquet`, `truth/part-*.parquet` (row by row beside the
    log: true probabilities and interest; never an input) and `world.json` (parameters, version, hash).

    Args:
        output_dir: a folder that does not exist.
        size: rows of the log, 10^3 to 10^8.   seed: any integer >= 0.
        world: "default", or a null world: "no_drift", "one_taste", "identical_surfaces".
        changes: single `WorldParameters` to replace, e.g. `items=500`.

    Raises:
        ValueError: an argument out of range.
        FileExistsError: the output folder exists.
    """
    began = time.perf_counter()
    parameters = WorldParameters.create(size, seed, world, **changes)
    with new_directory(output_dir) as partial:
        (partial / "log").mkdir()
        (partial / "truth").mkdir()
        report = _write(World(parameters), partial)
    return SimulationReport(folder=Path(output_dir), seconds=time.perf_counter() - began, **report)


def load_world(folder: str | os.PathLike[str]) -> World:
    """The world that wrote `folder`, from its `world.json`.

    Raises:
        ValueError: no simulated world, or one of another generator version.
    """
    path = Path(folder) / "world.json"
    if not path.exists():
        raise ValueError(f"{folder} has no world.json: it was not written by `pinrec simulate`")
    told = json.loads(path.read_text())
    if told["generator_version"] != GENERATOR_VERSION:
        raise ValueError(
            f"{path} was written by generator version {told['generator_version']}, this is {GENERATOR_VERSION}; "
            "simulate the world anew, or install the version that wrote it"
        )
    return World(WorldParameters(**{name: _tuples(value) for name, value in told["parameters"].items()}))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _write(world: World, folder: Path) -> dict:
    parameters = world.parameters
    digest = hashlib.sha256(json.dumps([GENERATOR_VERSION, asdict(parameters)], sort_keys=True).encode())
    texts = _write_items(world, folder, digest)
    policy, ids = fitted_policy(world), pa.array(world.item_ids)
    users, counts = 0, np.zeros((len(SURFACES), len(CHOICES)), np.int64)
    for block in log_blocks(world):
        log = BlockLog.create(block, policy)
        log.update(digest)
        part = f"part-{block.number:05d}.parquet"
        _write_table(_log_table(log, block, ids, texts), folder / "log" / part)
        _write_table(_truth_table(log, block), folder / "truth" / part)
        users += len(block.schedule.requests)
        kind = (log.surface * len(CHOICES) + log.choice)[log.row >= 0]
        counts += np.bincount(kind, minlength=counts.size).reshape(counts.shape)
    outcomes = {
        surface: {
            outcome: int(sum(c for c, names in zip(row, CHOICES, strict=True) if outcome in names))
            for outcome in OUTCOMES
        }
        for surface, row in zip(SURFACES, counts, strict=True)
    }
    report = {
        "hash": digest.hexdigest(),
        "rows": parameters.size,
        "users": users,
        "items": len(world.items),
        "queries": len(texts),
        "positive_rate": float(counts[:, list(POSITIVE_CHOICES)].sum() / max(counts.sum(), 1)),
        "outcomes": outcomes,
    }
    told = {"generator_version": GENERATOR_VERSION, **report, "parameters": asdict(parameters)}
    (folder / "world.json").write_text(json.dumps(told, indent=1) + "\n")
    return report


def _write_items(world: World, folder: Path, digest: "hashlib._Hash") -> pa.Array:
    """Writes items and queries, adds them to the hash, returns the query texts."""
    items, topics, parameters = world.items, world.topics, world.parameters
    titles, vectors = items.titles(topics), items.vectors(parameters, topics)
    bounds = {
        name: _times(value, np.isin(value, ALWAYS))
        for name, value in (("available_from", items.available_from), ("available_until", items.available_until))
    }
    columns = {"item_id": pa.array(world.item_ids), "title": pa.array(titles), "embedding": _vectors(vectors)}
    category = {"category": pa.array(items.categories(topics))}
    _write_table(pa.table({**columns, **bounds, **category}), folder / "items.parquet")
    texts, query_vectors = topics.query_table()
    _write_table(pa.table({"query": pa.array(texts), "embedding": _vectors(query_vectors)}), folder / "queries.parquet")
    digest.update("\n".join(titles + texts).encode())
    for table in (items.available_from, items.available_until, np.rint(vectors * 1e3), np.rint(query_vectors * 1e3)):
        digest.update(table.astype("<i8").tobytes())
    return pa.array(texts)


def _vectors(table: np.ndarray) -> pa.Array:
    offsets = np.arange(len(table) + 1, dtype=np.int32) * np.int32(table.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(table.ravel()))


def _times(seconds: np.ndarray, unknown: np.ndarray | None = None) -> pa.Array:
    """Parquet timestamps (ms, UTC), which need no unit to be told; null where `unknown`."""
    known = seconds if unknown is None else np.where(unknown, 0, seconds)
    return pa.array(known * 1_000, pa.int64(), mask=unknown).cast(pa.timestamp("ms", "UTC"))


def _coded(index: np.ndarray, names: pa.Array) -> pa.Array:
    """Strings by index, -1 = null: a dictionary costs parquet nothing, and is read back as plain strings."""
    codes = pa.array(np.asarray(index, np.int32), mask=index < 0 if (index < 0).any() else None)
    return pa.DictionaryArray.from_arrays(codes, names)


def _log_table(log: BlockLog, block: Block, ids: pa.Array, texts: pa.Array) -> pa.Table:
    names = sorted({name for choice in CHOICES for name in choice})
    several = np.array([len(choice) for choice in CHOICES])
    flat = np.array([[names.index(name) for name in (*choice, names[0], names[0])][:2] for choice in CHOICES], np.int32)
    lengths = several[log.choice]
    values = flat[log.choice][np.arange(2) < lengths[:, None]]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    base = block.number * USERS_A_BLOCK
    users = pa.array([f"u{base + user:07d}" for user in range(len(block.schedule.requests))])
    return pa.table(
        {
            "user_id": _coded(log.user, users),
            "item_id": _coded(log.row, ids),
            "surface": _coded(log.surface, pa.array(SURFACES)),
            "timestamp": _times(log.time),
            "outcomes": pa.ListArray.from_arrays(offsets, _coded(values, pa.array(names))),
            "request_id": pa.array(_request_id(log, block)),
            "position": pa.array(log.position),
            "query": _coded(log.query, texts),
            "context_item_id": _coded(log.subject, ids),
        }
    )


def _truth_table(log: BlockLog, block: Block) -> pa.Table:
    probability = {
        f"true_probability_{name}": pa.array(log.probability[:, k].copy()) for k, name in enumerate(OUTCOMES)
    }
    named = {"request_id": pa.array(_request_id(log, block)), "position": pa.array(log.position)}
    return pa.table({**named, **probability, "interest": pa.array(log.interest)})


def _request_id(log: BlockLog, block: Block) -> np.ndarray:
    return log.request + block.number * USERS_A_BLOCK * block.world.parameters.requests_range[1]


def _write_table(table: pa.Table, path: Path) -> None:
    # No Arrow schema is stored, so that dictionaries are read as strings by everybody.
    pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=1 << 24, row_group_size=1 << 20)
