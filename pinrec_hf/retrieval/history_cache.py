"""`HistoryCache`: a returning user's history is not computed again, only what happened since.

Attention is causal and positions count from the start of the window, so that an event's keys and values depend on what
came before it alone. They are kept for every event that a request had, and reused for as many as the next request
begins with, whatever is different after them: a query that was the last request's, an event that was inserted or
changed. Once a window slides, every position changes, and all of it is computed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pinrec_hf.modeling.configuration_pinrec import PinRecConfig

Key = tuple[str, str, str]
"""Fingerprint of weights and catalogues, adapter, user."""


@dataclass(frozen=True)
class _Entry:
    """What the model read of each event, int64 `(events, 7)`, and the keys and values that it made of them,
    `(layers, 2, heads, events, head_dim)`."""

    events: np.ndarray
    states: Tensor

    @property
    def bytes(self) -> int:
        return self.events.nbytes + self.states.numel() * self.states.element_size()


class HistoryCache:
    """Keys and values of users' events; those of the users who were away longest make room.

    Several retrievers may share one: an entry belongs to a model, its catalogue and an adapter. Any thread may call.

    Args:
        max_bytes: of all entries. One of 512 events of the preset `small` takes 1 MiB.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def forget(self, user_id: str | int) -> None:
        """Drop what is kept of a user, of every model."""
        with self._lock:
            for key in [key for key in self._entries if key[2] == str(user_id)]:
                self.bytes -= self._entries.pop(key).bytes

    def length(self, key: Key | None) -> int:
        """Events that are kept under a key, the start event included."""
        entry = None if key is None else self._entries.get(key)
        return 0 if entry is None else len(entry.events)

    def open(self, keys: Sequence[Key | None], batch: Mapping[str, Tensor], config: PinRecConfig) -> DynamicCache:
        """What `PinRecGeneration.generate` takes as `cache`: all rows' events but the last n, the fewest that all need.

        Args:
            keys: one a row, `None` for a user without a name. batch: the rows, padded on the left.
        """
        events, lengths = events_of(batch), batch["attention_mask"].sum(1).tolist()
        width = events.shape[1]
        entries = [self._find(key) for key in keys]
        # the last event is always computed: its hidden state is asked for, and not kept
        new = max(
            max(1, length - _agreeing(entry, row[width - length :]))
            for entry, row, length in zip(entries, events, lengths, strict=True)
        )
        cache, past = DynamicCache(), width - new
        if past:
            heads = config.num_attention_heads
            shape = (_layers(config), 2, len(keys), heads, past, config.hidden_size // heads)
            some = next(entry.states for entry in entries if entry is not None)
            states = some.new_zeros(shape)
            for row, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
                if entry is not None and length > new:
                    states[:, :, row, :, width - length : past] = entry.states[..., : length - new, :]
            for layer, (layer_keys, layer_values) in enumerate(states):
                cache.update(layer_keys, layer_values, layer)
        return cache

    def keep(self, keys: Sequence[Key | None], batch: Mapping[str, Tensor], cache: Any, last: Sequence[bool]) -> None:
        """Takes over what `generate` added to a cache of `open`.

        Args:
            last: of each row, whether its last event may be kept: not one whose vector came with the request.
        """
        events, lengths = events_of(batch), batch["attention_mask"].sum(1).tolist()
        width = events.shape[1]
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            kept = slice(width - length, width if last[row] else width - 1)
            if key is None or _agreeing(self._find(key), events[row, kept]) == kept.stop - kept.start:
                continue
            states = torch.stack(
                [torch.stack([part[row, :, kept] for part in (layer.keys, layer.values)]) for layer in cache.layers]
            )
            self._put(key, _Entry(events[row, kept].copy(), states))

    def _find(self, key: Key | None) -> _Entry | None:
        with self._lock:
            if key is None or key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def _put(self, key: Key, entry: _Entry) -> None:
        with self._lock:
            if key in self._entries:
                self.bytes -= self._entries.pop(key).bytes
            if entry.bytes > self.max_bytes:
                return
            self._entries[key] = entry
            self.bytes += entry.bytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1].bytes


def events_of(batch: Mapping[str, Tensor]) -> np.ndarray:
    """All that the model reads of each event, int64 `(batch, length, 7)`."""
    columns: list[Any] = [batch["item_ids"][batch["event_items"]], batch["query_hashes"][batch["event_queries"]]]
    names = ("event_types", "surface_ids", "outcome_sets", "timestamps", "time_gaps")
    return torch.stack([*columns, *(batch[name] for name in names)], -1).cpu().numpy()


def _agreeing(entry: _Entry | None, events: np.ndarray) -> int:
    """How many events the two begin with in common."""
    if entry is None:
        return 0
    both = min(len(entry.events), len(events))
    differs = (entry.events[:both] != events[:both]).any(1)
    return int(differs.argmax()) if differs.any() else both


def _layers(config: PinRecConfig) -> int:
    return config.num_hidden_layers + config.pooled_history
