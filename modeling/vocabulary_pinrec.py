"""A model that grows: surfaces, outcomes and items that pretraining did not know."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .catalogue_pinrec import Catalogue
from .configuration_pinrec import FIRST_ITEM, UNKNOWN_ITEM, PinRecConfig, more_names
from .embedding_pinrec import append_rows

NEIGHBOURS = 10
"""Known items that a new one takes its id row from (chosen on validation, see docs/experiments.md)."""


class PinRecVocabulary(nn.Module):
    """What [`PinRecModel`] knows by name."""

    config: PinRecConfig
    event_embedding: Any
    outcome_head: Any
    item_encoder: Any

    def add_surfaces(self, names: Sequence[str]) -> None:
        """Surfaces that pretraining did not know, each beginning as a copy of the unknown one.

        Old answers keep their bits; call `tokenizer.add_surfaces` with the same names, and finetune.

        Raises:
            ValueError: a surface that is there already, or named twice.
        """
        self.config.surfaces = more_names("surfaces", self.config.surfaces, names)
        for part in (self.event_embedding, self.outcome_head, self.outcome_head.bias):
            if part is not None and part.surfaces is not None:
                part.surfaces = append_rows(part.surfaces, len(names))

    def add_outcomes(self, names: Sequence[str], negative: bool = False) -> None:
        """Outcomes that pretraining did not know, each beginning as a copy of the unknown one (in events) and of the
        unspecified one (in requests).

        Old answers keep their bits; call `tokenizer.add_outcomes` with the same arguments, and finetune.

        Args:
            names (`list[str]`)
            negative (`bool`): whether they are inputs only, as `hide` is.

        Raises:
            ValueError: an outcome that is there already or named twice, or more than 62 in all.
        """
        self.config.outcomes = more_names("outcomes", self.config.outcomes, names)
        if negative:
            self.config.negative_outcomes = [*(self.config.negative_outcomes or []), *names]
        for part in (self.event_embedding, self.outcome_head, self.outcome_head.bias):
            if part is not None and part.outcomes is not None:
                part.outcomes = append_rows(part.outcomes, len(names))

    def add_items(self, catalogue: Catalogue, boost: float = 0.0) -> None:
        """Takes a larger catalogue, made by `append`: each new item's own id row begins as the mean of those of the ten
        known items nearest to it in content, or as the unknown one's where the catalogue has no content.

        So that it is found among the items that it looks like, with their popularity (Gantner et al. 2010, "Learning
        attribute-to-feature mappings for cold-start recommendations"). Old answers keep their bits. Content, features
        and hashed ids need no new weights.

        Args:
            catalogue (`Catalogue`): the tokenizer's.
            boost (`float`): added to every score of a new item, until it is trained; how many slots new items get at
                the cost of the others is for the caller to choose, on validation.

        Raises:
            ValueError: it holds fewer items than the model has learned, or a boost without full ids and their biases.
        """
        if len(catalogue) < self.config.num_items:
            raise ValueError(
                f"the catalogue has {len(catalogue)} items, the model learned {self.config.num_items}: catalogues are "
                "append-only, so grow the model's own with Catalogue.append"
            )
        table = self.item_encoder.full_ids
        if boost and (table is None or self.config.similarity != "dot"):
            raise ValueError('a boost is a bias of new id rows: it needs item_id_embedding="full" and similarity="dot"')
        if table is not None:
            known = table.num_embeddings - FIRST_ITEM
            grown = append_rows(table, len(catalogue) - known, like=UNKNOWN_ITEM)
            if catalogue.content_size:
                neighbours = content_neighbours(catalogue, known, NEIGHBOURS) + FIRST_ITEM
                rows = nn.functional.embedding_bag(neighbours.to(table.weight.device), table.weight.data, mode="mean")
                grown.weight.data[known + FIRST_ITEM :] = rows
            if boost:
                grown.weight.data[known + FIRST_ITEM :, self.config.hidden_size] += boost  # the bias that all ask for
            self.item_encoder.full_ids = grown
        self.config.num_items, self.config.catalogue_fingerprint = len(catalogue), catalogue.fingerprint


def content_neighbours(catalogue: Catalogue, known: int, count: int) -> Tensor:
    """Of each item after the first `known`, those of the known ones with the highest cosine of content vectors.

    Returns:
        `torch.LongTensor` of shape `(new items, min(count, known))`: catalogue rows, the nearest first.
    """
    new = torch.from_numpy(catalogue.vectors(np.arange(known, len(catalogue))))
    cosines, rows = new.new_empty(len(new), 0), torch.empty(len(new), 0, dtype=torch.int64)
    for start in range(0, known, 1 << 16):  # blocks of both, so that neither has to fit into memory twice
        block = np.arange(start, min(start + (1 << 16), known))
        vectors = nn.functional.normalize(torch.from_numpy(catalogue.vectors(block)))
        best = [(part @ vectors.T).topk(min(count, len(block))) for part in new.split(1_024)]
        cosines = torch.cat([cosines, torch.cat([b.values for b in best])], 1)
        rows = torch.cat([rows, torch.cat([b.indices for b in best]) + start], 1)
        cosines, kept = cosines.topk(min(count, cosines.shape[1]))
        rows = rows.gather(1, kept)
    return rows
