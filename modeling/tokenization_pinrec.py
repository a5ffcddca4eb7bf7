"""`PinRecTokenizer`: rows of a log, and requests, to the tensors of a `PinRecModel`.

Two steps, so that training does the first once and the second for every batch:
- `encode` (of `EventEncoder`): names and ids to integer columns, one entry an event (`EncodedRow`);
- `pad`: encoded rows to a batch, with the table of its distinct items and queries.
Calling the tokenizer does both for requests.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .catalogue_pinrec import Catalogue, stable_hash
from .configuration_pinrec import FIRST_ITEM, NO_ITEM, QUERY_EVENT, START_EVENT, SUBJECT_EVENT, UNKNOWN_ITEM
from .events_pinrec import EVENT_COLUMNS, HISTORY_COLUMNS, EncodedRow, EventEncoder, checked_times, packed_features

SAME_SEARCH = 1_800
"""Seconds after a query that a request for it is still the same feed view, as `prepare` tells views apart."""


class PinRecTokenizer(EventEncoder, PreTrainedTokenizerBase):
    """Rows and requests to tensors; holds the vocabulary and the memory-mapped catalogue.

    Args:
        catalogue_file (`str`, *optional*), queries_file (`str`, *optional*): the saved catalogues of items and of
            queries with a vector, as `from_pretrained` finds them.
        catalogue (`Catalogue`, *optional*), queries (`Catalogue`, *optional*): the same, already open.
        surfaces, outcomes, negative_outcomes (`list[str]`): as in [`PinRecConfig`].
        keep_ignored (`bool`): whether impressions that were ignored stay in a history.
        contexts (`bool`): whether search queries and subject items are events; without them only items are.
        request_features (`bool`): whether the model reads request features (`request_feature_buckets` > 0). They
            are a condition of the request that asks, never a part of the history's events.
        model_max_length (`int`): events that fit, the start and the context of a request included.
    """

    vocab_files_names = {"catalogue_file": "catalogue.safetensors", "queries_file": "queries.safetensors"}
    model_input_names = ["event_items", "event_types", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        catalogue_file: str | None = None,
        queries_file: str | None = None,
        *,
        surfaces: Sequence[str] = (),
        outcomes: Sequence[str] = (),
        negative_outcomes: Sequence[str] = (),
        keep_ignored: bool = False,
        contexts: bool = True,
        request_features: bool = False,
        catalogue: Catalogue | None = None,
        queries: Catalogue | None = None,
        **kwargs: Any,
    ) -> None:
        found = catalogue if catalogue_file is None else Catalogue.open(catalogue_file)
        self.query_catalogue = queries if queries_file is None else Catalogue.open(queries_file)
        if found is None:
            raise ValueError("a PinRecTokenizer needs a catalogue: pass catalogue_file= or catalogue=")
        EventEncoder.__init__(
            self, found, surfaces, outcomes, negative_outcomes, keep_ignored, contexts, request_features
        )
        kwargs.setdefault("model_max_length", 256)
        PreTrainedTokenizerBase.__init__(
            self,
            surfaces=self.surfaces,
            outcomes=self.outcomes,
            negative_outcomes=self.negative_outcomes,
            keep_ignored=keep_ignored,
            contexts=contexts,
            request_features=request_features,
            **kwargs,
        )
        if self.model_max_length < 2:
            raise ValueError(f"model_max_length={self.model_max_length}: a start event and one more need at least 2")

    # -- codes to tensors ----------------------------------------------------------------------------------------

    def pad(  # type: ignore[override]  # takes rows of events, not of token ids
        self,
        encoded_inputs: Sequence[EncodedRow],
        extra_items: np.ndarray | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encoded rows, each cut to its most recent events that fit, to a padded batch.

        Args:
            encoded_inputs: what `encode` gave; a start event is put before each. A key `query_vector` (float32
                `(query_size,)`) is the vector of the row's last event, a query.
            extra_items (int64 `(n,)`, *optional*): item ids that the item table must hold too.
            max_length: events that fit, the start included; `model_max_length` by default.

        Returns:
            `event_*`, `surface_ids`, `outcome_sets`, `timestamps`, `time_gaps`, `attention_mask` of shape
            `(batch, length)` and the tables of items and queries: see `PinRecModel.forward`.
        """
        rows = [_with_start(row, max_length or self.model_max_length) for row in encoded_inputs]
        lengths = np.array([len(row["items"]) for row in rows])
        width = int(lengths.max())
        # left: the last event of every row stands in the last column
        offsets = width - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        place = np.arange(width)[None] - offsets[:, None]
        mask = (place >= 0) & (place < lengths[:, None])

        def grid(name: str, fill: int) -> np.ndarray:
            values = np.full(mask.shape, fill, np.int64)
            values[mask] = np.concatenate([row[name] for row in rows])
            return values

        timestamps, items, queries = grid("timestamps", -1), grid("items", NO_ITEM), grid("queries", 0)
        gaps = np.full_like(timestamps, -1)
        gaps[:, 1:] = np.where((timestamps[:, 1:] >= 0) & (timestamps[:, :-1] >= 0), np.diff(timestamps), -1)
        batch = {
            "event_types": grid("types", START_EVENT),
            "surface_ids": grid("surfaces", 0),
            "outcome_sets": grid("outcomes", 0),
            "timestamps": timestamps,
            "time_gaps": np.where(gaps < 0, -1, gaps),
            "attention_mask": mask.astype(np.int64),
        }
        extra = np.zeros(0, np.int64) if extra_items is None else extra_items
        table = np.unique(np.concatenate([items.ravel(), extra, [NO_ITEM, UNKNOWN_ITEM]]))
        batch["event_items"] = np.searchsorted(table, items)
        batch.update(self.item_table(table))
        brought = [i for i, row in enumerate(rows) if "query_vector" in row]
        # always there, be it with the one row "no query": under DDP every encoder must run on every process
        hashes = np.unique(np.append(queries, 0))
        batch["event_queries"] = np.searchsorted(hashes, queries)
        # a vector that a request brings is its own: another row may ask the same text with another or none
        last = brought, (offsets + lengths)[brought] - 1
        batch["event_queries"][last] = len(hashes) + np.arange(len(brought))
        batch["query_hashes"] = np.append(hashes, queries[last])
        if self.query_size:
            vectors = [rows[i]["query_vector"][None] for i in brought]
            batch["query_vectors"] = np.concatenate([self._query_vectors(hashes), *vectors])
        return BatchEncoding({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in batch.items()})

    def item_table(self, item_ids: np.ndarray) -> dict[str, np.ndarray]:
        """What the catalogue knows of items: the inputs of `PinRecModel.get_item_features`.

        Args:
            item_ids (int64 `(items,)`): 0 none, 1 unknown, catalogue row + 2.
        """
        real = item_ids >= FIRST_ITEM
        rows = item_ids[real] - FIRST_ITEM
        table = {"item_ids": item_ids, "item_hashes": np.zeros(len(item_ids), np.int64)}
        table["item_hashes"][real] = self.catalogue.hashes(rows)
        if self.catalogue.content_size:
            table["item_vectors"] = np.zeros((len(item_ids), self.catalogue.content_size), np.float32)
            table["item_vectors"][real] = self.catalogue.vectors(rows)
        features = self.catalogue.features(rows)
        table["item_features"] = np.zeros((len(item_ids), max(features.shape[1], 1)), np.int64)
        table["item_features"][real, : features.shape[1]] = features
        return table

    @property
    def query_size(self) -> int:
        """Width of the queries' content vectors, 0 for none."""
        return self.query_catalogue.content_size if self.query_catalogue is not None else 0

    def _query_vectors(self, hashes: np.ndarray) -> np.ndarray:
        vectors = np.zeros((len(hashes), self.query_size), np.float32)
        if self.query_catalogue is not None:
            known = self.query_catalogue.rows_of_hashes(hashes)
            vectors[known >= 0] = self.query_catalogue.vectors(known[known >= 0])
        return vectors

    def __call__(
        self,
        histories: Sequence[Mapping[str, Sequence]],
        *,
        surface: str | Sequence[str | None] | None = None,
        timestamp: int | Sequence[int | None] | None = None,
        query: str | Sequence[str | None] | None = None,
        query_embedding: Sequence | None = None,
        context_item_id: Any = None,
        request_features: Sequence | None = None,
        num_steps: int = 1,
        return_tensors: str = "pt",
    ) -> BatchEncoding:
        """Requests to a batch: each history, then the request's query or subject item as the last event.

        Args:
            histories: one dict of columns a request (see `encode`); `{}` is a user without any history.
            surface, timestamp (int seconds, UTC), query, query_embedding (floats `(query_size,)`),
                context_item_id, request_features (list of strings such as `device=ios`, five at most): of the request;
                one for all, or a list of one each.
            num_steps: steps that will be generated: all but the first need a free position.

        Returns:
            what `pad` gives, and one target for each request: `target_positions`, `target_surfaces`,
            `target_outcomes` (unspecified), `target_timestamps` and, where the model reads them, `target_features`,
            each `(batch, 1)`.

        Raises:
            ValueError: an unknown surface, outcome or column; lists of another length than `histories`; a query
                beside a subject item; a query vector of the wrong width; request features that the model doesn't read.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: a PinRecModel takes PyTorch tensors, 'pt'")
        if not 1 <= num_steps < self.model_max_length:
            raise ValueError(f"num_steps={num_steps} must lie between 1 and {self.model_max_length - 1}: no more fit")
        if isinstance(histories, Mapping):
            histories = [histories]
        if not len(histories):
            raise ValueError("no histories: give a list of at least one; {} is a user without any")
        n = len(histories)
        surfaces, times, queries, subjects, vectors, features = (
            _one_each(name, value, n, nested=name in ("query_embedding", "request_features"))
            for name, value in {
                "surface": surface, "timestamp": timestamp, "query": query, "context_item_id": context_item_id,
                "query_embedding": query_embedding, "request_features": request_features,
            }.items()
        )  # fmt: skip
        rows = self.encode(histories, strict=True)
        surface_codes = np.array([self.surface_code(name) for name in surfaces], np.int64)
        seconds = checked_times(times, "request", np.arange(n))
        subject_codes = self.item_codes(subjects)
        for i, row in enumerate(rows):
            is_subject = subjects[i] is not None
            if is_subject and (queries[i] is not None or vectors[i] is not None):
                raise ValueError(f"request {i} has both a query and a context_item_id; give the one it is about")
            if not self.contexts or (queries[i] is None and not is_subject and vectors[i] is None):
                continue
            if not isinstance(queries[i], str | None):
                raise ValueError(f"the query of request {i} is {queries[i]!r}; it must be a string")
            text_hash = 0 if is_subject else int(stable_hash([queries[i] or ""])[0])
            if vectors[i] is not None:
                row["query_vector"] = self._checked_query_vector(vectors[i], i)
            if text_hash and _ends_with(row, text_hash, surface_codes[i], seconds[i]):
                continue  # as in training, where a feed view's query stands in the log once
            last = {
                "types": SUBJECT_EVENT if is_subject else QUERY_EVENT, "items": subject_codes[i],
                "queries": text_hash, "surfaces": surface_codes[i], "outcomes": 0, "timestamps": seconds[i],
                "requests": -1, "weights": 1, "features": 0, "positions": -1,
            }  # fmt: skip
            row |= {name: np.append(row[name], last[name]).astype(row[name].dtype) for name in EVENT_COLUMNS}
        batch = self.pad(rows, max_length=self.model_max_length - num_steps + 1)
        lengths = batch["attention_mask"].sum(-1)
        width = batch["attention_mask"].shape[1]
        last_position = torch.full_like(lengths, width - 1) if self.padding_side == "left" else lengths - 1
        batch["target_positions"] = last_position[:, None]
        batch["target_surfaces"] = torch.from_numpy(surface_codes)[:, None]
        batch["target_outcomes"] = torch.zeros(n, 1, dtype=torch.int64)
        batch["target_timestamps"] = torch.from_numpy(seconds)[:, None]
        if self.request_features:
            batch["target_features"] = torch.from_numpy(packed_features(features))[:, None]
        elif any(given is not None for given in features):
            raise ValueError(
                "this model does not read request_features: leave them out, or pretrain with "
                "request_feature_buckets > 0"
            )
        return batch

    def _checked_query_vector(self, vector: Any, i: int) -> np.ndarray:
        if not self.query_size:
            raise ValueError(f"request {i} has a query_embedding, but this model was trained without query vectors")
        vector = np.asarray(vector, np.float32)
        if vector.shape != (self.query_size,):
            raise ValueError(
                f"query_embedding of request {i} has shape {vector.shape}; it must be ({self.query_size},)"
            )
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError(f"query_embedding of request {i} is zero, or holds NaN or infinity; leave it out instead")
        return vector

    # -- what PreTrainedTokenizerBase asks for --------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return len(self.catalogue) + FIRST_ITEM

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def get_vocab(self) -> dict[Any, int]:
        """Every item id with its code; as large as the catalogue."""
        return {item: i + FIRST_ITEM for i, item in enumerate(self.catalogue.ids(np.arange(len(self.catalogue))))}

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"PinRecTokenizer(items={len(self.catalogue)}, surfaces={self.surfaces}, outcomes={self.outcomes}, "
            f"negative_outcomes={self.negative_outcomes}, model_max_length={self.model_max_length})"
        )

    def decode(self, token_ids: Any, **kwargs: Any) -> list[Any]:  # type: ignore[override]  # ids, not text
        """Item codes back to item ids; `None` for none and unknown."""
        codes = np.atleast_1d(np.asarray(token_ids, np.int64))
        real = codes >= FIRST_ITEM
        ids = iter(self.catalogue.ids(codes[real] - FIRST_ITEM))
        return [next(ids) if is_real else None for is_real in real]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `catalogue.safetensors` and, where queries have vectors, `queries.safetensors`."""
        written = []
        for catalogue, name in zip(
            (self.catalogue, self.query_catalogue), self.vocab_files_names.values(), strict=True
        ):
            if catalogue is not None:
                path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{name}"
                catalogue.save(path)
                written.append(str(path))
        return tuple(written)


def _with_start(row: EncodedRow, max_length: int) -> EncodedRow:
    start = {"types": START_EVENT, "timestamps": -1, "requests": -1, "weights": 1}
    cut = {name: np.concatenate([[start.get(name, 0)], row[name][-(max_length - 1) :]]) for name in EVENT_COLUMNS}
    return {**row, **cut}


def _ends_with(row: EncodedRow, text_hash: int, surface: int, second: int) -> bool:
    """Whether a history's last event is this very search, not an older one for the same words."""
    if not len(row["types"]) or row["types"][-1] != QUERY_EVENT or row["queries"][-1] != text_hash:
        return False
    asked = int(row["timestamps"][-1])
    return row["surfaces"][-1] == surface and (min(asked, second) < 0 or second - asked <= SAME_SEARCH)


def _one_each(name: str, value: Any, n: int, nested: bool) -> list:
    is_list = isinstance(value, list | tuple | np.ndarray)
    if nested and is_list and not (len(value) and (value[0] is None or np.ndim(value[0]))):
        is_list = False  # one vector for all
    if not is_list:
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} histories")
    return list(value)


__all__ = ["EVENT_COLUMNS", "HISTORY_COLUMNS", "EncodedRow", "PinRecTokenizer"]
