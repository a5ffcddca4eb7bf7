"""Models as rankers under evaluation: a retriever, or exact inner products over the whole catalogue."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pinrec_hf.evaluation.baselines import ARCHITECTURES
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.eligible import seen_rows
from pinrec_hf.retrieval.encode import encode_items, encode_requests
from pinrec_hf.retrieval.pretrained import best_device, load_pretrained, saved_class
from pinrec_hf.retrieval.request import readable
from pinrec_hf.retrieval.retriever import PinRecRetriever


class ModelRanker:
    """Ranks by one embedding a request.

    Args:
        model, tokenizer: what is evaluated.
        outcome (`str`, *optional*): the outcome that every request asks for; unspecified by default.
        hide_time (`bool`): whether the request's time is withheld from the model.
        live_only (`bool`): whether items that are not available at the request's time are left out.
        remove_seen (`bool`): whether items that the user acted on are; some published tables keep them.
    """

    def __init__(
        self,
        model: PinRecModel,
        tokenizer: PinRecTokenizer,
        outcome: str | None = None,
        hide_time: bool = False,
        live_only: bool = True,
        remove_seen: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.outcome, self.remove_seen = outcome, remove_seen
        self._hidden = {"timestamp": None} if hide_time else {}
        self.items = torch.from_numpy(encode_items(model, tokenizer))
        self.availability = None
        if live_only and tokenizer.catalogue.has_availability:
            self.availability = torch.from_numpy(tokenizer.catalogue.availability(np.arange(len(tokenizer.catalogue))))

    def asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request as the model sees it; what the user has seen is removed whether or not it does."""
        return {**request, **self._hidden}

    def rank(self, requests: Sequence[Mapping[str, Any]], k: int) -> np.ndarray:
        """int64 `(requests, k)` catalogue rows, best first, -1 where fewer than k are left."""
        return self.search(requests, k)[0]

    def search(self, requests: Sequence[Mapping[str, Any]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, with the scores float32 `(requests, k)`, -inf where no item is left."""
        ranked = np.full((len(requests), k), -1, np.int64)
        found = np.full((len(requests), k), -np.inf, np.float32)
        for start in range(0, len(requests), 512):
            part = requests[start : start + 512]
            asked = [self.asked(request) for request in readable(part, self.tokenizer)]
            users = torch.from_numpy(encode_requests(self.model, self.tokenizer, asked, [self.outcome])[:, 0])
            scores = users @ self.items.T
            if self.availability is not None:
                times = torch.tensor([-1 if r.get("timestamp") is None else r["timestamp"] for r in part])[:, None]
                live = (self.availability[:, 0] <= times) & (times < self.availability[:, 1])
                scores[~live & (times >= 0)] = -torch.inf  # at an unknown time, all may be live
            if self.remove_seen:
                seen = [seen_rows(request, self.tokenizer.catalogue) for request in part]
                row = np.repeat(np.arange(len(part)), [len(rows) for rows in seen])
                scores[row, np.concatenate([*seen, np.zeros(0, np.int64)]).astype(np.int64)] = -torch.inf
            best = scores.topk(min(k, scores.shape[1]))
            rows = best.indices.where(best.values > -torch.inf, -1)
            ranked[start : start + len(part), : rows.shape[1]] = rows.numpy()
            found[start : start + len(part), : rows.shape[1]] = best.values.numpy()
        return ranked, found


def load_retriever(
    folder: str | os.PathLike[str], adapters: Mapping[str, str | os.PathLike[str]] | None = None
) -> PinRecRetriever:
    """PinRec as it serves, with the folder's index if it has one, else indexed in memory.

    Args:
        folder: of a PinRec model. adapters: of surfaces, as in `PinRecRetriever.from_pretrained`.

    Raises:
        ValueError: see `PinRecRetriever.from_pretrained`.
    """
    if os.path.exists(os.path.join(folder, "index.json")):
        return PinRecRetriever.from_pretrained(folder, device=best_device(), adapters=adapters)
    return PinRecRetriever.build(*load_pretrained(folder, device=best_device(), adapters=adapters))


def load_model_ranker(folder: str | os.PathLike[str]) -> ModelRanker:
    """Any saved architecture (PinRec, two-tower, SASRec), ranking by one embedding a request.

    Raises:
        ValueError: the folder holds another class of model, or is damaged.
    """
    classes = {model_class.__name__: model_class for _, model_class, _ in ARCHITECTURES.values()}
    saved = saved_class(folder)
    if saved not in classes:
        raise ValueError(f"{folder} holds a {saved}; known are {sorted(classes)}")
    return ModelRanker(*load_pretrained(folder, device=best_device(), model_class=classes[saved]))
