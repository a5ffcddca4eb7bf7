"""A model that grows: surfaces, outcomes and items that pretraining did not know."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .catalogue_pinrec import Catalogue
from .configuration_pinrec import FIRST_ITEM, UNKNOWN_ITEM, PinRecConfig, more_names
from .embedding_pinrec import append_rows


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

    def add_items(self, catalogue: Catalogue) -> None:
        """Takes a larger catalogue, made by `append`: each new item's own id row begins as a copy of the unknown one.

        Old answers keep their bits. Content, features and hashed ids need no new weights.

        Args:
            catalogue (`Catalogue`): the tokenizer's.

        Raises:
            ValueError: it holds fewer items than the model has learned.
        """
        if len(catalogue) < self.config.num_items:
            raise ValueError(
                f"the catalogue has {len(catalogue)} items, the model learned {self.config.num_items}: catalogues are "
                "append-only, so grow the model's own with Catalogue.append"
            )
        table = self.item_encoder.full_ids
        if table is not None:
            more = len(catalogue) + FIRST_ITEM - table.num_embeddings
            self.item_encoder.full_ids = append_rows(table, more, like=UNKNOWN_ITEM)
        self.config.num_items, self.config.catalogue_fingerprint = len(catalogue), catalogue.fingerprint
