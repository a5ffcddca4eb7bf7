"""Items and requests to embeddings, in batches."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

REQUEST_FIELDS = ("surface", "timestamp", "query", "query_embedding", "context_item_id", "request_features")


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
    for start in tqdm(range(0, len(rows), batch_size), desc="Encoding items", disable=len(rows) <= batch_size):
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
        requests: dicts of the request schema (`history`, `surface`, `timestamp`, ...).
        outcomes: names, or `None` for an unspecified one.

    Raises:
        ValueError: an unknown name, as the tokenizer says it.
    """
    check_catalogue(model, tokenizer)
    model.eval()
    codes = torch.tensor([tokenizer.outcome_code(name) for name in outcomes])
    # neighbours of similar length share a batch, so that little of it is padding
    lengths = np.array([len(request["history"].get("item_id", ())) for request in requests])
    order = np.argsort(lengths, kind="stable")
    embeddings = np.empty((len(requests), len(outcomes), model.config.embedding_size), np.float32)
    for start in range(0, len(requests), batch_size):
        chosen = order[start : start + batch_size]
        part = [requests[i] for i in chosen]
        fields: dict[str, Any] = {name: [request.get(name) for request in part] for name in REQUEST_FIELDS}
        batch = tokenizer([request["history"] for request in part], **fields)
        for name in {"target_positions", "target_surfaces", "target_timestamps", "target_features"} & set(batch):
            batch[name] = batch[name].expand(-1, len(codes))
        batch["target_outcomes"] = codes.expand(len(part), -1)
        embeddings[chosen] = model.get_user_features(**batch.to(model.device)).float().cpu().numpy()
    return embeddings


def encoder_fingerprint(model: PinRecModel) -> str:
    """Hex digest of the item encoder: its weights, and the config fields that say how they are used.

    An index belongs to the encoder that made it; finetuning that leaves the encoder frozen leaves this alone.
    """
    config = model.config
    use = (config.similarity, config.hidden_act, config.rms_norm_eps, config.hash_functions)
    return weights_fingerprint(model.item_encoder, repr(use))


def weights_fingerprint(module: torch.nn.Module, extra: str = "") -> str:
    """Hex digest of a module's weights, read as float32, and of `extra`."""
    digest = blake2b(extra.encode(), digest_size=16)
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
