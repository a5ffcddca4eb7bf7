"""PinRec: a transformer over a user's events on all surfaces that writes the embeddings of the next items.

Notable features:
- one item encoder (content vector, hashed features, id) for inputs, targets and the index
- each batch carries a table of its distinct items, so that an item is encoded once however often it occurs
- pre-norm blocks: RMSNorm, rotary positions, gated MLP
- conditions (surface, outcome, request time) enter in the outcome head only: one backbone pass serves them all
- dot product with an item bias, carried as one more dimension, so that retrieval stays inner-product search

Source: PinRec, arXiv 2504.10507 (v7, sections 3 and 4); time encoding from PinnerFormer, arXiv 2205.04507.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pinrec import (
    DAY,
    FIRST_ITEM,
    MAX_REQUEST_FEATURES,
    REQUEST_FEATURE_BITS,
    UNKNOWN_ITEM,
    PinRecConfig,
)
from .loss_pinrec import gather_pool, members, sampled_softmax_loss

GAP_PERIODS = 32


@dataclass
class PinRecModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` are given):
            mean over the targets (sum divided by `num_items_in_batch` where the Trainer gives it).
        embeddings (`torch.FloatTensor` of shape `(batch, targets, embedding_size)`, *optional*, returned when
            there are targets): what the outcome head wrote; its inner product with `get_item_features` ranks.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden_size)`)
        cache (`Cache`, *optional*, returned with `use_cache`)
        hidden_states, attentions (`tuple`, *optional*): as everywhere in transformers.
    """

    loss: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PinRecRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class HashedEmbedding(nn.Module):
    """A 64-bit hash to a vector: k hash functions into k tables of width `size / k`, concatenated.

    Two values that share a row in one table hardly share it in all (PinRec v4, section 4; Svenstrup et al. 2017).
    Hash 0 is padding and gives zeros.
    """

    MULTIPLIERS = (-7046029254386353131, -4417276706812531889, 1609587929392839161, -8796714831421723037)

    def __init__(self, size: int, functions: int, rows: int) -> None:
        super().__init__()
        if functions > len(self.MULTIPLIERS) or size % functions:
            raise ValueError(
                f"hash_functions={functions} must be at most {len(self.MULTIPLIERS)} and divide hidden size {size}"
            )
        self.functions, self.rows = functions, rows
        self.weight = nn.Parameter(torch.empty(functions * rows, size // functions))

    def forward(self, hashes: Tensor) -> Tensor:
        rows = [
            # multiply-shift hashing (Dietzfelbinger 1997): the high bits are the well-mixed ones
            (((hashes * multiplier) >> 32) & 0x7FFFFFFF) % self.rows + i * self.rows
            for i, multiplier in enumerate(self.MULTIPLIERS[: self.functions])
        ]
        vectors = nn.functional.embedding(torch.stack(rows, -1), self.weight).flatten(-2)
        return vectors * (hashes != 0)[..., None]


class EntityEncoder(nn.Module):
    """Content vector, feature bag and id of an item (or query) to its embedding: their sum and a 2-layer MLP of it.

    With `bias`, one more output says how likely the item is whoever asks.
    """

    def __init__(self, config: PinRecConfig, content_size: int, id_embedding: str | None, features: int, bias: bool):
        super().__init__()
        self.id_dropout = config.item_id_dropout
        self.hidden_size, width = config.hidden_size, config.hidden_size + bias
        self.content = nn.Linear(content_size, width, bias=False) if content_size else None
        self.features = HashedEmbedding(config.hidden_size, 1, features) if features else None
        self.feature_bias = HashedEmbedding(1, 1, features) if features and bias else None
        self.full_ids = nn.Embedding(config.num_items + FIRST_ITEM, width) if id_embedding == "full" else None
        self.hashed_ids = (
            HashedEmbedding(config.hidden_size, config.hash_functions, config.hash_table_size)
            if id_embedding == "hashed"
            else None
        )
        self.norm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.hidden_size, width)

    def forward(self, ids: Tensor, hashes: Tensor | None, vectors: Tensor | None, features: Tensor | None) -> Tensor:
        """`(entities,)` ids and hashes, `(entities, content_size)`, `(entities, features)` to `(entities, width)`."""
        total = self.down_proj.bias.new_zeros(ids.shape[0], self.down_proj.out_features)
        known = (ids > UNKNOWN_ITEM)[:, None]
        if self.training and self.id_dropout and (self.content is not None or self.features is not None):
            known = known & (torch.rand(known.shape, device=ids.device) >= self.id_dropout)
        if self.full_ids is not None:
            in_table = known[:, 0] & (ids < self.full_ids.num_embeddings)
            total = total + self.full_ids(ids.where(in_table, ids.clamp(max=UNKNOWN_ITEM)))
        if self.hashed_ids is not None:
            total = total + self._widen(self.hashed_ids(hashes) * known)
        if self.content is not None:
            total = total + self.content(vectors.to(self.content.weight.dtype))
        if self.features is not None:
            bag = self.features(features).sum(-2)
            bias = None if self.feature_bias is None else self.feature_bias(features).sum(-2)
            total = total + (bag if bias is None else torch.cat([bag, bias], -1))
        hidden = self.norm(total[:, : self.hidden_size])
        return total + self.down_proj(self.act_fn(self.up_proj(hidden)))

    def _widen(self, vectors: Tensor) -> Tensor:
        return nn.functional.pad(vectors, (0, self.down_proj.out_features - self.hidden_size))


class TimeEncoding(nn.Module):
    """When something happened and how long after the event before, each possibly unknown.

    Absolute time as sin/cos at fixed periods; the gap on 32 log-spaced periods from 1 s
    to 4 weeks with learned phases, plus its logarithm (PinnerFormer, arXiv 2205.04507, section 3.2).
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.periods = config.time_periods
        self.gap_phase = nn.Parameter(torch.zeros(GAP_PERIODS))
        self.proj = nn.Linear(2 * len(self.periods) + GAP_PERIODS + 3, config.hidden_size)

    def forward(self, timestamps: Tensor, gaps: Tensor) -> Tensor:
        """int64 seconds since epoch (UTC) and int64 seconds since the event before, -1 unknown, any shape."""
        periods = torch.tensor(self.periods, device=timestamps.device)
        # the modulo is taken in int64: a float32 second steps by 128 s at today's timestamps
        phase = (timestamps[..., None] % periods).float() / periods * (2 * math.pi)
        known = (timestamps >= 0)[..., None].float()
        gap_periods = torch.logspace(0, math.log10(28 * DAY), GAP_PERIODS, device=gaps.device)
        gap = gaps.clamp(min=0)[..., None].float()
        gap_known = (gaps >= 0)[..., None].float()
        wave = torch.sin(gap / gap_periods * (2 * math.pi) + self.gap_phase.float())
        features = [phase.sin() * known, phase.cos() * known, known]
        features += [wave * gap_known, gap.log1p() / 10 * gap_known, gap_known]
        return self.proj(torch.cat(features, -1).to(self.proj.weight.dtype))


def outcome_indicators(outcome_sets: Tensor, outcomes: int) -> Tensor:
    """Bit sets `(...)` int64 to 0/1 indicators `(..., outcomes)`."""
    return (outcome_sets[..., None] >> torch.arange(outcomes, device=outcome_sets.device)) & 1


class EventEmbedding(nn.Module):
    """What happened, to whom it is shown next: item or query + type + surface + outcomes + time."""

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.config = config
        self.types = nn.Embedding(4, config.hidden_size)
        self.surfaces = (
            nn.Embedding(len(config.surfaces) + 1, config.hidden_size) if "surface" in config.signals else None
        )
        # two rows more than outcomes: an unknown outcome, and a masked set, which is not an empty one
        self.outcomes = (
            nn.Embedding(len(config.outcomes) + 2, config.hidden_size) if "outcome" in config.signals else None
        )
        self.time = TimeEncoding(config) if "time" in config.signals else None

    def forward(
        self, content: Tensor, types: Tensor, surfaces: Tensor, outcome_sets: Tensor, timestamps: Tensor, gaps: Tensor
    ) -> Tensor:
        """`(batch, length, hidden_size)` and five `(batch, length)` to `(batch, length, hidden_size)`."""
        events = content + self.types(types)
        if self.surfaces is not None:
            events = events + self.surfaces(surfaces)
        if self.outcomes is not None:
            indicators = outcome_indicators(outcome_sets, len(self.config.outcomes) + 1)
            masked = torch.zeros_like(outcome_sets, dtype=torch.bool)
            if self.training and self.config.outcome_dropout:
                masked = torch.rand(masked.shape, device=masked.device) < self.config.outcome_dropout
            indicators = torch.cat([indicators * ~masked[..., None], masked[..., None]], -1)
            events = events + indicators.to(events.dtype) @ self.outcomes.weight
        if self.time is not None:
            events = events + self.time(timestamps, gaps)
        return events


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
    **kwargs,
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
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
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
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class PinRecMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        # two thirds, so that the gate costs no parameters
        inner = config.intermediate_size * 2 // 3
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

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class HistoryPooling(nn.Module):
    """Attention from a conditioned request to the events themselves: what of the history matters for this request.

    The backbone does not know the surface or outcome that will be asked for; this path does, at the cost of one
    attention without a feed-forward layer (ours). Keys and values are cached as one more layer.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.num_heads, self.layer_idx = config.num_attention_heads, config.num_hidden_layers
        self.norm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def keys_and_values(self, events: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        events = self.norm(events)
        keys, values = self._heads(self.k_proj(events)), self._heads(self.v_proj(events))
        return (keys, values) if cache is None else cache.update(keys, values, self.layer_idx)

    def forward(self, requests: Tensor, keys_and_values: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """`(batch, targets, hidden_size)` and a mask `(batch, targets, length)` to `(batch, targets, hidden_size)`."""
        query = self._heads(self.q_proj(requests))
        pooled = nn.functional.scaled_dot_product_attention(query, *keys_and_values, attn_mask=visible[:, None])
        return self.o_proj(pooled.transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class OutcomeHead(nn.Module):
    """`O(h_t, c_surface, c_outcome, request time)`: a hidden state and the conditions of a request to a user embedding.

    PinRec v7, section 3.3. Conditions enter here and nowhere else, so that one backbone pass serves all of them.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.surfaces = nn.Embedding(len(config.surfaces) + 1, size) if "surface" in config.signals else None
        self.outcomes = nn.Embedding(len(config.outcomes) + 1, size) if "outcome" in config.signals else None
        self.time = TimeEncoding(config) if "time" in config.signals else None
        buckets = config.request_feature_buckets
        self.features = HashedEmbedding(size, 1, buckets) if buckets else None
        self.pool = HistoryPooling(config) if config.pooled_history else None
        self.norm = PinRecRMSNorm(size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(size, 2 * size)
        self.up_proj = nn.Linear(size, 2 * size)
        self.down_proj = nn.Linear(2 * size, size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        surfaces: Tensor,
        outcomes: Tensor,
        timestamps: Tensor,
        gaps: Tensor,
        features: Tensor | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """`(batch, targets, hidden_size)` and four `(batch, targets)` to `(batch, targets, hidden_size)`.

        Also packed request features; with `pooled_history` also the events' keys and values, and which of them each
        target may see.
        """
        mixed = hidden
        if self.surfaces is not None:
            mixed = mixed + self.surfaces(surfaces)
        if self.outcomes is not None:
            mixed = mixed + self.outcomes(outcomes)
        if self.time is not None:
            mixed = mixed + self.time(timestamps, gaps)
        if self.features is not None and features is not None:
            shifts = torch.arange(MAX_REQUEST_FEATURES, device=features.device) * REQUEST_FEATURE_BITS
            codes = (features[..., None] >> shifts) & ((1 << REQUEST_FEATURE_BITS) - 1)
            mixed = mixed + self.features(codes).sum(-2)
        if self.pool is not None:
            pooled = self.dropout(self.pool(mixed, keys_and_values, visible))
            hidden, mixed = hidden + pooled, mixed + pooled
        mixed = self.norm(mixed)
        gated = self.act_fn(self.gate_proj(mixed)) * self.up_proj(mixed)
        return hidden + self.down_proj(self.dropout(gated))


class PinRecPreTrainedModel(PreTrainedModel):
    config_class = PinRecConfig
    config: PinRecConfig
    base_model_prefix = "model"
    main_input_name = "event_items"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PinRecLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PinRecLayer, "attentions": PinRecAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As everywhere in transformers, but weights that are cut off or missing are an error, not a warning.

        Raises:
            ValueError: a weight file is truncated, or the checkpoint is another model's.
        """
        path = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"a weight file of {path} is truncated or damaged; copy it again ({error})") from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{path} lacks {len(missing)} of the weights that its config asks for, such as {missing[0]!r}: it is "
                "another model's checkpoint, or a config that was changed by hand"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | HashedEmbedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, PinRecRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, TimeEncoding):
            init.zeros_(module.gap_phase)
        elif isinstance(module, PinRecModel):
            init.constant_(module.log_temperature, math.log(0.05))


class PinRecModel(PinRecPreTrainedModel):
    """The whole model: item encoder, event embedding, backbone and outcome head.

    A batch carries a table of its distinct items (`item_ids` and what the catalogue knows of them) and, for each
    event, the item's row in that table; [`PinRecTokenizer`] makes both from rows of a log or from requests.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__(config)
        self.item_encoder = EntityEncoder(
            config, config.content_size, config.item_id_embedding, config.feature_buckets, config.similarity == "dot"
        )
        self.query_encoder = EntityEncoder(config, config.query_size, "hashed", 0, bias=False)
        self.event_embedding = EventEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.build_backbone(config)
        self.outcome_head = OutcomeHead(config)
        self.log_temperature = nn.Parameter(torch.empty(1)) if config.similarity == "cosine" else None
        self.gradient_checkpointing = False
        self.post_init()

    def build_backbone(self, config: PinRecConfig) -> None:
        self.rotary_emb = PinRecRotaryEmbedding(config)
        self.layers = nn.ModuleList([PinRecLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PinRecRMSNorm(config.hidden_size, config.rms_norm_eps)

    def backbone(
        self,
        events: Tensor,
        event_types: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        **kwargs,
    ) -> Tensor:
        """`(batch, length, hidden_size)` events to hidden states of the same shape, each seeing no later event."""
        mask = create_causal_mask(self.config, events, attention_mask, cache, position_ids)
        position_embeddings = self.rotary_emb(position_ids, events.dtype)
        hidden_states = events
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                cache=cache,
                **kwargs,
            )
        return self.norm(hidden_states)

    def get_item_features(
        self,
        item_ids: Tensor,
        item_vectors: Tensor | None = None,
        item_features: Tensor | None = None,
        item_hashes: Tensor | None = None,
    ) -> Tensor:
        """Item embeddings, as the index holds them.

        Args:
            item_ids (`torch.LongTensor` of shape `(items,)`): 0 none, 1 unknown, catalogue row + 2.
            item_vectors (`torch.FloatTensor` of shape `(items, content_size)`, *optional*)
            item_features (`torch.LongTensor` of shape `(items, features)`, *optional*): hashes, 0 padding.
            item_hashes (`torch.LongTensor` of shape `(items,)`, *optional*): of the ids, for hashed ids.

        Returns:
            `torch.FloatTensor` of shape `(items, embedding_size)`; with a dot product the last one is the bias.
        """
        items = self.item_encoder(item_ids, item_hashes, item_vectors, item_features)
        return items if self.config.similarity == "dot" else nn.functional.normalize(items, dim=-1)

    def get_query_features(self, query_hashes: Tensor, query_vectors: Tensor | None = None) -> Tensor:
        """Embeddings `(queries, hidden_size)` of search queries, from their text's hash and content vector (zeros
        where there is none)."""
        is_query = query_hashes != 0
        # an event without a query adds nothing, whether or not another one in its batch has one
        return self.query_encoder(is_query * FIRST_ITEM, query_hashes, query_vectors, None) * is_query[:, None]

    def get_user_features(self, **batch) -> Tensor:
        """User embeddings `(batch, targets, embedding_size)` of what `PinRecTokenizer` made of requests."""
        return self(**batch).embeddings

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        event_items: Tensor,
        event_types: Tensor,
        event_queries: Tensor,
        surface_ids: Tensor,
        outcome_sets: Tensor,
        timestamps: Tensor,
        time_gaps: Tensor,
        item_ids: Tensor,
        item_vectors: Tensor | None = None,
        item_features: Tensor | None = None,
        item_hashes: Tensor | None = None,
        item_availability: Tensor | None = None,
        item_frequencies: Tensor | None = None,
        query_hashes: Tensor | None = None,
        query_vectors: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
        target_surfaces: Tensor | None = None,
        target_outcomes: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        target_features: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        label_timestamps: Tensor | None = None,
        negative_counts: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> PinRecModelOutput:
        r"""
        Args:
            event_items (`torch.LongTensor` of shape `(batch, length)`): each event's row in the item table.
            event_types (`torch.LongTensor` of shape `(batch, length)`): start, item, query or subject item.
            event_queries (`torch.LongTensor` of shape `(batch, length)`): each event's row in the query table.
            surface_ids (`torch.LongTensor` of shape `(batch, length)`): 0 unknown, else place in `surfaces` + 1.
            outcome_sets (`torch.LongTensor` of shape `(batch, length)`): bit 0 is an unknown outcome, bit i the i-th of
                `outcomes`.
            timestamps (`torch.LongTensor` of shape `(batch, length)`): seconds since epoch, UTC; -1 unknown.
            time_gaps (`torch.LongTensor` of shape `(batch, length)`): seconds since the event before; -1 unknown.
            item_ids, item_vectors, item_features, item_hashes: the item table, see `get_item_features`; `item_ids`
                ascend, the first two are 0 and 1.
            item_availability (`torch.LongTensor` of shape `(items, 2)`, *optional*): live from, until (exclusive).
            item_frequencies (`torch.FloatTensor` of shape `(items,)`, *optional*): share of the training targets.
            query_hashes, query_vectors: the query table, see `get_query_features`.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 is padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): restart at 0 to pack users.
            target_positions (`torch.LongTensor` of shape `(batch, targets)`, *optional*): the event after which
                each target is asked for.
            target_surfaces, target_outcomes, target_timestamps (`torch.LongTensor` of shape `(batch, targets)`):
                the conditions of each target: surface (0 unknown), outcome (0 unspecified, else place + 1), time of
                the request (-1 unknown).
            target_features (`torch.LongTensor` of shape `(batch, targets)`, *optional*): request features, packed as
                the tokenizer does.
            labels (`torch.LongTensor` of shape `(batch, targets)`, *optional*): row in the item table, -100 none.
            label_weights (`torch.FloatTensor` of shape `(batch, targets)`, *optional*)
            label_timestamps (`torch.LongTensor` of shape `(batch, targets)`, *optional*): when the targets happened,
                where `target_timestamps` hides it: only items live then are negatives; -1 unknown.
            negative_counts (`torch.FloatTensor` of shape `(items,)`, *optional*): how often each item of the table
                was drawn uniformly as a negative.
        """
        items = self.get_item_features(item_ids, item_vectors, item_features, item_hashes)
        content = items[event_items][..., : self.config.hidden_size]
        if query_hashes is not None:
            content = content + self.get_query_features(query_hashes, query_vectors)[event_queries]
        events = self.event_embedding(content, event_types, surface_ids, outcome_sets, timestamps, time_gaps)
        events = self.dropout(events * self.config.hidden_size**0.5)

        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = self._positions(attention_mask, events, cache)
        hidden_states = self.backbone(events, event_types, attention_mask, position_ids, cache, **kwargs)

        embeddings = loss = None
        pool = self.outcome_head.pool
        # every chunk of events goes into the cache, also one after which nothing is asked
        pooled = None if pool is None else pool.keys_and_values(events, cache)
        if target_positions is not None:
            visible = None
            if pooled is not None:
                visible = self._visible(target_positions, position_ids, attention_mask, pooled[0].shape[2])
            embeddings = self._user_embeddings(
                hidden_states, timestamps, target_positions, target_surfaces, target_outcomes, target_timestamps,
                target_features, pooled, visible,
            )  # fmt: skip
            if labels is not None:
                times = target_timestamps if label_timestamps is None else label_timestamps
                loss = self._loss(
                    embeddings, labels, label_weights, times, items, item_ids, event_items,
                    item_availability, item_frequencies, negative_counts, num_items_in_batch,
                )  # fmt: skip
        return PinRecModelOutput(loss=loss, embeddings=embeddings, last_hidden_state=hidden_states, cache=cache)

    @staticmethod
    def _positions(attention_mask: Tensor | None, events: Tensor, cache: Cache | None) -> Tensor:
        """Positions count real events, so that left and right padding give equal answers."""
        if attention_mask is not None:
            return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -events.shape[1] :]
        past = cache.get_seq_length() if cache is not None else 0
        return torch.arange(past, past + events.shape[1], device=events.device)[None].expand(events.shape[0], -1)

    @staticmethod
    def _visible(targets: Tensor, position_ids: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
        """`(batch, targets, length)`: which events, cached ones included, each target's pooling may see."""
        new = position_ids.shape[1]
        visible = torch.arange(length, device=targets.device) <= targets[..., None] + length - new
        if attention_mask is not None:
            return visible & attention_mask[:, None].bool()
        if length == new:  # several users may be packed into a row: each sees its own events
            user = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
            visible = visible & (user[:, None] == user.expand(len(targets), -1).gather(1, targets)[..., None])
        return visible

    def _user_embeddings(
        self, hidden_states: Tensor, timestamps: Tensor, positions: Tensor, surfaces: Tensor, outcomes: Tensor,
        target_timestamps: Tensor, features: Tensor | None, pooled: tuple[Tensor, Tensor] | None,
        visible: Tensor | None,
    ) -> Tensor:  # fmt: skip
        index = positions[..., None].expand(-1, -1, hidden_states.shape[-1])
        last = timestamps.gather(1, positions)
        gaps = (target_timestamps - last).clamp(min=0).where((target_timestamps >= 0) & (last >= 0), -1)
        users = self.outcome_head(
            hidden_states.gather(1, index), surfaces, outcomes, target_timestamps, gaps, features, pooled, visible
        )
        if self.config.similarity == "cosine":
            return nn.functional.normalize(users, dim=-1)
        return torch.cat([users, torch.ones_like(users[..., :1])], -1)

    def _loss(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor | None, times: Tensor, items: Tensor,
        item_ids: Tensor, event_items: Tensor, availability: Tensor | None,
        frequencies: Tensor | None, negative_counts: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:  # fmt: skip
        valid = labels >= 0
        safe = labels.where(valid, 0)
        row = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)[valid]
        queries, targets = embeddings[valid], safe[valid]
        if self.log_temperature is not None:
            queries = queries / self.log_temperature.exp().clamp(min=0.01)

        own = item_ids[torch.cat([event_items, safe], 1)]
        part, pool_ids, pool = len(item_ids), item_ids, items
        if self.config.softmax == "full":
            log_weights = torch.zeros_like(item_ids, dtype=torch.float32)
        elif frequencies is None or negative_counts is None:
            raise ValueError("the sampled softmax needs item_frequencies and negative_counts; see PretrainingCollator")
        else:
            drawn = torch.zeros_like(frequencies).scatter_add_(0, safe.flatten(), valid.flatten().float())
            facts = torch.stack([drawn, negative_counts, frequencies], 1)
            tables = [items, facts] if availability is None else [items, facts, availability]
            part, pool_ids, (pool, facts, *rest) = gather_pool(item_ids, *tables)
            availability = rest[0] if rest else None
            drawn, uniform, frequencies = facts.unbind(1)
            # log Q: how often the pool is expected to hold the item, whichever way it was drawn
            expected = drawn.sum() * frequencies + uniform.sum() / self.config.num_items
            log_weights = ((drawn + uniform) / expected).log()
            # expected of nobody: an item of the histories, or the padding of another process's part
            log_weights = log_weights.masked_fill(expected == 0, float("-inf"))
        log_weights = log_weights.masked_fill(pool_ids < FIRST_ITEM, float("-inf"))
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights[valid]
        loss = sampled_softmax_loss(
            queries, items[targets], pool, log_weights, members(own, pool_ids, part), row, times[valid], availability,
            weights,
        )  # fmt: skip
        return loss / (valid.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


__all__ = ["PinRecModel", "PinRecModelOutput", "PinRecPreTrainedModel"]
