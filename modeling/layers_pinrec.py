"""The backbone's blocks, and the outcome head on top of them."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pinrec import MAX_REQUEST_FEATURES, REQUEST_FEATURE_BITS, PinRecConfig
from .embedding_pinrec import HashedEmbedding, PinRecRMSNorm, TimeEncoding


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of `(batch, heads, length, head_dim)`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], -1) * sin


class PinRecRotaryEmbedding(nn.Module):
    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.hidden_size // config.num_attention_heads, config.rope_theta

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(batch, length)` to cos and sin of shape `(batch, 1, length, head_dim)`."""
        exponent = torch.arange(0, self.head_dim, 2, device=position_ids.device).float() / self.head_dim
        angles = position_ids[:, None, :, None].float() / self.theta**exponent
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PinRecAttention(nn.Module):
    def __init__(self, config: PinRecConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        last_event_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        asking, (cos, sin) = hidden_states, position_embeddings
        if last_event_only:
            asking, cos, sin = hidden_states[:, -1:], cos[:, :, -1:], sin[:, :, -1:]
            attention_mask = attention_mask[:, :, -1:] if attention_mask is not None else None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(asking).unflatten(-1, shape[2:]).transpose(1, 2), cos, sin)
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(asking.shape)), weights


class PinRecMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        # two thirds, so that the gate costs no parameters
        inner = cast(int, config.intermediate_size) * 2 // 3
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PinRecLayer(GradientCheckpointingLayer):
    def __init__(self, config: PinRecConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PinRecAttention(config, layer_idx)
        self.mlp = PinRecMLP(config)
        self.input_layernorm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, last_event_only: bool = False, **kwargs: Any) -> Tensor:
        """`(batch, length, hidden_size)` to the same, or to the last event's `(batch, 1, hidden_size)`."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, last_event_only=last_event_only, **kwargs)
        hidden_states = hidden_states[:, -attended.shape[1] :] + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class HistoryPooling(nn.Module):
    """Attention from a conditioned request to the events themselves: what of the history matters for this request.

    The backbone does not know the surface or outcome that will be asked for; this path does, at the cost of one
    attention without a feed-forward layer (ours). Each head learns how fast it forgets, by the logarithm of an event's
    age in events. Keys and values are cached as one more layer.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.num_heads, self.layer_idx = config.num_attention_heads, config.num_hidden_layers
        self.norm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.forgetting = nn.Linear(1, self.num_heads, bias=False)

    def keys_and_values(self, events: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        events = self.norm(events)
        keys, values = self._heads(self.k_proj(events)), self._heads(self.v_proj(events))
        return (keys, values) if cache is None else cache.update(keys, values, self.layer_idx)

    def forward(self, requests: Tensor, keys_and_values: tuple[Tensor, Tensor], ages: Tensor) -> Tensor:
        """`(batch, targets, hidden_size)` to the same; `ages` `(batch, targets, length)` are the events' for each
        target, -1 where it may not see them."""
        query = self._heads(self.q_proj(requests))
        log_ages = ages.clamp(min=0).to(requests.dtype).log1p()[..., None]
        mask = -self.forgetting(log_ages).movedim(-1, 1)
        mask = mask.masked_fill((ages < 0)[:, None], torch.finfo(mask.dtype).min)
        pooled = nn.functional.scaled_dot_product_attention(query, *keys_and_values, attn_mask=mask)
        return self.o_proj(pooled.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class TimeOffsets(nn.Module):
    """How long after the request a target happens, as one of a few offsets: the largest that is not above it.

    Row 0 is an unknown offset (PinRec v7, section 3.3: several embeddings of one step, for now, 30 s, 1 min ...).
    """

    def __init__(self, offsets: list[int], size: int) -> None:
        super().__init__()
        self.starts = offsets
        self.embedding = nn.Embedding(len(offsets) + 1, size)

    def forward(self, offsets: Tensor) -> Tensor:
        starts = torch.tensor(self.starts, device=offsets.device)
        return self.embedding(torch.bucketize(offsets, starts, right=True))


class ConditionBias(nn.Module):
    """What meets an item's biases in the inner product: 1, then a mixture that surface and outcome choose.

    So that a popular item of a surface, or one that is mostly saved, need not be told by the embeddings (ours). Each
    surface and outcome begins with a bias of its own; the unknown and unspecified ones have none.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.size, signals = (config.bias_size or 0) - 1, config.signals or []
        self.surfaces = nn.Embedding(len(config.surfaces or []) + 1, self.size) if "surface" in signals else None
        self.outcomes = nn.Embedding(len(config.outcomes or []) + 1, self.size) if "outcome" in signals else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """One bias each, in the order surfaces, outcomes."""
        start = 0
        for table in (self.surfaces, self.outcomes):
            if table is not None:
                rows = torch.zeros_like(table.weight)
                own = torch.arange(min(len(rows) - 1, self.size - start))
                rows[1 + own, start + own] = 1.0
                init.copy_(table.weight, rows)
                start += len(rows) - 1

    def forward(self, users: Tensor, surfaces: Tensor | None, outcomes: Tensor | None) -> Tensor:
        """`(batch, targets, hidden_size)` to `(batch, targets, hidden_size + bias_size)`."""
        biases = users.new_zeros(*users.shape[:-1], self.size)
        if self.surfaces is not None:
            biases = biases + self.surfaces(surfaces)
        if self.outcomes is not None:
            biases = biases + self.outcomes(outcomes)
        return torch.cat([users, torch.ones_like(users[..., :1]), biases], -1)


class OutcomeHead(nn.Module):
    """`O(h_t, c_surface, c_outcome, request time, e_offset)`: a hidden state and conditions to an embedding.

    PinRec v7, section 3.3. Conditions enter here and nowhere else, so that one backbone pass serves all of them.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        size, signals = config.hidden_size, config.signals or []
        self.surfaces = nn.Embedding(len(config.surfaces or []) + 1, size) if "surface" in signals else None
        self.outcomes = nn.Embedding(len(config.outcomes or []) + 1, size) if "outcome" in signals else None
        self.time = TimeEncoding(config) if "time" in signals else None
        self.offsets = TimeOffsets(config.time_offsets, size) if config.time_offsets else None
        # as events are: an embedding starts far shorter than the hidden state, which has been normalised
        self.scale = size**0.5
        buckets = config.request_feature_buckets
        self.features = HashedEmbedding(size, 1, buckets) if buckets else None
        self.pool = HistoryPooling(config) if config.pooled_history else None
        self.norm = PinRecRMSNorm(size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(size, 2 * size)
        self.up_proj = nn.Linear(size, 2 * size)
        self.down_proj = nn.Linear(2 * size, size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.hidden_dropout = nn.Dropout(config.head_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.bias = ConditionBias(config) if config.similarity == "dot" else None

    def forward(
        self,
        hidden: Tensor,
        surfaces: Tensor | None,
        outcomes: Tensor | None,
        timestamps: Tensor,
        gaps: Tensor,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        ages: Tensor | None = None,
    ) -> Tensor:
        """`(batch, targets, hidden_size)` and four `(batch, targets)` to `(batch, targets, embedding_size)`.

        Also time offsets in seconds (-1 unknown) and packed request features; with `pooled_history` also the events'
        keys and values, and their ages for each target.
        """
        conditions = []
        if self.surfaces is not None:
            conditions.append(self.surfaces(surfaces))
        if self.outcomes is not None:
            conditions.append(self.outcomes(outcomes))
        if self.time is not None:
            conditions.append(self.time(timestamps, gaps))
        if self.offsets is not None:
            conditions.append(self.offsets(torch.zeros_like(timestamps) if offsets is None else offsets))
        if self.features is not None and features is not None:
            shifts = torch.arange(MAX_REQUEST_FEATURES, device=features.device) * REQUEST_FEATURE_BITS
            codes = (features[..., None] >> shifts) & ((1 << REQUEST_FEATURE_BITS) - 1)
            conditions.append(self.features(codes).sum(-2))
        hidden = self.hidden_dropout(hidden)
        mixed = hidden + self.scale * sum(conditions)
        if self.pool is not None:
            pooled = self.dropout(self.pool(mixed, keys_and_values, ages))
            hidden, mixed = hidden + pooled, mixed + pooled
        mixed = self.norm(mixed)
        gated = self.act_fn(self.gate_proj(mixed)) * self.up_proj(mixed)
        users = hidden + self.down_proj(self.dropout(gated))
        return nn.functional.normalize(users, dim=-1) if self.bias is None else self.bias(users, surfaces, outcomes)
