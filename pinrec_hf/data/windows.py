"""Training rows: the sequences dataset, encoded once, memory-mapped, and cut into windows."""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT
from pinrec_hf.modeling.tokenization_pinrec import EVENT_COLUMNS, HISTORY_COLUMNS, EncodedRow, PinRecTokenizer

ENCODING = 5
"""Raise it when rows are encoded in another way, so that what is cached is not taken for it."""


def encode_split(data: str | Path, split: str, tokenizer: PinRecTokenizer) -> datasets.Dataset:
    """One split of a sequences dataset, encoded by the tokenizer.

    The result is a memory-mapped Arrow file in the `datasets` cache, found again by what the tokenizer and the
    files are; only a batch of rows is ever in Python.

    Raises:
        FileNotFoundError: if the folder is no sequences dataset.
    """
    files = sorted(str(path) for path in (Path(data) / split).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{data} has no {split}/*.parquet; make it with `pinrec prepare`")
    rows = datasets.load_dataset("parquet", data_files=list(map(glob.escape, files)), split="train")
    features = {name: datasets.List(datasets.Value(np.dtype(t).name)) for name, t in EVENT_COLUMNS.items()}
    what = [rows._fingerprint, tokenizer.catalogue.fingerprint, *map(str, (tokenizer.surfaces, tokenizer.outcomes))]
    what += map(
        str,
        (tokenizer.negative_outcomes, tokenizer.keep_ignored, tokenizer.contexts, tokenizer.request_features, ENCODING),
    )
    return rows.map(
        lambda batch: _encode_columns(batch, tokenizer),
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features(features),
        new_fingerprint=hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32],
        desc=f"Encoding {split}",
    )


def _encode_columns(batch: dict[str, list], tokenizer: PinRecTokenizer) -> dict[str, list[np.ndarray]]:
    columns = [name for name in HISTORY_COLUMNS if name in batch]
    histories = [dict(zip(columns, row, strict=True)) for row in zip(*(batch[name] for name in columns), strict=True)]
    rows = tokenizer.encode(histories)
    return {name: [row[name] for row in rows] for name in EVENT_COLUMNS}


class SequenceDataset(torch.utils.data.Dataset):
    """Windows of encoded rows, each with its place in the epoch as a key for the collator's random choices.

    A row longer than a window gives several, counted from its newest event; each event is in one of them.

    Args:
        encoded: what `encode_split` gave.
        window (`int`): events in a window, at most.
    """

    def __init__(self, encoded: datasets.Dataset, window: int) -> None:
        self.window, self.epoch = window, 0
        self._columns = {name: ListColumn(encoded.data.column(name)) for name in EVENT_COLUMNS}
        self._times = self._columns["timestamps"]
        self.row_lengths = self._columns["items"].lengths
        counts = -(-self.row_lengths // window)
        self._first = np.cumsum(counts) - counts
        self._rows = np.repeat(np.arange(len(self.row_lengths)), counts)
        self._parts = np.arange(len(self._rows)) - np.repeat(self._first, counts)
        self._kept = np.ones(len(self._rows), bool)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader; a part of every window's key."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        """int64 `(windows,)`: events in each window."""
        return np.minimum(self.window, self.row_lengths[self._rows] - self._parts * self.window)

    def __getitem__(self, index: int) -> EncodedRow:
        row, part = int(self._rows[index]), int(self._parts[index])
        end = int(self.row_lengths[row]) - part * self.window
        start = max(0, end - self.window)
        window: EncodedRow = {name: column.slice(row, start, end) for name, column in self._columns.items()}
        window["key"] = np.array([self.epoch, index])
        return window

    def column(self, name: str) -> Iterator[np.ndarray]:
        """All events' values of a column, a chunk of rows at a time."""
        return self._columns[name].chunks()

    def target_counts(self, positive_mask: int, num_items: int, ahead: int = 1) -> np.ndarray:
        """float64 `(num_items + 2,)`: how often each item id is a target in an epoch, on average.

        That is what `PretrainingCollator` makes a target: a positive event on an item that the user has not acted on
        before in the window; with `ahead` above 1 one of the next so many, drawn in the place of each.
        """
        counts = np.zeros(num_items + FIRST_ITEM)
        for windows, targets in self._all_targets(positive_mask, num_items):
            kept = self._kept[windows]
            draws = _expected_draws(windows[kept], ahead)
            counts += np.bincount(targets["items"][kept], draws, minlength=len(counts))
        return counts

    def condition_counts(self, positive_mask: int, num_items: int, num_surfaces: int, num_outcomes: int) -> np.ndarray:
        """The same whoever asks, under each surface and under each outcome: int64 `(1 + num_surfaces + num_outcomes,
        num_items + 2)`.

        A target with several outcomes counts under all of them.
        """
        counts = np.zeros((1 + num_surfaces + num_outcomes, num_items + FIRST_ITEM), np.int64)
        for windows, targets in self._all_targets(positive_mask, num_items):
            items, where, what = (targets[name][self._kept[windows]] for name in ("items", "surfaces", "outcomes"))
            under = [np.ones(len(items), bool), *(where == i + 1 for i in range(num_surfaces))]
            under += [(what & positive_mask & 1 << i + 1) != 0 for i in range(num_outcomes)]
            for row, mask in zip(counts, under, strict=True):
                row += np.bincount(items[mask], minlength=len(row))
        return counts

    def keep_recent(self, positive_mask: int, num_items: int, *, since: int, replay: float, seed: int) -> None:
        """Keeps the windows with a target after `since` (seconds), and a random share `replay` of the others."""
        self._kept = np.random.default_rng(seed).random(len(self._kept)) < replay
        for windows, targets in self._all_targets(positive_mask, num_items):
            self._kept[windows[targets["timestamps"] > since]] = True
        self._rows, self._parts = self._rows[self._kept], self._parts[self._kept]

    def _all_targets(self, positive_mask: int, num_items: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Window and columns of each target in order, a chunk of rows at a time; windows are counted before any was
        left out."""
        names = ("types", "items", "outcomes", "timestamps", "surfaces")
        row = 0
        for lengths, *values in zip(
            self._columns["items"].chunk_lengths, *(self._columns[name].chunks() for name in names), strict=True
        ):
            columns = dict(zip(names, values, strict=True))
            types, items, outcomes = (columns[name] for name in ("types", "items", "outcomes"))
            acted = np.flatnonzero((types == ITEM_EVENT) & (items >= FIRST_ITEM) & (outcomes > 0))
            parts = (np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(items))) // self.window
            windows = np.repeat(self._first[row : row + len(lengths)], lengths) + parts
            row += len(lengths)
            keys = windows[acted] * (num_items + FIRST_ITEM) + items[acted]
            first = np.sort(acted[np.unique(keys, return_index=True)[1]])
            first = first[(outcomes[first] & positive_mask) != 0]
            yield windows[first], {name: column[first] for name, column in columns.items()}

    def time_range(self) -> tuple[int, int]:
        """Earliest and latest known time of the targets, seconds since epoch; (0, 0) if none is known."""
        first, last = np.iinfo(np.int64).max, -1
        for times in self._times.chunks():
            known = times[times >= 0]
            if len(known):
                first, last = min(first, int(known.min())), max(last, int(known.max()))
        return (0, 0) if last < 0 else (first, last)


def _expected_draws(windows: np.ndarray, ahead: int) -> np.ndarray:
    """How often each target is drawn where each place draws one of the next `ahead` of its window, or of those left.

    Args:
        windows: of the targets, in order.
    """
    place = np.arange(len(windows))
    begins = np.diff(windows, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(begins, place, 0))
    left = np.append(place[begins], len(windows))[begins.cumsum()] - place
    chance = np.concatenate([[0.0], np.cumsum(1 / np.minimum(ahead, left))])
    return chance[place + 1] - chance[np.maximum(start, place - ahead + 1)]


class ListColumn:
    """A chunked Arrow list column as zero-copy numpy slices."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self.chunk_lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *self.chunk_lengths]).astype(np.int64)

    def slice(self, row: int, start: int, end: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        base = int(self._offsets[chunk][row - self._starts[chunk]])
        return self._values[chunk][base + start : base + end]

    def row(self, row: int) -> np.ndarray:
        return self.slice(row, 0, int(self.lengths[row]))

    def chunks(self) -> Iterator[np.ndarray]:
        for offsets, values in zip(self._offsets, self._values, strict=True):
            yield values[offsets[0] : offsets[-1]]


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A random order in which neighbours have similar lengths, drawn from (seed, epoch) alone.

    transformers' own sampler of that name draws from the global generator, which a resumed run restores only after
    the next batch was drawn; this one gives the same order however often a run was killed.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, batches_per_group: int = 50) -> None:
        self.sizes, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.group = batch_size * batches_per_group

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.sizes))
        groups = [
            group[np.argsort(-self.sizes[group], kind="stable")]
            for group in np.split(order, range(self.group, len(order), self.group))
        ]
        batches = [b for group in groups for b in np.split(group, range(self.batch_size, len(group), self.batch_size))]
        # a short batch goes last, or all later batches would be cut across groups
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        rng.shuffle(full)
        yield from np.concatenate([*full, *short, np.zeros(0, np.int64)]).astype(int).tolist()
