"""The item catalogue: ids, content vectors, features and life times, memory-mapped from one safetensors file.

A row index is an item's name everywhere in PinRec; rows are append-only, so that nothing moves when the
catalogue grows. String ids are found by a stable 64-bit hash of their bytes and then verified byte by byte: a
collision is never a wrong item. This file travels to the Hub with the tokenizer, hence imports numpy,
safetensors and the standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .catalogue_columns_pinrec import (
    as_list,
    checked_vectors,
    encode,
    feature_bags,
    hash_bytes,
    pack,
    raise_duplicate,
    seconds,
    stable_hash,
    typed_ids,
)

__all__ = ["Catalogue", "map_safetensors", "stable_hash"]

FORMAT = "pinrec-catalogue-1"
ALWAYS = -(2**63), 2**63 - 1  # availability of an item without life times
DTYPES = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}


class Catalogue:
    """Items by row. Make one with `build` or `open`; every method takes and gives catalogue rows from 0.

    Attributes:
        id_type: `"string"` or `"integer"`.
        content_size: width of the content vectors, 0 if there are none.
        fingerprint: hex digest of ids, vectors and features (not of life times).
    """

    def __init__(self, arrays: dict[str, np.ndarray], fingerprint: str, path: str | None = None) -> None:
        self._arrays, self.fingerprint, self.path = arrays, fingerprint, path
        self.id_type = "integer" if "ids" in arrays else "string"
        self.content_size = arrays["vectors"].shape[1] if "vectors" in arrays else 0

    @classmethod
    def build(
        cls,
        ids: Sequence[str] | Sequence[int] | np.ndarray,
        *,
        vectors: np.ndarray | Sequence[Sequence[float]] | None = None,
        features: Iterable[Sequence[str] | None] | None = None,
        available_from: Sequence[int | None] | np.ndarray | None = None,
        available_until: Sequence[int | None] | np.ndarray | None = None,
    ) -> Catalogue:
        """Build a catalogue in memory; columns may be lists, numpy arrays or arrow arrays.

        Args:
            ids: distinct strings, or distinct integers that fit 64 bits; their order is the row order.
            vectors: float32 of shape `(len(ids), content_size)`.
            features: one list of strings an item (`["author=17", "tag=cooking"]`); None = no features.
            available_from, available_until: seconds since epoch, UTC; an item is recommended in
                `[from, until)`; None = no limit.

        Raises:
            ValueError: no ids, duplicate, null or mixed ids; NaN, infinite, zero or wrong-width vectors;
                features that are no lists of strings; times that are no whole seconds. It names the row.
        """
        values = typed_ids(ids, "id")
        size = len(values)
        if size == 0:
            raise ValueError("a catalogue needs at least one item, and ids is empty; check the items table")
        if len(set(values.tolist() if isinstance(values, np.ndarray) else values)) != size:
            raise_duplicate(values)
        arrays: dict[str, np.ndarray] = {}
        encoded = encode(values)
        if isinstance(values, np.ndarray):
            arrays["ids"] = values
        else:
            arrays["id_bytes"], arrays["id_offsets"] = pack(encoded)
        arrays["hashes"] = hash_bytes(encoded)
        if vectors is not None:
            arrays["vectors"] = checked_vectors(vectors, size)
        if features is not None:
            arrays["feature_hashes"], arrays["feature_offsets"] = feature_bags(features, size)
        if available_from is not None or available_until is not None:
            first = seconds(available_from, ALWAYS[0], "available_from", size)
            last = seconds(available_until, ALWAYS[1], "available_until", size)
            arrays["availability"] = np.stack([first, last], axis=1)
        return cls._finish(arrays)

    @classmethod
    def _finish(cls, arrays: dict[str, np.ndarray]) -> Catalogue:
        """Add the sorted keys (hashes; integer ids themselves) that `rows` searches, and the fingerprint."""
        keys = arrays.get("ids", arrays["hashes"])
        arrays["order"] = np.argsort(keys, kind="stable")
        arrays["sorted_keys"] = keys[arrays["order"]]
        digest = blake2b(digest_size=16)
        for name in ("ids", "id_bytes", "id_offsets", "vectors", "feature_hashes", "feature_offsets"):
            if name in arrays:
                digest.update(f"{name}{arrays[name].shape}".encode())
                digest.update(arrays[name].reshape(-1).view(np.uint8).data)
        return cls(arrays, digest.hexdigest())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Catalogue:
        """Map a saved catalogue: nothing but the header is read until rows are asked for.

        Raises:
            ValueError: the file is truncated or is no PinRec catalogue.
        """
        path = os.path.abspath(path)
        arrays, metadata = map_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no PinRec catalogue: its format is {metadata.get('format')!r}, not {FORMAT!r}; "
                "give a file that Catalogue.save wrote"
            )
        size = len(arrays.get("hashes", ()))
        per_row = ["hashes", "sorted_keys", "order"] + [name for name in ("ids", "vectors") if name in arrays]
        offsets = [name for name in ("id_offsets", "feature_offsets") if name in arrays]
        if (
            size == 0
            or "fingerprint" not in metadata
            or ("ids" in arrays) == ("id_offsets" in arrays)
            or any(len(arrays.get(name, ())) != size for name in per_row)
            or any(len(arrays[name]) != size + 1 for name in offsets)
            or any(
                arrays[name][-1] != len(arrays.get(content, ()))
                for name, content in (("id_offsets", "id_bytes"), ("feature_offsets", "feature_hashes"))
                if name in arrays
            )
            or ("vectors" in arrays and arrays["vectors"].ndim != 2)
            or arrays.get("availability", np.empty((size, 2))).shape != (size, 2)
        ):
            raise ValueError(f"{path} is damaged: its tensors do not belong together; save it again")
        return cls(arrays, metadata["fingerprint"], path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, first under a temporary name: a reader never sees half a catalogue."""
        partial = f"{os.fspath(path)}.partial-{os.getpid()}"
        try:
            arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
            save_file(arrays, partial, metadata={"format": FORMAT, "fingerprint": self.fingerprint})
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def append(self, ids: Sequence[str] | Sequence[int] | np.ndarray, **columns: Any) -> Catalogue:
        """Return a new, larger catalogue in which every old item keeps its row; arguments as in `build`.

        Raises:
            ValueError: as `build`; also ids of another type or already here, and vectors of another width.
        """
        if len(ids) == 0:
            return self
        new = Catalogue.build(ids, **columns)
        if new.content_size != self.content_size:
            raise ValueError(
                f"the new items have vectors of width {new.content_size}, the catalogue of width "
                f"{self.content_size}; give vectors of the catalogue's width (0 = none)"
            )
        known = np.flatnonzero(self.rows(new.ids(np.arange(len(new)))) >= 0)
        if len(known):
            raise ValueError(
                f"row {known[0]}: id {new.ids(known[:1])[0]!r} is already in the catalogue "
                f"({len(known)} such rows); append only new items"
            )
        old, add = dict(self._arrays), dict(new._arrays)
        if "availability" in old or "availability" in add:
            old["availability"] = self.availability(np.arange(len(self)))
            add["availability"] = new.availability(np.arange(len(new)))
        if "feature_offsets" in old or "feature_offsets" in add:
            for side, size in ((old, len(self)), (add, len(new))):
                side.setdefault("feature_hashes", np.zeros(0, np.int64))
                side.setdefault("feature_offsets", np.zeros(size + 1, np.int64))
        for name in ("id_offsets", "feature_offsets"):  # offsets go on where the old ones end
            if name in add:
                add[name] = old[name][-1] + add[name][1:]
        names = add.keys() - {"order", "sorted_keys"}
        return Catalogue._finish({name: np.concatenate([old[name], add[name]]) for name in names})

    def __len__(self) -> int:
        return len(self._arrays["hashes"])

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} items, {self.id_type} ids, content_size={self.content_size})"

    def rows(self, ids: Sequence[str | None] | Sequence[int | None] | np.ndarray) -> np.ndarray:
        """Find ids: int64 rows of shape `(len(ids),)`, -1 where an id is unknown or None.

        Raises:
            ValueError: string ids asked of a catalogue with integer ids, or the other way round.
        """
        found = np.full(len(ids), -1, dtype=np.int64)
        pending = np.arange(len(ids))
        if not (isinstance(ids, np.ndarray) and ids.dtype.kind in "iu"):
            ids = as_list(ids)
            if None in ids:
                pending = np.flatnonzero([value is not None for value in ids])
                ids = [value for value in ids if value is not None]
        if len(pending) == 0:
            return found
        values = typed_ids(ids, "id")
        if isinstance(values, np.ndarray) != (self.id_type == "integer"):
            raise ValueError(
                f"the catalogue has {self.id_type} ids, but id {as_list(values)[0]!r} was asked for; "
                f"convert the ids to {'int' if self.id_type == 'integer' else 'str'}"
            )
        if isinstance(values, np.ndarray):
            keys = values
        else:
            encoded = encode(values)
            keys, (id_bytes, id_offsets) = hash_bytes(encoded), pack(encoded)
        sorted_keys, order = self._arrays["sorted_keys"], self._arrays["order"]
        place, asked = np.searchsorted(sorted_keys, keys), np.arange(len(keys))
        while len(asked):  # once, unless hashes collide
            inside = place < len(sorted_keys)
            inside[inside] = sorted_keys[place[inside]] == keys[asked[inside]]
            asked, place = asked[inside], place[inside]
            rows = order[place]
            if isinstance(values, np.ndarray):
                same = np.ones(len(rows), dtype=bool)
            else:
                ours = self._arrays["id_bytes"], self._arrays["id_offsets"], rows
                same = _same_bytes(ours, (id_bytes, id_offsets, asked))
            found[pending[asked[same]]] = rows[same]
            asked, place = asked[~same], place[~same] + 1
        return found

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Ids of `rows` (int64, `(n,)`): a list of str or of int."""
        rows = self._check(rows)
        if self.id_type == "integer":
            return list(self._arrays["ids"][rows].tolist())
        starts, ends = self._arrays["id_offsets"][rows], self._arrays["id_offsets"][rows + 1]
        blob = self._arrays["id_bytes"][_ragged(starts, ends - starts)].tobytes()
        cuts = np.concatenate([[0], np.cumsum(ends - starts)]).tolist()
        return [blob[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(cuts)]

    def hashes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`stable_hash` of the ids of `rows` (any shape): int64 of the same shape."""
        return self._arrays["hashes"][self._check(rows)]

    def rows_of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Find string ids by their `stable_hash` (int64, `(n,)`): int64 rows of the same shape, -1 where unknown.

        Raises:
            ValueError: a catalogue of integer ids, which is sorted by the ids themselves.
        """
        if self.id_type != "string":
            raise ValueError("rows_of_hashes finds string ids; this catalogue has integer ids, use rows()")
        place = np.searchsorted(self._arrays["sorted_keys"], hashes).clip(max=len(self) - 1)
        found = self._arrays["sorted_keys"][place] == hashes
        return np.where(found, self._arrays["order"][place], -1)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Content vectors: float32 of shape `rows.shape + (content_size,)`."""
        rows = self._check(rows)
        if self.content_size == 0:
            return np.zeros((*rows.shape, 0), dtype=np.float32)
        return self._arrays["vectors"][rows]

    def features(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Feature hashes: int64 of shape `rows.shape + (F,)`, F the most of any of these rows.

        Padded with 0 on the right; F is 0 where none of the rows has features.
        """
        rows = self._check(rows)
        if "feature_offsets" not in self._arrays or rows.size == 0:
            return np.zeros((*rows.shape, 0), dtype=np.int64)
        offsets = self._arrays["feature_offsets"]
        starts = offsets[rows.ravel()]
        lengths = offsets[rows.ravel() + 1] - starts
        padded = np.zeros((rows.size, int(lengths.max())), dtype=np.int64)
        taken = np.arange(padded.shape[1]) < lengths[:, None]
        padded[taken] = self._arrays["feature_hashes"][_ragged(starts, lengths)]
        return padded.reshape(*rows.shape, padded.shape[1])

    def availability(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Life times: int64 of shape `rows.shape + (2,)`, seconds since epoch, `[from, until)`.

        A missing limit is the smallest or largest int64.
        """
        rows = self._check(rows)
        if "availability" not in self._arrays:
            return np.broadcast_to(np.array(ALWAYS, dtype=np.int64), (*rows.shape, 2)).copy()
        return self._arrays["availability"][rows]

    def with_availability(self, rows: np.ndarray, availability: np.ndarray) -> Catalogue:
        """Return a catalogue in which `rows` (int64, `(n,)`) have other life times (int64, `(n, 2)`); all else stays,
        the fingerprint included."""
        lives = self.availability(np.arange(len(self)))
        lives[self._check(rows)] = availability
        return Catalogue({**self._arrays, "availability": lives}, self.fingerprint)

    @property
    def has_availability(self) -> bool:
        """Whether any item's life time is limited."""
        return "availability" in self._arrays

    def _check(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):  # -1 would silently be the last item
            bad = rows[(rows < 0) | (rows >= len(self))].flat[0]
            raise ValueError(f"row {bad} is not in this catalogue of {len(self)} items; mask unknown ones (-1)")
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # A mapped catalogue travels to a worker process by name: pickling 10^6 vectors would copy them.
        if self.path is not None:
            return {"path": self.path, "fingerprint": self.fingerprint}
        return {"arrays": self._arrays, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "arrays" in state:
            self.__init__(state["arrays"], state["fingerprint"])  # type: ignore[misc]
            return
        opened = Catalogue.open(state["path"])
        if opened.fingerprint != state["fingerprint"]:
            raise ValueError(f"{state['path']} is another catalogue than when it was opened; open it again")
        self.__dict__ = opened.__dict__


def _ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indexes `starts[0], starts[0] + 1, ..., starts[1], ...`: one run of each length."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _same_bytes(
    left: tuple[np.ndarray, np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Whether entry i of both sides, each given as (bytes, offsets, rows), are the same bytes."""
    lengths = [offsets[rows + 1] - offsets[rows] for _, offsets, rows in (left, right)]
    same = lengths[0] == lengths[1]
    bytes_left, bytes_right = (
        blob[_ragged(offsets[rows[same]], length[same])]
        for (blob, offsets, rows), length in zip((left, right), lengths, strict=True)
    )
    differing = np.concatenate([[0], np.cumsum(bytes_left != bytes_right)])
    ends = np.cumsum(lengths[0][same])
    same[same] = differing[ends] == differing[ends - lengths[0][same]]
    return same


def map_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map the tensors of a safetensors file (8 bytes header length, JSON header, data) without reading them.

    `safetensors.safe_open` copies each tensor into memory when asked for it, hence this reader. Every size is
    checked against the file's, so that a truncated file is refused here and not met as a fault later.
    """
    foreign = f"{path} is no safetensors file or is truncated; copy it again"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(foreign)
        try:
            header = json.loads(file.read(start - 8))
            metadata = header.pop("__metadata__", {})
            entries = [
                (name, DTYPES.get(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(foreign) from None
    promised = start + max((entry[-1] for entry in entries), default=0)
    if promised != size:
        raise ValueError(f"{path} is truncated or damaged ({size} bytes, its header says {promised}); copy it again")
    blob = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    arrays = {}
    for name, dtype, shape, begin, end in entries:
        if dtype is None or not 0 <= begin <= end or end - begin != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(f"{path} is no PinRec catalogue: tensor {name!r} is of another type or size")
        arrays[name] = blob[start + begin : start + end].view(dtype).reshape(shape)
    return arrays, metadata
