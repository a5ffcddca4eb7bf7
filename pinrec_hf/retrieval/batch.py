"""`pinrec retrieve`: candidates for every user of a file, part by part, so that a killed run goes on where it was."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pinrec_hf.data.output import only_run, replaced
from pinrec_hf.retrieval.encode import reading_fingerprint
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.retrieval.users import UserFiles

USERS_A_PART, VECTORS_AT_ONCE = 4_096, 65_536
ABOUT = "_retrieve.json"  # readers of a parquet folder skip names with an underscore


def retrieve_parquet(
    retriever: PinRecRetriever,
    users: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    request: Mapping[str, Any] | None = None,
    k: int = 100,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the candidates of every user: `part-*.parquet`, a row a slot.

    Columns: `request` (int64, the row of the users' files, from 0), `user_id`, `rank` (int32, from 1), `item_id`,
    `score` (float32), `outcome` (string, null = unspecified), `step` (int32). Finished parts gather in
    `<output_dir>.partial`; the same call again goes on from there, and gives the same files.

    Args:
        users: parquet (see `UserFiles`). request: fields of every request. k: slots a request.

    Returns:
        `{"num_requests": ..., "num_candidates": ..., "num_parts": ...}`.

    Raises:
        FileExistsError: `output_dir` exists, or another run is writing to it.
        FileNotFoundError, ValueError: see `UserFiles` and `PinRecRetriever.recommend`; also parts that another
            model or index, other users or another request have left.
    """
    files = UserFiles(users, retriever.tokenizer, request)
    about = {
        "users": [[os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files.files],
        "request": files.request,
        "k": k,
        "model": reading_fingerprint(retriever.model, retriever.tokenizer),
        "index": index_fingerprint(retriever),
        "steps": retriever.num_steps,
    }
    done = {"num_requests": 0, "num_candidates": 0, "num_parts": 0}
    with (
        _parts_folder(Path(output_dir), json.loads(json.dumps(about, default=_plain))) as folder,
        tqdm(total=files.num_rows, desc="retrieving", unit="user", disable=not progress) as bar,
    ):
        for number, batch in enumerate(files.batches(USERS_A_PART)):
            path = folder / f"part-{number:05d}.parquet"
            if not path.exists():
                user_type = files.schema.field("user_id").type
                _write_part(path, retriever, files.requests(batch), user_type, done["num_requests"], k)
            done["num_requests"] += batch.num_rows
            done["num_candidates"] += pq.read_metadata(path).num_rows
            done["num_parts"] += 1
            bar.update(batch.num_rows)
        if not done["num_parts"]:
            raise ValueError(f"{files.files[0]} has no users")
    return done


def index_fingerprint(retriever: PinRecRetriever) -> str:
    """Hex digest of which items may come, by which vectors, and how they are searched."""
    index, catalogue = retriever.index, retriever.tokenizer.catalogue
    digest = blake2b(repr((index.kind, index.neighbours.setting, retriever.similar)).encode(), digest_size=16)
    digest.update(index.rows[index.live.places].tobytes())
    for start in range(0, len(index.rows), VECTORS_AT_ONCE):
        digest.update(index.vectors[np.arange(start, min(start + VECTORS_AT_ONCE, len(index.rows)))].tobytes())
    if catalogue.has_availability:
        digest.update(catalogue.availability(np.arange(len(catalogue))).tobytes())
    return digest.hexdigest()


def _write_part(
    path: Path, retriever: PinRecRetriever, requests: list[dict[str, Any]], user_type: pa.DataType, first: int, k: int
) -> None:
    found = retriever.search(requests, k)
    there = found.rows >= 0
    request, rank = np.nonzero(there)
    users = pa.array([row["user_id"] for row in requests], user_type)
    ids = retriever.tokenizer.catalogue.ids(found.rows[there])
    table = pa.table(
        {
            "request": pa.array(first + request),
            "user_id": users.take(pa.array(request)),
            "rank": pa.array((rank + 1).astype(np.int32)),
            "item_id": pa.array(ids, pa.int64() if retriever.tokenizer.catalogue.id_type == "integer" else pa.string()),
            "score": pa.array(found.scores[there]),
            "outcome": pa.array(found.names, pa.string()).take(pa.array(found.outcomes[there])),
            "step": pa.array(found.steps[there].astype(np.int32)),
        }
    )
    with replaced(path) as partial:
        pq.write_table(table, partial, compression="zstd")


@contextmanager
def _parts_folder(output: Path, about: dict[str, Any]) -> Iterator[Path]:
    """`<output>.partial`, ours alone, new or begun by the same call; it becomes `output` when the block ends well."""
    if os.path.lexists(output):
        raise FileExistsError(errno.EEXIST, f"{output} exists: choose another output directory, or remove it first")
    folder = output.with_name(output.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        _describe(folder / ABOUT, about)
        for left in folder.glob("*.partial-*"):  # of a run that was killed
            left.unlink()
        try:
            yield folder
            os.rename(folder, output)
        finally:
            if folder.is_dir() and not any(folder.glob("part-*.parquet")):  # a refusal leaves nothing behind
                (folder / ABOUT).unlink()
                folder.rmdir()


def _plain(value: Any) -> Any:
    """What JSON lacks: collections as lists, dates and the like as text."""
    if isinstance(value, set):
        return sorted(value, key=str)
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _describe(path: Path, about: dict[str, Any]) -> None:
    """Write what the parts are made of; refuse parts that are made of something else."""
    if not path.exists():
        with replaced(path) as partial:
            partial.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return
    before = json.loads(path.read_text())
    if differing := sorted(name for name in about if before.get(name) != about[name]):
        raise ValueError(
            f"{path.parent} holds parts of a run with other {', '.join(differing)}: repeat that call to finish it, or "
            "remove the folder"
        )
