"""Learned baselines that share PinRec's item encoder, inputs, loss and training, and differ in one thing each."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from pinrec_hf.modeling.configuration_pinrec import QUERY_EVENT, PinRecConfig
from pinrec_hf.modeling.embedding_pinrec import PinRecRMSNorm
from pinrec_hf.modeling.layers_pinrec import PinRecMLP
from pinrec_hf.modeling.modeling_pinrec import PinRecModel

SASREC_FIELDS: dict[str, Any] = {"signals": [], "pooled_history": False}
"""Config fields that make PinRec a SASRec (arXiv 1808.09781): items and their order, nothing else."""


@strict
class TwoTowerConfig(PinRecConfig):
    """`PinRecConfig` of a [`TwoTowerModel`]; `num_hidden_layers` plays no part."""

    model_type = "pinrec_two_tower"


class TwoTowerModel(PinRecModel):
    """PinRec with its backbone replaced by pooling: the history as a set, attended to by learned queries.

    Each query also learns how fast it forgets, and a request's own query or subject item is seen apart from the pool.
    Everything else is PinRec's: item encoder, event inputs (surface, outcomes, time), conditions, head, loss; and it
    predicts at every position from the events before it, so that it gets as many updates.
    """

    config_class = TwoTowerConfig
    _can_record_outputs: dict = {}  # noqa: RUF012
    _supports_flex_attn = False
    _supports_flash_attn = False

    def build_backbone(self, config: PinRecConfig) -> None:
        size, heads = config.hidden_size, config.num_attention_heads
        self.pool_query = nn.Embedding(heads, size // heads)
        self.forgetting = nn.Linear(1, heads, bias=False)
        self.pool_keys, self.pool_values = nn.Linear(size, size), nn.Linear(size, size)
        self.context = nn.Linear(size, size)
        self.pool_norm = PinRecRMSNorm(size, config.rms_norm_eps)
        self.pool_mlp = PinRecMLP(config)
        self.mlp_norm, self.norm = (PinRecRMSNorm(size, config.rms_norm_eps) for _ in range(2))

    def backbone(
        self,
        events: Tensor,
        event_types: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        last_event_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if cache is not None:
            raise ValueError("a two-tower pools a history and generates no next event: use num_steps=1")
        batch, length, size = events.shape
        mask = create_causal_mask(self.config, events, attention_mask, cache, position_ids, allow_is_causal_skip=False)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=events.dtype).masked_fill_(~mask, torch.finfo(events.dtype).min)
        age = (position_ids[:, :, None] - position_ids[:, None]).clamp(min=0).to(events.dtype)
        mask = mask - self.forgetting(age.log1p()[..., None]).movedim(-1, 1)
        shape = (batch, length, *self.pool_query.weight.shape)
        normed = self.pool_norm(events)
        keys = self.pool_keys(normed).view(shape).transpose(1, 2)
        values = self.pool_values(normed).view(shape).transpose(1, 2)
        queries = self.pool_query.weight[None, :, None].expand_as(keys)
        pooled = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        is_context = (event_types >= QUERY_EVENT)[..., None]
        pooled = pooled.transpose(1, 2).reshape(batch, length, size) + self.context(normed) * is_context
        pooled = self.dropout(pooled)
        return self.norm(pooled + self.dropout(self.pool_mlp(self.mlp_norm(pooled))))


AutoConfig.register("pinrec_two_tower", TwoTowerConfig, exist_ok=True)
AutoModel.register(TwoTowerConfig, TwoTowerModel, exist_ok=True)

ARCHITECTURES: dict[str, tuple[type[PinRecConfig], type[PinRecModel], dict[str, Any]]] = {
    "pinrec": (PinRecConfig, PinRecModel, {}),
    "two_tower": (TwoTowerConfig, TwoTowerModel, {}),
    "sasrec": (PinRecConfig, PinRecModel, SASREC_FIELDS),
}
"""Config class, model class and fixed config fields of what `training/pretrain.py` trains."""
