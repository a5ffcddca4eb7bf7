"""`PinRecTokenizer`: rows of a log, and requests, to the tensors of a `PinRecModel`.

Two steps, so that training does the first once and the second for every batch:
- `encode`: names and ids to integer columns, one entry an event (`EncodedRow`);
- `pad`: encoded rows to a batch, with the table of its distinct items and queries.
Calling the tokenizer does both for requests.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .catalogue_pinrec import Catalogue, stable_hash
from .configuration_pinrec import (
    FIRST_ITEM,
    ITEM_EVENT,
    MAX_REQUEST_FEATURES,
    NO_ITEM,
    QUERY_EVENT,
    REQUEST_FEATURE_BITS,
    START_EVENT,
    SUBJECT_EVENT,
    UNKNOWN_ITEM,
)

EVENT_COLUMNS = {
    "types": np.int8,
    "items": np.int64,
    "queries": np.int64,
    "surfaces": np.int16,
    "outcomes": np.int64,
    "timestamps": np.int64,
    "requests": np.int64,
    "weights": np.float32,
    "features": np.int64,
}
"""Columns of an encoded row: event type, item id (catalogue row + 2), hash of the query's text (0 none), surface
code, outcome bit set, seconds since epoch (-1 unknown), feed view, loss weight, request features (packed hashes)."""

EncodedRow = dict[str, np.ndarray]

HISTORY_COLUMNS = (
    "item_id", "surface", "timestamp", "outcomes", "query", "context_item_id", "request_id", "weight",
    "request_features",
)  # fmt: skip
UNUSED_COLUMNS = ("position",)
LATEST = 1 << 35
"""Seconds since epoch of the year 3058: a larger time is in another unit."""


class PinRecTokenizer(PreTrainedTokenizerBase):
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
        **kwargs,
    ) -> None:
        found = catalogue if catalogue_file is None else Catalogue.open(catalogue_file)
        self.query_catalogue = queries if queries_file is None else Catalogue.open(queries_file)
        if found is None:
            raise ValueError("a PinRecTokenizer needs a catalogue: pass catalogue_file= or catalogue=")
        self.catalogue: Catalogue = found
        self.surfaces, self.outcomes = list(surfaces), list(outcomes)
        self.negative_outcomes, self.keep_ignored, self.contexts = list(negative_outcomes), keep_ignored, contexts
        self.request_features = request_features
        kwargs.setdefault("model_max_length", 256)
        super().__init__(
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
        self._surface_codes: dict[Any, int] = {None: 0, **{name: i + 1 for i, name in enumerate(self.surfaces)}}
        self._outcome_codes = {name: i + 1 for i, name in enumerate(self.outcomes)}

    # -- names to codes ------------------------------------------------------------------------------------------

    @property
    def positive_mask(self) -> int:
        """Bit set of the outcomes that can be a target."""
        return sum(1 << self._outcome_codes[name] for name in self.outcomes if name not in self.negative_outcomes)

    def surface_code(self, surface: str | None) -> int:
        """Code of a request's surface (`None` is unknown, 0).

        Raises:
            ValueError: for a name that the model does not know.
        """
        if surface not in self._surface_codes:
            raise ValueError(f"surface {surface!r} is not among this model's surfaces {self.surfaces}")
        return self._surface_codes[surface]

    def outcome_code(self, outcome: str | None) -> int:
        """Code of a wanted outcome (`None` is unspecified, 0).

        Raises:
            ValueError: for a name that the model does not know, or a negative outcome.
        """
        if outcome is None:
            return 0
        wanted = [name for name in self.outcomes if name not in self.negative_outcomes]
        if outcome not in self._outcome_codes:
            raise ValueError(f"outcome {outcome!r} is not among this model's outcomes {wanted}")
        if outcome in self.negative_outcomes:
            raise ValueError(f"outcome {outcome!r} is negative and cannot be asked for; choose among {wanted}")
        return self._outcome_codes[outcome]

    def item_codes(self, ids: Sequence[Any]) -> np.ndarray:
        """int64 item ids of the model: catalogue row + 2, 1 unknown, 0 where the id is `None`."""
        missing = np.fromiter((i is None for i in ids), bool, len(ids))
        codes = np.full(len(ids), NO_ITEM, np.int64)
        if not missing.all():
            rows = self.catalogue.rows([i for i in ids if i is not None])
            codes[~missing] = np.where(rows < 0, UNKNOWN_ITEM, rows + FIRST_ITEM)
        return codes

    # -- rows to codes -------------------------------------------------------------------------------------------

    def encode(self, histories: Sequence[Mapping[str, Sequence]], strict: bool = False) -> list[EncodedRow]:
        """Rows of the sequences dataset, or histories of requests, to integer columns.

        Ignored impressions are left out (unless `keep_ignored`), and the query or subject item of a feed view is
        put before its first event, as a request's is put last.

        Args:
            histories: dicts of equally long lists, oldest event first: `item_id` (`None` is a query event), and
                optionally `surface`, `timestamp` (int seconds, UTC), `outcomes` (lists of names; an empty one is
                shown and ignored), `query`, `context_item_id`, `request_id`, `weight`, `request_features` (targets
                only). `None` is unknown in every column; a history needs no `outcomes` where the model has only one
                positive outcome.
            strict: whether a name that the model does not know is an error (a request) or unknown (a log).

        Raises:
            ValueError: columns of different length or no lists; times that are no seconds since epoch; ids of
                another type than the catalogue's; in a request an unknown column or name.
        """
        lengths = np.array([_length(history, row, strict) for row, history in enumerate(histories)], np.int64)
        total, row = int(lengths.sum()), np.repeat(np.arange(len(lengths)), lengths)
        flat: dict[str, list] = {
            column: list(chain.from_iterable(map(_column, histories, [column] * len(histories), lengths.tolist())))
            for column in HISTORY_COLUMNS
            if column != "outcomes" and any(history.get(column) is not None for history in histories)
        }
        nothing = [None] * total
        if strict:
            for name in set(flat.get("surface", ())):
                self.surface_code(name)
        surfaces = [self._surface_codes.get(name, 0) for name in flat.get("surface", nothing)]
        query_text = flat.get("query", nothing)
        asked = np.fromiter((text is not None for text in query_text), bool, total)
        queries = np.zeros(total, np.int64)
        if asked.any():
            queries[asked] = stable_hash([text for text in query_text if text is not None])
        items = self.item_codes(flat["item_id"]) if total else np.zeros(0, np.int64)
        subjects = self.item_codes(flat.get("context_item_id", nothing))
        given = [
            self._given_outcomes(history, i, n) for i, (history, n) in enumerate(zip(histories, lengths, strict=True))
        ]
        outcomes = self._outcome_sets(list(chain.from_iterable(given)), row, strict)
        is_query = (items == NO_ITEM) & asked
        if strict and ((items == NO_ITEM) & ~asked).any():
            empty = row[(items == NO_ITEM) & ~asked][0]
            raise ValueError(f"history {empty} has an event with neither an item_id nor a query; leave such events out")
        events = {
            "types": np.where(is_query, QUERY_EVENT, ITEM_EVENT).astype(np.int8),
            "items": items,
            "queries": np.where(is_query, queries, 0),
            "surfaces": np.array(surfaces, np.int16),
            "outcomes": outcomes,
            "timestamps": _times(flat.get("timestamp", nothing), "history", row),
            "requests": np.array([-1 if r is None else r for r in flat.get("request_id", nothing)], np.int64),
            "weights": np.array([1 if w is None else w for w in flat.get("weight", nothing)], np.float32),
            "features": np.zeros(total, np.int64),
        }
        if self.request_features and "request_features" in flat:
            events["features"] = _packed_features(flat["request_features"])
        kept = np.flatnonzero((is_query & self.contexts) | (outcomes > 0) | (self.keep_ignored & ~is_query))
        events = {name: values[kept] for name, values in events.items()}
        row = row[kept]
        if self.contexts:
            events, row = _insert_contexts(events, row, np.where(is_query, 0, queries)[kept], subjects[kept])
        ends = np.cumsum(np.bincount(row, minlength=len(lengths)))
        parts = {name: np.split(values, ends[:-1]) for name, values in events.items()} if len(lengths) else {}
        return [{name: values[i] for name, values in parts.items()} for i in range(len(lengths))]

    def _given_outcomes(self, history: Mapping[str, Sequence], row: int, length: int) -> Sequence:
        if length and history.get("outcomes") is None:
            wanted = [name for name in self.outcomes if name not in self.negative_outcomes]
            if len(wanted) != 1:
                raise ValueError(
                    f"history {row} needs `outcomes`, a list of names for each event, from {self.outcomes}"
                )
            return [wanted] * length
        return _column(history, "outcomes", length)

    def _outcome_sets(self, outcomes: list, row: np.ndarray, strict: bool) -> np.ndarray:
        """int64 bit sets: bit 0 for an outcome that is unknown, no bit for an event that was ignored."""
        kinds = {kind for kind in set(map(type, outcomes)) if not issubclass(kind, _LISTS)}
        if kinds:
            event = next(i for i, names in enumerate(outcomes) if type(names) in kinds)
            raise ValueError(
                f"`outcomes` of history {row[event]} holds {outcomes[event]!r} where a list of names is due: "
                'write ["save"], not "save"'
            )
        lists = [() if names is None else names for names in outcomes]
        names = list(chain.from_iterable(lists))
        if strict and (unknown := sorted({*names} - {None, *self.outcomes}, key=str)):
            raise ValueError(f"outcomes {unknown} are not among this model's outcomes {self.outcomes}")
        bits = np.left_shift(np.int64(1), np.array([self._outcome_codes.get(name, 0) for name in names], np.int64))
        sets = np.fromiter((names is None for names in outcomes), np.int64, len(outcomes))
        np.bitwise_or.at(sets, np.repeat(np.arange(len(lists)), [len(names) for names in lists]), bits)
        return sets

    # -- codes to tensors ----------------------------------------------------------------------------------------

    def pad(  # type: ignore[override]  # takes rows of events, not of token ids
        self, encoded_inputs: Sequence[EncodedRow], extra_items: np.ndarray | None = None, **kwargs
    ) -> BatchEncoding:
        """Encoded rows, each cut to its most recent events that fit, to a padded batch.

        Args:
            encoded_inputs: what `encode` gave; a start event is put before each. A key `query_vector` (float32
                `(query_size,)`) is the vector of the row's last event, a query.
            extra_items (int64 `(n,)`, *optional*): item ids that the item table must hold too.

        Returns:
            `event_*`, `surface_ids`, `outcome_sets`, `timestamps`, `time_gaps`, `attention_mask` of shape
            `(batch, length)` and the tables of items and queries: see `PinRecModel.forward`.
        """
        rows = [_with_start(row, self.model_max_length) for row in encoded_inputs]
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
        return_tensors: str = "pt",
    ) -> BatchEncoding:
        """Requests to a batch: each history, then the request's query or subject item as the last event.

        Args:
            histories: one dict of columns a request (see `encode`); `{}` is a user without any history.
            surface, timestamp (int seconds, UTC), query, query_embedding (floats `(query_size,)`),
                context_item_id, request_features (list of strings such as `device=ios`, five at most): of the request;
                one for all, or a list of one each.

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
        seconds = _times(times, "request", np.arange(n))
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
            last = {
                "types": SUBJECT_EVENT if is_subject else QUERY_EVENT, "items": subject_codes[i],
                "queries": text_hash, "surfaces": surface_codes[i], "outcomes": 0, "timestamps": seconds[i],
                "requests": -1, "weights": 1, "features": 0,
            }  # fmt: skip
            rows[i] = {name: np.append(row[name], last[name]).astype(row[name].dtype) for name in EVENT_COLUMNS}
            if vectors[i] is not None:
                rows[i]["query_vector"] = self._checked_query_vector(vectors[i], i)
        batch = self.pad(rows)
        lengths = batch["attention_mask"].sum(-1)
        width = batch["attention_mask"].shape[1]
        last_position = torch.full_like(lengths, width - 1) if self.padding_side == "left" else lengths - 1
        batch["target_positions"] = last_position[:, None]
        batch["target_surfaces"] = torch.from_numpy(surface_codes)[:, None]
        batch["target_outcomes"] = torch.zeros(n, 1, dtype=torch.int64)
        batch["target_timestamps"] = torch.from_numpy(seconds)[:, None]
        if self.request_features:
            batch["target_features"] = torch.from_numpy(_packed_features(features))[:, None]
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

    def decode(self, token_ids: Any, **kwargs) -> list[Any]:  # type: ignore[override]  # ids, not text
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


_LISTS = (list, tuple, set, frozenset, np.ndarray, type(None))


def _length(history: Mapping[str, Sequence], row: int, strict: bool) -> int:
    if not isinstance(history, Mapping):
        raise ValueError(
            f"history {row} is {history!r}; give a dict of columns: {{'item_id': [...], 'outcomes': [...]}}"
        )
    if strict and (unknown := sorted(set(history) - {*HISTORY_COLUMNS, *UNUSED_COLUMNS}, key=str)):
        raise ValueError(f"history {row} has columns {unknown}; the known ones are {list(HISTORY_COLUMNS)}")
    lengths = {}
    for column in HISTORY_COLUMNS:
        values = history.get(column)
        if values is None:
            continue
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise ValueError(f"column {column!r} of history {row} is {values!r}; it must be a list, one entry an event")
        lengths[column] = len(values)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of history {row} differ in length: {lengths}")
    if lengths and "item_id" not in lengths:
        raise ValueError(f"history {row} has no `item_id` column, only {sorted(lengths)}")
    return next(iter(lengths.values()), 0)


def _column(history: Mapping[str, Sequence], column: str, length: int) -> Sequence:
    values = history.get(column)
    return [None] * length if values is None else values


def _one_each(name: str, value: Any, n: int, nested: bool) -> list:
    is_list = isinstance(value, list | tuple | np.ndarray)
    if nested and is_list and not (len(value) and (value[0] is None or np.ndim(value[0]))):
        is_list = False  # one vector for all
    if not is_list:
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} histories")
    return list(value)


def _times(values: Sequence, what: str, owner: np.ndarray) -> np.ndarray:
    """int64 seconds, -1 where `None`; `owner` says to which history or request (`what`) each value belongs."""
    known = np.fromiter((t is not None for t in values), bool, len(values))
    times = np.full(len(values), -1, np.int64)
    if known.any():
        given = np.asarray([t for t in values if t is not None])
        right = (given >= 0) & (given < LATEST) if given.dtype.kind in "iuf" else np.zeros(len(given), bool)
        if not right.all():  # NaN is not right either
            raise ValueError(
                f"{what} {owner[known][~right][0]} has the timestamp "
                f"{given[~right].tolist()[0]!r}, which is no number of "
                "seconds "
                f"since epoch (UTC) below {LATEST}; an unknown time is None"
            )
        times[known] = given
    return times


def _packed_features(features: Sequence) -> np.ndarray:
    """int64: the 12-bit hashes of each request's feature strings side by side, 0 where there is none.

    One integer a request, so that it is sliced, cut and padded like every other column.
    """
    packed: dict[Any, int] = {}
    keys = [() if names is None else names if isinstance(names, str) else tuple(names) for names in features]
    for names in set(keys):  # few are distinct
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"request_features {names!r} are no list of strings; write ['device=ios', ...]")
        distinct = sorted(set(names))
        if len(distinct) > MAX_REQUEST_FEATURES:
            raise ValueError(
                f"{len(distinct)} request_features, of which {MAX_REQUEST_FEATURES} fit: {distinct}; join some "
                "into one, "
                "such as 'device=ios,country=de'"
            )
        codes = stable_hash(distinct) % ((1 << REQUEST_FEATURE_BITS) - 1) + 1
        packed[names] = sum(code << (REQUEST_FEATURE_BITS * i) for i, code in enumerate(codes.tolist()))
    return np.array([packed[names] for names in keys], np.int64)


def _with_start(row: EncodedRow, max_length: int) -> EncodedRow:
    start = {"types": START_EVENT, "timestamps": -1, "requests": -1, "weights": 1}
    cut = {name: np.concatenate([[start.get(name, 0)], row[name][-(max_length - 1) :]]) for name in EVENT_COLUMNS}
    return {**row, **cut}


def _insert_contexts(
    events: EncodedRow, row: np.ndarray, queries: np.ndarray, subjects: np.ndarray
) -> tuple[EncodedRow, np.ndarray]:
    """Puts the query or subject item of each feed view before its first event, unless the log has it there."""
    if not len(row):
        return events, row
    context = np.where(queries != 0, queries, subjects)
    view = np.stack([row, events["requests"], context])
    first = np.ones(len(row), bool)
    first[1:] = (view[:, 1:] != view[:, :-1]).any(0)
    stands_there = np.zeros(len(row), bool)
    stands_there[1:] = (events["queries"][:-1] == queries[1:]) & (queries[1:] != 0) & (row[1:] == row[:-1])
    at = np.flatnonzero(first & (context != 0) & ~stands_there)
    new = {name: values[at] for name, values in events.items()}
    is_query = queries[at] != 0
    new["types"] = np.where(is_query, QUERY_EVENT, SUBJECT_EVENT).astype(np.int8)
    new["items"] = np.where(is_query, NO_ITEM, subjects[at])
    new["queries"] = np.where(is_query, queries[at], 0)
    new["outcomes"] = np.zeros(len(at), np.int64)
    return {name: np.insert(events[name], at, new[name]) for name in events}, np.insert(row, at, row[at])


__all__ = ["PinRecTokenizer"]
