"""What goes into the backbone: items, queries and times to vectors, and their sum, the event embedding."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_pinrec import (
    DAY,
    FIRST_ITEM,
    UNKNOWN_ITEM,
    PinRecConfig,
)

MICROSECONDS = 1_000_000
GAP_PERIODS = tuple(round(MICROSECONDS * (28 * DAY) ** (i / 31)) for i in range(32))
"""Microseconds: 32 periods from 1 s to 4 weeks, evenly spaced by their logarithm."""


class PinRecRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


@torch.no_grad()
def append_rows(table: nn.Embedding, count: int, like: int = 0) -> nn.Embedding:
    """A table with `count` more rows, copies of row `like`; the others keep their bits."""
    weight = table.weight
    rows = torch.cat([weight, weight[[like]].expand(count, -1)])
    return nn.Embedding.from_pretrained(rows, freeze=not weight.requires_grad)


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
        self.sparse = False  # gradients of the rows that were read, as of `nn.Embedding`
        self.weight = nn.Parameter(torch.empty(functions * rows, size // functions))

    def forward(self, hashes: Tensor) -> Tensor:
        vectors = nn.functional.embedding(self._rows(hashes), self.weight, sparse=self.sparse).flatten(-2)
        return vectors * (hashes != 0)[..., None]

    def bag(self, hashes: Tensor) -> Tensor:
        """`(n, values)` to the sums `(n, size)` of each row's vectors, with one hash function; no vector is copied."""
        known = (hashes != 0).to(self.weight.dtype)
        rows = self._rows(hashes).squeeze(-1)
        return nn.functional.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=known, sparse=self.sparse)

    def _rows(self, hashes: Tensor) -> Tensor:
        """`(...)` to rows of the table `(..., functions)`."""
        rows = [
            # multiply-shift hashing (Dietzfelbinger 1997): the high bits are the well-mixed ones
            (((hashes * multiplier) >> 32) & 0x7FFFFFFF) % self.rows + i * self.rows
            for i, multiplier in enumerate(self.MULTIPLIERS[: self.functions])
        ]
        return torch.stack(rows, -1)


class EntityEncoder(nn.Module):
    """Content vector, feature bag and id of an item (or query) to its embedding: their sum and a 2-layer MLP of it.

    `biases` more outputs say how likely the item is: whoever asks, and on which surface, with which outcome.
    """

    def __init__(self, config: PinRecConfig, content_size: int, id_embedding: str | None, features: int, biases: int):
        super().__init__()
        self.id_dropout = config.item_id_dropout
        self.hidden_size, width = config.hidden_size, config.hidden_size + biases
        self.content = nn.Linear(content_size, width, bias=False) if content_size else None
        self.features = HashedEmbedding(config.hidden_size, 1, features) if features else None
        self.feature_bias = HashedEmbedding(biases, 1, features) if features and biases else None
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
            total = total + self.content(cast(Tensor, vectors).to(self.content.weight.dtype))
        if self.features is not None:
            bag = self.features.bag(cast(Tensor, features))
            bias = None if self.feature_bias is None else self.feature_bias.bag(cast(Tensor, features))
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
        self.periods = config.time_periods or []
        self.gap_phase = nn.Parameter(torch.zeros(len(GAP_PERIODS)))
        self.proj = nn.Linear(2 * len(self.periods) + len(GAP_PERIODS) + 3, config.hidden_size)

    def forward(self, timestamps: Tensor, gaps: Tensor) -> Tensor:
        """int64 seconds since epoch (UTC) and int64 seconds since the event before, -1 unknown, any shape."""
        # the modulo is taken in int64: a float32 second steps by 128 s at today's timestamps, and on another device the
        # phase of a long gap would be another
        phase = _phase(timestamps, torch.tensor(self.periods, device=timestamps.device))
        known = (timestamps >= 0)[..., None].float()
        gaps, gap_known = gaps.clamp(min=0), (gaps >= 0)[..., None].float()
        wave = _phase(gaps * MICROSECONDS, torch.tensor(GAP_PERIODS, device=gaps.device)) + self.gap_phase.float()
        features = [phase.sin() * known, phase.cos() * known, known]
        features += [wave.sin() * gap_known, gaps[..., None].float().log1p() / 10 * gap_known, gap_known]
        return self.proj(torch.cat(features, -1).to(self.proj.weight.dtype))


def _phase(times: Tensor, periods: Tensor) -> Tensor:
    """int64 times `(...)` and periods `(n,)` of one unit to float32 radians `(..., n)`."""
    return (times[..., None] % periods).float() / periods * (2 * math.pi)


def outcome_indicators(outcome_sets: Tensor, outcomes: int) -> Tensor:
    """Bit sets `(...)` int64 to 0/1 indicators `(..., outcomes)`."""
    return (outcome_sets[..., None] >> torch.arange(outcomes, device=outcome_sets.device)) & 1


class EventEmbedding(nn.Module):
    """What happened, to whom it is shown next: item or query + type + surface + outcomes + time."""

    def __init__(self, config: PinRecConfig) -> None:
        super().__init__()
        self.config = config
        size, signals = config.hidden_size, config.signals or []
        self.types = nn.Embedding(4, size)
        self.surfaces = nn.Embedding(len(config.surfaces or []) + 1, size) if "surface" in signals else None
        # row 0: an unknown outcome, which is how a masked set looks too; no outcome at all adds nothing
        self.outcomes = nn.Embedding(len(config.outcomes or []) + 1, size) if "outcome" in signals else None
        self.time = TimeEncoding(config) if "time" in signals else None

    def forward(
        self, content: Tensor, types: Tensor, surfaces: Tensor, outcome_sets: Tensor, timestamps: Tensor, gaps: Tensor
    ) -> Tensor:
        """`(batch, length, hidden_size)` and five `(batch, length)` to `(batch, length, hidden_size)`."""
        events = content + self.types(types)
        if self.surfaces is not None:
            events = events + self.surfaces(surfaces)
        if self.outcomes is not None:
            if self.training and self.config.outcome_dropout:
                masked = torch.rand(outcome_sets.shape, device=outcome_sets.device) < self.config.outcome_dropout
                outcome_sets = outcome_sets.masked_fill(masked, 1)
            indicators = outcome_indicators(outcome_sets, len(self.config.outcomes or []) + 1)
            events = events + indicators.to(events.dtype) @ self.outcomes.weight
        if self.time is not None:
            events = events + self.time(timestamps, gaps)
        return events
