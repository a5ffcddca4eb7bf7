"""Items and requests to embeddings, in batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchEncoding

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.history_cache import HistoryCache, Key

EVENTS_IN_CACHE = 2_048
"""Of a batch on a CPU: half the time of batches of 256 long histories (docs/serving.md)."""

TOKENIZER_FIELDS = ("surface", "timestamp", "query", "query_embedding", "context_item_id", "request_features")


def check_catalogue(model: PinRecModel, tokenizer: PinRecTokenizer) -> None:
    """Refuses a model and a tokenizer of different catalogues: the model's item ids are rows of its own.

    Raises:
        ValueError: their fingerprints differ.
    """
    expected, found = model.config.catalogue_fingerprint, tokenizer.catalogue.fingerprint
    if expected is not None and expected != found:
        raise ValueError(
            f"the model was trained on the catalogue {expected}, the tokenizer holds {found} "
            f"({len(tokenizer.catalogue)} "
            "items): load both from one folder"
        )


@torch.inference_mode()
def encode_items(
    model: PinRecModel, tokenizer: PinRecTokenizer, rows: np.ndarray | None = None, batch_size: int = 8192
) -> np.ndarray:
    """Embeddings of catalogue rows (all by default): float32 `(items, embedding_size)`."""
    check_catalogue(model, tokenizer)
    model.eval()
    rows = np.arange(len(tokenizer.catalogue)) if rows is None else rows
    parts = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="Encoding items", leave=False, disable=len(rows) <= batch_size):
        table = tokenizer.item_table(rows[start : start + batch_size] + FIRST_ITEM)
        tensors = {name: torch.from_numpy(value).to(model.device) for name, value in table.items()}
        parts.append(model.get_item_features(**tensors).float().cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def encode_requests(
    model: PinRecModel,
    tokenizer: PinRecTokenizer,
    requests: Sequence[Mapping[str, Any]],
    outcomes: Sequence[str | None] = (None,),
    batch_size: int = 256,
) -> np.ndarray:
    """Embeddings of requests under each wanted outcome: float32 `(requests, outcomes, embedding_size)`.

    Args:
        model: also the `PeftModel` of `load_surface_adapters`: requests of adapted surfaces are answered by their
            adapters, others by the base, all in one pass.
        requests: dicts of the request schema (`history`, `surface`, `timestamp`, ...).
        outcomes: names, or `None` for an unspecified one.

    Raises:
        ValueError: an unknown name, as the tokenizer says it.
    """
    codes = torch.tensor([tokenizer.outcome_code(name) for name in outcomes])
    embeddings = np.empty((len(requests), len(outcomes), model.config.embedding_size), np.float32)
    for chosen, batch in _batches(model, tokenizer, requests, 1, batch_size):
        for name in {"target_positions", "target_surfaces", "target_timestamps", "target_features"} & set(batch):
            batch[name] = batch[name].expand(-1, len(codes))
        batch["target_outcomes"] = codes.expand(len(chosen), -1)
        # not `get_user_features`, which a PeftModel passes by: it chooses a row's adapter in its own forward
        output = model(**batch.to(model.device), last_event_only=tokenizer.padding_side == "left")
        embeddings[chosen] = output.embeddings.float().cpu().numpy()
    return embeddings


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote for one request; arrays with an entry an embedding.

    Attributes:
        embeddings: float32 `(embeddings, embedding_size)`, in the order of generation.
        outcomes: int64 codes, 0 unspecified, else place in the config's `outcomes` + 1. steps: int64, from 1.
        offsets: int64 seconds after the request. weights: float64, each one's share of the request's slots.
        fed_rows: int64 `(num_steps - 1,)` catalogue rows that were fed back after each step; empty where embeddings
            themselves were.
    """

    embeddings: np.ndarray
    outcomes: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray
    fed_rows: np.ndarray

    def norm(self, hidden_size: int) -> float:
        """Mean length of the embeddings, without the constants that a dot product's end in."""
        return float(np.linalg.norm(self.embeddings[:, :hidden_size], axis=1).mean())


@torch.inference_mode()
def generate_requests(
    model: PinRecModel,
    tokenizer: PinRecTokenizer,
    requests: Sequence[Mapping[str, Any]],
    *,
    num_steps: int = 1,
    item_embeddings: torch.Tensor | None = None,
    item_masks: Callable[[Sequence[Mapping[str, Any]]], np.ndarray] | None = None,
    batch_size: int = 256,
    histories: HistoryCache | None = None,
    fingerprint: str = "",
) -> list[Generated]:
    """What the model generates for requests, under their own `outcome_budget` or their surface's, at all of its time
    offsets.

    Args:
        item_embeddings: `(items, embedding_size)` on the model's device, to feed back whole items, see
            `PinRecGeneration.generate`.
        item_masks: of some of the requests, which items may be fed back: bool `(requests, items)`; all by default.
        histories: where what is computed of users' histories is found again, for requests with a `user_id`.
        fingerprint: of weights and catalogues, see `reading_fingerprint`; with `histories`.

    Raises:
        ValueError: as the tokenizer and `generate`.
    """
    generated: dict[int, Generated] = {}
    names = [None, *model.config.outcomes]
    keys: list[Key | None] = [None] * len(requests)
    known = np.zeros(len(requests), np.int64)
    if histories is not None:
        adapted = surface_adapters(model)
        keys = [_history_key(request, fingerprint, adapted) for request in requests]
        known[:] = [histories.length(key) for key in keys]
    for chosen, batch in _batches(model, tokenizer, requests, num_steps, batch_size, known):
        batch, cache, users = batch.to(model.device), None, [keys[i] for i in chosen]
        if histories is not None and any(users):
            cache = histories.open(users, batch, model.config)
        budgets = [model.resolve_budget(requests[i].get("surface"), requests[i].get("outcome_budget")) for i in chosen]
        item_mask = None
        if item_masks is not None:
            item_mask = torch.from_numpy(item_masks([requests[i] for i in chosen])).to(model.device)
        output = model.generate(
            **batch,
            outcome_budget=budgets,
            num_steps=num_steps,
            offsets=model.config.time_offsets or [0],
            item_embeddings=item_embeddings,
            item_mask=item_mask,
            cache=cache,
        )
        if histories is not None and cache is not None:
            histories.keep(users, batch, cache, last=[requests[i].get("query_embedding") is None for i in chosen])
        columns = {name: output[name].cpu() for name in ("outcomes", "steps", "offsets")}
        columns["embeddings"], given = output.embeddings.float().cpu(), output.weights.cpu() > 0
        fed = np.empty((len(chosen), 0), np.int64)
        if output.fed_items is not None:
            fed = output.fed_items.cpu().numpy() - FIRST_ITEM
        for row, i in enumerate(chosen):
            parts = {name: column[row][given[row]].numpy() for name, column in columns.items()}
            # of the budget itself: in float32 an outcome's share of the slots may round to the other side
            weights = np.array([budgets[row][names[code]] for code in parts["outcomes"]])
            weights /= weights.max()
            generated[i] = Generated(**parts, weights=weights / weights.sum(), fed_rows=fed[row])
    return [generated[i] for i in range(len(requests))]


def _history_key(request: Mapping[str, Any], fingerprint: str, adapted: set[str]) -> Key | None:
    surface = request.get("surface")
    adapter = surface if surface in adapted else ""
    return None if request.get("user_id") is None else (fingerprint, adapter or "", str(request["user_id"]))


def _batches(
    model: PinRecModel,
    tokenizer: PinRecTokenizer,
    requests: Sequence[Mapping[str, Any]],
    num_steps: int,
    batch_size: int,
    known: np.ndarray | int = 0,
) -> Iterator[tuple[np.ndarray, BatchEncoding]]:
    """Requests as batches, each with the indexes of its requests; the model is put into eval mode.

    `known`: how many events of each are computed already.
    """
    check_catalogue(model, tokenizer)
    if model.training:
        model.eval()
    adapted = surface_adapters(model)
    # neighbours of similar length share a batch, so that little of it is padding
    items = [request["history"].get("item_id") for request in requests]
    lengths = np.array([0 if ids is None else len(ids) for ids in items])
    lengths = np.minimum(lengths, tokenizer.model_max_length) + 1  # a start event goes before each
    lengths = np.maximum(1, lengths - known)
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(requests):
        chosen = order[start : start + batch_size]
        if model.device.type == "cpu":
            events = lengths[chosen] * np.arange(1, len(chosen) + 1)  # of a batch that ends here, padding included
            chosen = chosen[: max(1, np.searchsorted(events, EVENTS_IN_CACHE, side="right"))]
        start += len(chosen)
        part = [requests[i] for i in chosen]
        fields: dict[str, Any] = {name: [request.get(name) for request in part] for name in TOKENIZER_FIELDS}
        batch = tokenizer([request["history"] for request in part], num_steps=num_steps, **fields)
        if adapted:
            names = [request.get("surface") for request in part]
            batch["adapter_names"] = [name if name in adapted else "__base__" for name in names]
        yield chosen, batch


def surface_adapters(model: PinRecModel) -> set[str]:
    """The surfaces that have an adapter in `model`, if it is a `PeftModel`.

    One with an adapter of another name, such as one in training, has none: its adapter answers every request.
    """
    return set(getattr(model, "peft_config", ())) & set(model.config.surfaces or [])


def encoder_fingerprint(model: PinRecModel) -> str:
    """Hex digest of the item encoder: its weights, and the config fields that say how they are used.

    An index belongs to the encoder that made it; finetuning that leaves the encoder frozen leaves this alone.
    """
    config = model.config
    use = (config.similarity, config.hidden_act, config.rms_norm_eps, config.hash_functions)
    return weights_fingerprint(model.item_encoder, repr(use))


def reading_fingerprint(model: PinRecModel, tokenizer: PinRecTokenizer) -> str:
    """Hex digest of all that a request's embeddings depend on besides the request: weights (with adapters), config and
    catalogues."""
    queries = tokenizer.query_catalogue.fingerprint if tokenizer.query_catalogue is not None else None
    return weights_fingerprint(model, repr((model.config.to_json_string(), tokenizer.catalogue.fingerprint, queries)))


NAME_TABLES = tuple(
    f"{part}.{names}.weight"
    for part in ("event_embedding", "outcome_head", "outcome_head.bias")
    for names in ("surfaces", "outcomes")
)
"""What grows with `add_surfaces` and `add_outcomes`."""


def base_fingerprint(model: PinRecModel) -> str:
    """Hex digest of what an adapter adapts: weights, and the config fields that say how they are used.

    The tables of surfaces and outcomes are left out, so that a base may grow under its adapters.
    """
    config = model.config
    use = (
        config.num_attention_heads, config.rope_theta, config.rms_norm_eps, config.hidden_act, config.similarity,
        config.signals, config.time_periods, config.time_offsets, config.hash_functions, config.pooled_history,
    )  # fmt: skip
    return weights_fingerprint(model, repr(use), without=NAME_TABLES)


def weights_fingerprint(module: torch.nn.Module, extra: str = "", without: Sequence[str] = ()) -> str:
    """Hex digest of a module's weights, read as float32, and of `extra`; `without` the weights of those names."""
    digest = blake2b(extra.encode(), digest_size=16)
    for name, weight in sorted(module.state_dict().items()):
        if name not in without:
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
