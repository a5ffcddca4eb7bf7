"""Multi-step outcome-conditioned generation: a request's embeddings for several outcomes, steps and time offsets.

    history -> backbone -> outcome head -> one embedding an outcome and offset       (each is a retrieval query)
                  ^                           |  one outcome, by budget, at offset "now"
                  +---- as the next event <---+  snapped to its nearest item, or raw

One backbone pass a step, over one event, with a cache. PinRec, arXiv 2504.10507, v7, section 3.3 (v4, section 3.4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_pinrec import (
    FIRST_ITEM,
    ITEM_EVENT,
    NO_ITEM,
    SUBJECT_EVENT,
    UNKNOWN_ITEM,
    Budget,
    check_budget,
)

ITEM_TABLE = ("item_ids", "item_vectors", "item_features", "item_hashes")
QUERY_TABLE = ("query_hashes", "query_vectors")
EVENTS = (
    "event_items", "event_types", "event_queries", "surface_ids", "outcome_sets", "timestamps", "time_gaps",
)  # fmt: skip
"""Inputs of `forward` with an entry an event."""


@dataclass
class PinRecGenerateOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, embeddings, embedding_size)`): in the order of generation:
            step by step, in a step by outcome (largest share first), for each outcome by offset.
        outcomes (`torch.LongTensor` of shape `(batch, embeddings)`): code of the outcome that was asked for: 0
            unspecified, else its place in `config.outcomes` + 1.
        steps (`torch.LongTensor` of shape `(batch, embeddings)`): from 1.
        offsets (`torch.LongTensor` of shape `(batch, embeddings)`): seconds after the request.
        weights (`torch.FloatTensor` of shape `(batch, embeddings)`): share of the request's slots, a sum of 1; 0 is
            padding, of a request whose budget names fewer outcomes than another's.
        fed_items (`torch.LongTensor` of shape `(batch, num_steps - 1)`, *optional*, returned with `item_embeddings`):
            item ids that were fed back.
    """

    embeddings: Tensor = None  # type: ignore[assignment]  # as ModelOutput wants it
    outcomes: Tensor = None  # type: ignore[assignment]
    steps: Tensor = None  # type: ignore[assignment]
    offsets: Tensor = None  # type: ignore[assignment]
    weights: Tensor = None  # type: ignore[assignment]
    fed_items: Tensor | None = None


class PinRecGeneration(nn.Module):
    """`generate`, for a [`PinRecModel`]."""

    config: Any  # a PinRecConfig

    @torch.no_grad()
    def generate(
        self,
        *,
        outcome_budget: Mapping[str | None, float] | Sequence[Mapping[str | None, float] | None] | None = None,
        num_steps: int = 1,
        offsets: Sequence[int] = (0,),
        item_embeddings: Tensor | None = None,
        item_mask: Tensor | None = None,
        seed: int | None = None,
        cache: Cache | None = None,
        **batch: Tensor,
    ) -> PinRecGenerateOutput:
        """Writes the embeddings of what the user acts on next, `num_steps` events ahead.

        Args:
            outcome_budget: `{"save": 0.7, "click": 0.3}`, one for all requests or one each; by default the
                config's budget of the request's surface, else an unspecified outcome gets everything.
            num_steps: how many events ahead.
            offsets: seconds after the request, of the config's `time_offsets`: an embedding for each. What is fed back
                is that of offset 0.
            item_embeddings (`torch.FloatTensor` of shape `(items, embedding_size)`, *optional*): of the whole
                catalogue, in its order, as `get_item_features` makes them. With them the nearest item that is neither
                in the batch's history, nor the request's subject, nor fed before (once none is left: the nearest of
                all) is fed back; without, the embedding itself, at the mean length of the history's items (a dot
                product's query has another length than an item).
            item_mask (`torch.BoolTensor` of shape `(batch, items)`, *optional*): which of them may be fed back, as long
                as any is left.
            seed: draws the outcome that is fed back by budget; by default the outcomes take turns in proportion.
            cache: keys and values of all but the last events of the batch, padded as it is: only those last ones are
                computed, and added to it with what is fed back. An empty one leaves them for the next request.
            batch: what `PinRecTokenizer` makes of requests, padded on the left.

        Raises:
            ValueError: a budget that divides nothing or names what the model does not know; no step, or more than
                positions are left; an offset that the model lacks, or several steps without offset 0; item
                embeddings or a mask of another shape; padding on the right.
        """
        self._check_generation(num_steps, offsets, item_embeddings, item_mask, batch)
        surfaces = [[None, *(self.config.surfaces or [])][code] for code in batch["target_surfaces"][:, 0].tolist()]
        if outcome_budget is None or isinstance(outcome_budget, Mapping):
            outcome_budget = [outcome_budget] * len(surfaces)
        if len(outcome_budget) != len(surfaces):
            raise ValueError(f"outcome_budget has {len(outcome_budget)} entries for {len(surfaces)} requests")
        budgets = list(map(self.resolve_budget, surfaces, outcome_budget))
        device = batch["event_items"].device
        names = [None, *(self.config.outcomes or [])]
        most = max(map(len, budgets))
        codes = torch.tensor([[*map(names.index, b), *[0] * (most - len(b))] for b in budgets], device=device)
        shares = torch.tensor([[*b.values(), *[0.0] * (most - len(b))] for b in budgets], dtype=torch.float64)
        shares = (shares / shares.amax(1, keepdim=True)).to(device, torch.float32)  # tiny and huge ones fit, too
        shares = shares / shares.sum(1, keepdim=True)
        seconds = torch.tensor(offsets, device=device)
        asked: dict[str, Tensor] = {
            name: batch[name][:, :1].expand(-1, most * len(offsets))
            for name in ("target_surfaces", "target_timestamps", "target_positions", "target_features")
            if name in batch
        }
        asked["target_outcomes"] = codes.repeat_interleave(len(offsets), 1)
        asked["target_offsets"] = seconds.repeat(most).expand_as(asked["target_outcomes"])

        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        feedback = _Feedback(self, batch, item_embeddings, item_mask) if num_steps > 1 else None
        past = 0 if cache is None else cache.get_seq_length()
        asked["target_positions"] = asked["target_positions"] - past
        step_batch, fed_counts = {**_after(batch, past), **asked}, torch.zeros_like(shares)
        use_cache = num_steps > 1 or cache is not None
        written = []
        for step in range(1, num_steps + 1):
            output = self(**step_batch, cache=cache, use_cache=use_cache, last_event_only=True)
            written.append(output.embeddings)
            cache = output.cache
            if feedback is None or step == num_steps:
                break
            if generator is None:
                chosen = (shares * step - fed_counts).argmax(1, keepdim=True)
            else:
                # one draw for all rows, so that a request's outcomes do not depend on what shares its batch
                edges = shares.cumsum(1)
                drawn = torch.rand((), device=device, generator=generator) * edges[:, -1:]
                chosen = (edges[:, :-1] <= drawn).sum(1, keepdim=True)
            fed_counts.scatter_add_(1, chosen, torch.ones_like(shares[:, :1]))
            now = chosen * len(offsets) + list(offsets).index(0)
            embedding = output.embeddings.gather(1, now[..., None].expand(-1, -1, output.embeddings.shape[-1]))
            step_batch = {**feedback.event(embedding[:, 0], codes.gather(1, chosen)), **asked}
            step_batch["target_positions"] = torch.zeros_like(asked["target_outcomes"])
        return PinRecGenerateOutput(
            embeddings=torch.cat(written, 1),
            outcomes=asked["target_outcomes"].repeat(1, num_steps),
            steps=torch.arange(1, num_steps + 1, device=device).repeat_interleave(most * len(offsets)).expand(
                len(codes), -1
            ),
            offsets=asked["target_offsets"].repeat(1, num_steps),
            weights=(shares / (num_steps * len(offsets))).repeat_interleave(len(offsets), 1).repeat(1, num_steps),
            fed_items=None if feedback is None or item_embeddings is None else torch.cat(feedback.fed, 1),
        )  # fmt: skip

    def resolve_budget(self, surface: str | None, budget: Mapping[str | None, float] | None = None) -> Budget:
        """The budget of a request: its own, else its surface's default, else everything to an unspecified outcome.

        Raises:
            ValueError: see `check_budget`.
        """
        default = (self.config.outcome_budgets or {}).get(surface) or {None: 1.0}
        return check_budget(default if budget is None else budget, self.config)

    def _check_generation(
        self, num_steps: int, offsets: Sequence[int], item_embeddings: Tensor | None, item_mask: Tensor | None,
        batch: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}; generate at least 1 step")
        length = int(batch["attention_mask"].sum(1).max())
        if length + num_steps - 1 > self.config.max_position_embeddings:
            raise ValueError(
                f"num_steps={num_steps}: {length} events and {num_steps - 1} fed back are more than the "
                f"{self.config.max_position_embeddings} positions of this model; tell the tokenizer num_steps too, so "
                "that it keeps positions free"
            )
        if not batch["attention_mask"][:, -1].all():
            raise ValueError("generation goes on after the last event: pad on the left (tokenizer.padding_side)")
        known = self.config.time_offsets or [0]
        if not len(offsets) or set(offsets) - set(known):
            raise ValueError(f"offsets {list(offsets)} are not among this model's time_offsets {known}")
        if num_steps > 1 and 0 not in offsets:
            raise ValueError(f"offsets {list(offsets)} lack 0, whose embedding is fed back for the next step; add it")
        needed = (self.config.num_items, self.config.embedding_size)
        if item_embeddings is not None and (
            item_embeddings.ndim != 2 or len(item_embeddings) < needed[0] or item_embeddings.shape[1] != needed[1]
        ):
            raise ValueError(
                f"item_embeddings are {tuple(item_embeddings.shape)}; give those of the whole catalogue, {needed}, as "
                "get_item_features makes them"
            )
        wanted = (len(batch["event_items"]), 0 if item_embeddings is None else len(item_embeddings))
        if item_mask is not None and item_mask.shape != wanted:
            raise ValueError(f"item_mask is {tuple(item_mask.shape)}; give (batch, item_embeddings), {wanted}")


def _after(batch: Mapping[str, Tensor], past: int) -> dict[str, Tensor]:
    """The batch without its first `past` events, and without the items and queries that are theirs alone."""
    if not past:
        return dict(batch)
    cut = {name: value[:, past:] if name in EVENTS else value for name, value in batch.items()}
    for events, table, always in (("event_items", ITEM_TABLE, FIRST_ITEM), ("event_queries", QUERY_TABLE, 0)):
        first = torch.arange(always, device=cut[events].device)
        rows, places = torch.cat([first, cut[events].flatten()]).unique(return_inverse=True)
        cut[events] = places[always:].view_as(cut[events])
        cut |= {name: batch[name][rows] for name in table if name in batch}
    return cut


class _Feedback:
    """What was generated, as the next event of a batch."""

    def __init__(
        self, model: Any, batch: Mapping[str, Tensor], item_embeddings: Tensor | None, item_mask: Tensor | None
    ) -> None:
        self.batch, self.items, self.size = batch, item_embeddings, model.config.hidden_size
        self.item_mask = item_mask
        self.mask, self.last = batch["attention_mask"], batch["timestamps"][:, -1:]
        self.fed: list[Tensor] = []
        is_item = batch["event_types"] == ITEM_EVENT
        if item_embeddings is not None:
            # its subject, the last event, is what a request lies nearest to, and nothing that is acted on next
            is_item[:, -1] |= batch["event_types"][:, -1] == SUBJECT_EVENT
            self.taken = torch.where(is_item, batch["item_ids"][batch["event_items"]], NO_ITEM)
        else:
            table = model.get_item_features(**{name: batch[name] for name in ITEM_TABLE if name in batch})
            lengths = table[:, : self.size].norm(dim=-1)
            count = is_item.sum(1)
            mean = (lengths[batch["event_items"]] * is_item).sum(1) / count.clamp(min=1)
            self.length = torch.where(count > 0, mean, lengths[UNKNOWN_ITEM])

    def event(self, embeddings: Tensor, outcomes: Tensor) -> dict[str, Tensor]:
        """Inputs of `forward` for one more event a row: `(batch, embedding_size)` and `(batch, 1)` outcome codes."""
        if self.items is None:
            content = nn.functional.normalize(embeddings[:, : self.size], dim=-1) * self.length[:, None]
        else:
            scores = embeddings.to(self.items.dtype) @ self.items.T
            rows, places = (self.taken >= FIRST_ITEM).nonzero(as_tuple=True)
            allowed = scores if self.item_mask is None else scores.masked_fill(~self.item_mask, -torch.inf)
            left = allowed.index_put((rows, self.taken[rows, places] - FIRST_ITEM), scores.new_tensor(-torch.inf))
            for more in (allowed, scores):
                left = left.where((left > -torch.inf).any(1, keepdim=True), more)
            nearest = left.argmax(1, keepdim=True)
            self.fed.append(nearest + FIRST_ITEM)
            self.taken = torch.cat([self.taken, nearest + FIRST_ITEM], 1)
            content = self.items[nearest[:, 0], : self.size]
        time = self.batch["target_timestamps"][:, :1]
        gap = (time - self.last).clamp(min=0).where((time >= 0) & (self.last >= 0), -1)
        self.mask, self.last = nn.functional.pad(self.mask, (0, 1), value=1), time
        none = torch.zeros_like(time)
        return {
            "event_items": none,
            "item_embeds": content[:, None].to(embeddings.dtype),
            "event_types": none + ITEM_EVENT,
            "event_queries": none,
            "surface_ids": self.batch["target_surfaces"][:, :1],
            "outcome_sets": torch.ones_like(none) << outcomes,
            "timestamps": time,
            "time_gaps": gap,
            "attention_mask": self.mask,
            # the event brings its item along; the table keeps what every table starts with
            **{name: self.batch[name][:FIRST_ITEM] for name in ITEM_TABLE if name in self.batch},
        }


__all__ = ["PinRecGenerateOutput", "PinRecGeneration"]
