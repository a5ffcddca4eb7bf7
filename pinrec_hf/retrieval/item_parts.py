"""Embeddings of a large catalogue, part by part: what was made stays made, and processes share the work.

    index.parts-KEY/part-00000.npy ...     written beside, then renamed; one that is there is not made again
                    items.npy              all of them, joined, from which the index is built

Of n processes (`accelerate launch`, `torchrun`) the i-th makes the parts i, i + n, i + 2 n ...; the first one waits for
all and goes on alone. They meet in the folder and nowhere else, so it has to be one that all machines see; where one
process fails, it is the launcher that ends the others.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pinrec_hf.data.output import only_run, remove_left, replaced
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import check_catalogue, encode_items, encoder_fingerprint

ROWS_A_PART = 2**18
LOOK_AGAIN = 0.2  # seconds


def process() -> tuple[int, int]:
    """This process's number among those that were launched together, and how many they are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def item_embeddings(
    model: PinRecModel, tokenizer: PinRecTokenizer, folder: str | os.PathLike[str]
) -> Iterator[np.ndarray | None]:
    """Embeddings of the whole catalogue, float32 `(items, d)`, mapped from disk unless they are one part.

    Args:
        folder: of the model, where the parts are kept until the block ends without an exception: whoever is killed
            before finds them again, unless the item encoder or the catalogue is another.

    Yields:
        `None` in other processes than the first, which have nothing more to do.

    Raises:
        FileExistsError: another run is encoding into this folder.
    """
    rank, processes = process()
    if processes == 1 and len(tokenizer.catalogue) <= ROWS_A_PART:
        yield encode_items(model, tokenizer)
        return
    check_catalogue(model, tokenizer)
    made_by = f"{encoder_fingerprint(model)} {tokenizer.catalogue.fingerprint} {ROWS_A_PART}"
    parts = Path(folder) / f"index.parts-{blake2b(made_by.encode(), digest_size=8).hexdigest()}"
    parts.mkdir(exist_ok=True)
    with only_run(parts) if rank == 0 else nullcontext():
        wanted = [parts / f"part-{i:05d}.npy" for i in range(-(-len(tokenizer.catalogue) // ROWS_A_PART))]
        for path in tqdm(wanted[rank::processes], desc=f"Parts of process {rank}", disable=rank > 0):
            if not path.exists():
                start = wanted.index(path) * ROWS_A_PART
                rows = np.arange(start, min(start + ROWS_A_PART, len(tokenizer.catalogue)))
                _write(path, encode_items(model, tokenizer, rows))
        if rank > 0:
            yield None
            return
        while not all(path.exists() for path in wanted):
            time.sleep(LOOK_AGAIN)
        yield _joined(wanted, parts / "items.npy", len(tokenizer.catalogue))
        shutil.rmtree(parts)
        remove_left(Path(folder).glob("index.parts-*"))  # of the model that was in this folder before


def _write(path: Path, embeddings: np.ndarray) -> None:
    with replaced(path) as partial, partial.open("wb") as file:
        np.save(file, embeddings)
        file.flush()
        os.fsync(file.fileno())


def _joined(parts: list[Path], path: Path, size: int) -> np.ndarray:
    """All parts as one array, mapped: memory holds what is looked at."""
    if not path.exists():
        width = np.load(parts[0], mmap_mode="r").shape[1]
        with replaced(path) as partial:
            whole = np.lib.format.open_memmap(partial, "w+", np.float32, (size, width))
            for start, part in zip(range(0, size, ROWS_A_PART), parts, strict=True):
                whole[start : start + ROWS_A_PART] = np.load(part, mmap_mode="r")
            whole.flush()
    return np.load(path, mmap_mode="r")
