"""PinRec: a transformer over a user's events on all surfaces that writes the embeddings of the next items.

Notable features:
- one item encoder (content vector, hashed features, id) for inputs, targets and the index
- each batch carries a table of its distinct items, so that an item is encoded once however often it occurs
- pre-norm blocks: RMSNorm, rotary positions, gated MLP
- conditions (surface, outcome, request time) enter in the outcome head only: one backbone pass serves them all
- dot product with item biases, carried as more dimensions, so that retrieval stays inner-product search

Source: PinRec, arXiv 2504.10507 (v7, sections 3 and 4); time encoding from PinnerFormer, arXiv 2205.04507.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pinrec import FIRST_ITEM, PinRecConfig
from .embedding_pinrec import EntityEncoder, EventEmbedding, HashedEmbedding, PinRecRMSNorm, TimeEncoding
from .generation_pinrec import PinRecGeneration
from .layers_pinrec import ConditionBias, OutcomeHead, PinRecAttention, PinRecLayer, PinRecRotaryEmbedding
from .loss_pinrec import draw_log_weights, gather_pool, likeliest, places_in_pool, sampled_softmax_loss
from .vocabulary_pinrec import PinRecVocabulary


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

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


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
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As everywhere in transformers, but weights that are cut off or missing are an error, not a warning.

        Raises:
            ValueError: a weight file is truncated, or the checkpoint is another model's.
        """
        path = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"a weight file of {path} is truncated or damaged; copy it again ({error})") from error
        model, info = loaded
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
            # what happened comes first: at a random start, some fifty time features would drown the item
            init.zeros_(module.proj.weight)
        elif isinstance(module, ConditionBias):
            module.reset_parameters()
        elif isinstance(module, PinRecModel) and module.log_temperature is not None:
            init.constant_(module.log_temperature, math.log(0.05))


class PinRecModel(PinRecGeneration, PinRecVocabulary, PinRecPreTrainedModel):
    """The whole model: item encoder, event embedding, backbone and outcome head.

    A batch carries a table of its distinct items (`item_ids` and what the catalogue knows of them) and, for each
    event, the item's row in that table; [`PinRecTokenizer`] makes both from rows of a log or from requests.
    """

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__(config)
        self.item_encoder = EntityEncoder(
            config, config.content_size, config.item_id_embedding, config.feature_buckets, config.bias_size or 0
        )
        self.query_encoder = EntityEncoder(config, config.query_size, "hashed", 0, biases=0)
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
        self, events: Tensor, event_types: Tensor, attention_mask: Tensor | None, position_ids: Tensor,
        cache: Cache | None, last_event_only: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """`(batch, length, hidden_size)` events to hidden states of the same shape, each seeing no later event; with
        `last_event_only` those of the last one, `(batch, 1, hidden_size)`."""
        mask = create_causal_mask(self.config, events, attention_mask, cache, position_ids)
        position_embeddings = self.rotary_emb(position_ids, events.dtype)
        # the last layer's other outputs are nobody's input; masks of flash and flex attention cannot be cut
        cut = last_event_only and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4))
        kwargs |= {"attention_mask": mask, "position_embeddings": position_embeddings, "cache": cache}
        hidden_states = events
        for layer in self.layers:
            hidden_states = layer(hidden_states, last_event_only=cut and layer is self.layers[-1], **kwargs)
        return self.norm(hidden_states)

    def get_input_embeddings(self) -> Any:
        """`None`: events are no tokens; items and queries have encoders of their own. FSDP asks for it."""
        return None

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
            item_vectors (`torch.FloatTensor` of shape `(items, content_size)`, *optional*): content vectors.
            item_features (`torch.LongTensor` of shape `(items, features)`, *optional*): hashes, 0 padding.
            item_hashes (`torch.LongTensor` of shape `(items,)`, *optional*): of the ids, for hashed ids.

        Returns:
            `torch.FloatTensor` of shape `(items, embedding_size)`; with a dot product the last `bias_size` are biases.
        """
        for field, needed, given in (
            ("item_vectors", self.config.content_size, item_vectors),
            ("item_features", self.config.feature_buckets, item_features),
            ("item_hashes", self.config.item_id_embedding == "hashed", item_hashes),
        ):
            if needed and given is None:
                raise ValueError(f"this model encodes items with {field}, which is missing; PinRecTokenizer makes it")
        items = self.item_encoder(item_ids, item_hashes, item_vectors, item_features)
        return items if self.config.similarity == "dot" else nn.functional.normalize(items, dim=-1)

    def get_query_features(self, query_hashes: Tensor, query_vectors: Tensor | None = None) -> Tensor:
        """Embeddings `(queries, hidden_size)` of search queries, from their text's hash and content vector (zeros
        where there is none)."""
        is_query = query_hashes != 0
        # an event without a query adds nothing, whether or not another one in its batch has one
        return self.query_encoder(is_query * FIRST_ITEM, query_hashes, query_vectors, None) * is_query[:, None]

    def get_user_features(self, **batch: Any) -> Tensor:
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
        item_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
        target_surfaces: Tensor | None = None,
        target_outcomes: Tensor | None = None,
        target_timestamps: Tensor | None = None,
        target_offsets: Tensor | None = None,
        target_features: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        label_timestamps: Tensor | None = None,
        label_groups: Tensor | None = None,
        negative_counts: Tensor | None = None,
        hard_negatives: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        last_event_only: bool = False,
        **kwargs: Any,
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
            item_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): item embeddings of
                the events in place of `event_items`, as a generated one is fed back.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 is padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): restart at 0 to pack users.
            target_positions (`torch.LongTensor` of shape `(batch, targets)`, *optional*): the event after which
                each target is asked for.
            target_surfaces, target_outcomes, target_timestamps (`torch.LongTensor` of shape `(batch, targets)`):
                the conditions of each target: surface (0 unknown), outcome (0 unspecified, else place + 1), time of
                the request (-1 unknown).
            target_offsets (`torch.LongTensor` of shape `(batch, targets)`, *optional*): seconds after the request that
                the target happens, for a model with `time_offsets`; -1 unknown, 0 by default.
            target_features (`torch.LongTensor` of shape `(batch, targets)`, *optional*): request features, packed as
                the tokenizer does.
            labels (`torch.LongTensor` of shape `(batch, targets)`, *optional*): row in the item table, -100 none.
            label_weights (`torch.FloatTensor` of shape `(batch, targets)`, *optional*): of each target in the loss.
            label_timestamps (`torch.LongTensor` of shape `(batch, targets)`, *optional*): when the targets happened,
                where `target_timestamps` hides it: only items live then are negatives; -1 unknown.
            label_groups (`torch.LongTensor` of shape `(batch, targets)`, *optional*): of a row's targets that share a
                group, and must share position and conditions, only the likeliest counts: the least loss over a
                session (PinRec v4, section 3.2).
            negative_counts (`torch.FloatTensor` of shape `(items,)`, *optional*): how often each item of the table
                was drawn uniformly as a negative.
            hard_negatives (`torch.LongTensor` of shape `(batch, targets, n)`, *optional*): rows in the item table of
                each target's own negatives, such as what was shown beside it and ignored; padded with its label.
            last_event_only (`bool`): all targets are asked for after the last event: hidden states of no other leave
                the last layer, which saves most of its work.
        """
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names are for the PeftModel that load_surface_adapters returns; call that one")
        items = self.get_item_features(item_ids, item_vectors, item_features, item_hashes)
        content = items[event_items][..., : self.config.hidden_size] if item_embeds is None else item_embeds
        if query_hashes is not None:
            content = content + self.get_query_features(query_hashes, query_vectors)[event_queries]
        events = self.event_embedding(content, event_types, surface_ids, outcome_sets, timestamps, time_gaps)
        events = self.dropout(events * self.config.hidden_size**0.5)

        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = self._positions(attention_mask, events, cache)
        hidden_states = self.backbone(
            events, event_types, attention_mask, position_ids, cache, last_event_only=last_event_only, **kwargs
        )

        embeddings = loss = None
        pool = self.outcome_head.pool
        # every chunk of events goes into the cache, also one after which nothing is asked
        pooled = None if pool is None else pool.keys_and_values(events, cache)
        if target_positions is not None:
            if target_timestamps is None:
                raise ValueError("target_positions need target_timestamps beside them: -1 where the time is unknown")
            ages = None
            if pooled is not None:
                ages = self._ages(target_positions, position_ids, attention_mask, pooled[0].shape[2])
            embeddings = self._user_embeddings(
                hidden_states, timestamps, target_positions, target_surfaces, target_outcomes, target_timestamps,
                target_offsets, target_features, pooled, ages,
            )  # fmt: skip
            if labels is not None:
                if label_groups is not None:
                    labels = likeliest(embeddings.detach(), items.detach(), labels, label_groups)
                times = target_timestamps if label_timestamps is None else label_timestamps
                loss = self._loss(
                    embeddings, labels, label_weights, times, items, item_ids, event_items,
                    item_availability, item_frequencies, negative_counts, num_items_in_batch, hard_negatives,
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
    def _ages(targets: Tensor, position_ids: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
        """`(batch, targets, length)`: how many events before each target's every event is, cached ones included; -1
        where the target may not see it."""
        new = position_ids.shape[1]
        ages = targets[..., None] + length - new - torch.arange(length, device=targets.device)
        visible = ages >= 0
        if attention_mask is not None:
            visible = visible & attention_mask[:, None].bool()
        elif length == new:  # several users may be packed into a row: each sees its own events
            user = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
            visible = visible & (user[:, None] == user.expand(len(targets), -1).gather(1, targets)[..., None])
        return ages.where(visible, -1)

    def _user_embeddings(
        self, hidden_states: Tensor, timestamps: Tensor, positions: Tensor, surfaces: Tensor | None,
        outcomes: Tensor | None, target_timestamps: Tensor, offsets: Tensor | None, features: Tensor | None,
        pooled: tuple[Tensor, Tensor] | None, ages: Tensor | None,
    ) -> Tensor:  # fmt: skip
        left_out = timestamps.shape[1] - hidden_states.shape[1]
        index = (positions - left_out)[..., None].expand(-1, -1, hidden_states.shape[-1])
        last = timestamps.gather(1, positions)
        gaps = (target_timestamps - last).clamp(min=0).where((target_timestamps >= 0) & (last >= 0), -1)
        return self.outcome_head(
            hidden_states.gather(1, index), surfaces, outcomes, target_timestamps, gaps, offsets, features, pooled,
            ages,
        )  # fmt: skip

    def _loss(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor | None, times: Tensor, items: Tensor,
        item_ids: Tensor, event_items: Tensor, availability: Tensor | None,
        frequencies: Tensor | None, negative_counts: Tensor | None,
        num_items_in_batch: Tensor | int | None, hard_negatives: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        valid = labels >= 0
        safe = labels.where(valid, 0)
        row = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)[valid]
        queries, targets = embeddings[valid], safe[valid]
        if self.log_temperature is not None:
            queries = queries / self.log_temperature.exp().clamp(min=0.01)

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
            log_weights = draw_log_weights(facts, valid.sum(1), self.config.num_items)
        log_weights = log_weights.masked_fill(pool_ids < FIRST_ITEM, float("-inf"))
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights[valid]
        own = places_in_pool(torch.cat([event_items, safe], 1), item_ids, pool_ids, part).flatten(1)
        hard = None if hard_negatives is None else places_in_pool(hard_negatives[valid], item_ids, pool_ids, part)
        loss = sampled_softmax_loss(
            queries, items[targets], pool, log_weights, own, row, times[valid], availability, weights, hard
        )
        count = valid.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return loss / count.clamp(min=1)  # a batch may hold no target at all


__all__ = ["PinRecModel", "PinRecModelOutput", "PinRecPreTrainedModel"]
