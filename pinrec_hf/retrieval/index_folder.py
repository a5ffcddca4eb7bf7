"""The files of an index: written whole or not at all, and refused where they do not belong together.

index.json           kind, sizes, fingerprints; written last, without it there is no index
index.safetensors    vectors, their catalogue rows, tombstones; mapped when read
index.faiss          the search structure, unless it lies on Milvus
"""

from __future__ import annotations

import glob
import json
import os
from typing import Any

import numpy as np

from pinrec_hf.data.output import only_run
from pinrec_hf.modeling.catalogue_pinrec import map_safetensors
from pinrec_hf.retrieval.faiss_index import FaissIndex, Neighbours
from pinrec_hf.retrieval.milvus_index import MilvusIndex
from pinrec_hf.retrieval.vectors import ItemVectors, write_safetensors

FORMATS = (1, 2)  # 1: no search setting, and vectors of full width in the lists


def write_index(
    folder: str | os.PathLike[str],
    neighbours: Neighbours,
    vectors: ItemVectors,
    arrays: dict[str, np.ndarray],
    about: dict[str, Any],
) -> None:
    """Write an index into a folder, over any that is there.

    Raises:
        FileExistsError: another process is writing an index into this folder.
    """
    os.makedirs(folder, exist_ok=True)
    files = ["index.safetensors", *([neighbours.file] if neighbours.file else [])]
    partial = {name: os.path.join(folder, f"{name}.partial-{os.getpid()}") for name in (*files, "index.json")}
    try:
        with only_run(folder):
            for left in glob.glob(os.path.join(glob.escape(os.fspath(folder)), "index.*.partial-*")):
                os.remove(left)  # of a run that was killed: the lock says that nobody writes it
            write_safetensors(partial["index.safetensors"], vectors, arrays)
            if neighbours.file:
                neighbours.write(partial[neighbours.file])
            sizes = {name: os.path.getsize(partial[name]) for name in files}
            with open(partial["index.json"], "w") as file:
                json.dump({"format": FORMATS[-1], **neighbours.about(), **about, "bytes": sizes}, file, indent=2)
            # Killed between two of these, the folder holds no index.json: no index, and never a mixture.
            if os.path.exists(os.path.join(folder, "index.json")):
                os.remove(os.path.join(folder, "index.json"))
            for name, path in partial.items():
                os.replace(path, os.path.join(folder, name))
    finally:
        for path in partial.values():
            if os.path.exists(path):
                os.remove(path)


def read_index(
    folder: str | os.PathLike[str], expected: dict[str, str]
) -> tuple[Neighbours, dict[str, np.ndarray], dict[str, Any]]:
    """Back end, mapped arrays and `index.json` of a folder.

    Args:
        expected: the fingerprints `encoder` and `catalogue`.

    Raises:
        FileNotFoundError: there is no (complete) index in the folder.
        ValueError: another encoder's or catalogue's index, a truncated or foreign file, an unknown format.
    """
    again = f"index again with `pinrec index --model {os.fspath(folder)}`"
    try:
        with open(os.path.join(folder, "index.json")) as file:
            about = json.load(file)
        if about["format"] not in FORMATS:
            raise ValueError
        sizes = {name: int(size) for name, size in about["bytes"].items()}
        made_by = {what: about[f"{what}_fingerprint"] for what in expected}
    except FileNotFoundError:
        raise FileNotFoundError(f"no complete index in {folder}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}/index.json is truncated, foreign or of a newer format; {again}") from None
    for what, fingerprint in expected.items():
        if made_by[what] != fingerprint:
            problem = f"was made by another {what} ({made_by[what]}, not {fingerprint})"
            raise ValueError(f"the index in {folder} {problem}; {again}")
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise ValueError(f"{path} is missing or truncated (it had {size} bytes); {again}")
    arrays = map_safetensors(os.path.join(folder, "index.safetensors"))[0]
    try:
        neighbours: Neighbours
        if about["kind"] == MilvusIndex.kind:
            neighbours = MilvusIndex.open(about)
        else:
            neighbours = FaissIndex.read(os.path.join(folder, "index.faiss"), about)
    except RuntimeError as error:
        raise ValueError(f"{folder}/index.faiss is no faiss index ({error}); {again}") from None
    except KeyError as missing:
        raise ValueError(f"{folder}/index.json lacks {missing}; {again}") from None
    size, dimension = arrays["vectors"].shape
    if (len(neighbours), about["dimension"], len(arrays["rows"])) != (size, dimension, size):
        raise ValueError(f"the files in {folder} do not belong together; {again}")
    return neighbours, arrays, about
