"""Columns of items as users hand them over (lists, numpy, arrow), checked and packed; errors name the row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np


def stable_hash(values: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    """Hash strings (their UTF-8 bytes) or integers (their 8 little-endian bytes) with blake2b, digest size 8.

    The hash depends on the value alone: not on the process, the machine or the other values.

    Returns:
        int64 array of shape `(len(values),)`; never 0, which is left free for padding.
    """
    return hash_bytes(encode(typed_ids(values, "value")))


def as_list(values: Any) -> list[Any]:
    """A list of Python values, from arrow, numpy or any iterable."""
    if hasattr(values, "to_pylist"):
        return list(values.to_pylist())
    return list(values.tolist()) if isinstance(values, np.ndarray) else list(values)


def typed_ids(values: Any, what: str) -> np.ndarray | list[str]:
    """Integers as an int64 array, strings as a list; anything else is an error that names the row."""
    if not (isinstance(values, np.ndarray) and values.dtype.kind in "iu"):
        values = as_list(values)
        kinds = set(map(type, values))
        if all(issubclass(kind, str) for kind in kinds):
            return list(values)
        if any(kind is bool or not issubclass(kind, (int, np.integer)) for kind in kinds):
            first = str if isinstance(values[0], str) else (int, np.integer)
            row = next(i for i, v in enumerate(values) if not isinstance(v, first) or isinstance(v, bool))
            null = values[row] is None or values[row] != values[row]
            problem = f"a null {what}" if null else f"{what} {values[row]!r} is {type(values[row]).__name__}"
            raise ValueError(f"row {row}: {problem}; give all strings or all integers, none of them null")
    try:
        array = np.ascontiguousarray(values, dtype=np.int64)
        if isinstance(values, np.ndarray) and values.dtype.kind == "u" and (array < 0).any():
            raise OverflowError
    except OverflowError:
        raise ValueError(f"an integer {what} does not fit 64 bits; give such ids as strings") from None
    return array


def encode(values: np.ndarray | list[str]) -> list[bytes]:
    if isinstance(values, np.ndarray):
        raw = values.astype("<i8").tobytes()
        return [raw[i : i + 8] for i in range(0, len(raw), 8)]
    return [value.encode("utf-8", "surrogatepass") for value in values]


def hash_bytes(encoded: list[bytes]) -> np.ndarray:
    hashes = np.frombuffer(b"".join([blake2b(b, digest_size=8).digest() for b in encoded]), dtype="<i8")
    return np.where(hashes == 0, 1, hashes)


def pack(encoded: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes in one array, and the offsets `(n + 1,)` where each begins and ends."""
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def checked_vectors(vectors: Any, size: int) -> np.ndarray:
    """float32 `(size, width)`, every row finite and not zero."""
    remedy = "fix or drop the item, or build without vectors"
    if hasattr(vectors, "to_pylist"):  # arrow: its lists become numpy views, not lists of Python floats
        vectors = vectors.to_numpy(zero_copy_only=False) if hasattr(vectors, "buffers") else vectors.to_numpy()
    if not isinstance(vectors, np.ndarray) or vectors.dtype == object:
        widths = [0 if vector is None else np.size(vector) for vector in vectors]
        row = next((i for i, width in enumerate(widths) if width != widths[0] or width == 0), None)
        if row is not None:
            problem = f"row {row}: a vector of width {widths[row]}, row 0 has {widths[0]}"
            raise ValueError(f"{problem}; {remedy}")
        vectors = np.concatenate(list(vectors)).reshape(len(widths), -1)
    if vectors.dtype.kind not in "fiu":
        raise ValueError(f"vectors hold {vectors.dtype}, not numbers; give float32 (n, width)")
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != size or matrix.shape[1] == 0:
        raise ValueError(f"vectors have the shape {matrix.shape}; expected ({size}, width), one an item")
    for problem, wrong in (
        ("a NaN or infinite vector", ~np.isfinite(matrix).all(axis=1)),
        ("a vector of zeros", ~matrix.any(axis=1)),
    ):
        if wrong.any():
            raise ValueError(f"row {np.flatnonzero(wrong)[0]}: {problem} ({wrong.sum()} such rows); {remedy}")
    return matrix


def feature_bags(features: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all feature strings in one array, and the offsets `(size + 1,)` of each item's bag."""
    bags = [() if bag is None else bag for bag in as_list(features)]
    if len(bags) != size:
        raise ValueError(f"{len(bags)} feature lists for {size} items; give one list (or None) an item")
    for row, bag in enumerate(bags):
        if isinstance(bag, str) or not isinstance(bag, Iterable) or not all(isinstance(f, str) for f in bag):
            raise ValueError(f"row {row}: features {bag!r} are no list of strings; write ['author=17', ...]")
    offsets = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, bags), np.int64, size), out=offsets[1:])
    distinct = list(dict.fromkeys(chain.from_iterable(bags)))  # few: hash each once
    table = dict(zip(distinct, stable_hash(distinct).tolist(), strict=True))
    hashes = np.fromiter(map(table.__getitem__, chain.from_iterable(bags)), np.int64, int(offsets[-1]))
    return hashes, offsets


def seconds(times: Any, missing: int, name: str, size: int) -> np.ndarray:
    """int64 `(size,)`, `missing` where a time is None."""
    if times is None:
        return np.full(size, missing, dtype=np.int64)
    if not (isinstance(times, np.ndarray) and times.dtype.kind in "iu"):
        values = [missing if time is None else time for time in as_list(times)]
        for row, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"row {row}: {name} {value!r} is no whole number of seconds, nor None")
        times = np.array(values, dtype=np.int64)
    if times.shape != (size,):
        raise ValueError(f"{name} has {len(times)} times for {size} items; give one (or None) an item")
    return times.astype(np.int64)


def raise_duplicate(values: np.ndarray | list[str]) -> None:
    seen: dict[Any, int] = {}
    for row, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
        if value in seen:
            raise ValueError(f"row {row}: id {value!r} is row {seen[value]}'s too; keep one row an item")
        seen[value] = row
