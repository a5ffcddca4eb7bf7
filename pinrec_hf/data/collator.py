"""Windows to training batches: which event predicts which, under which condition, against which negatives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BatchEncoding

from pinrec_hf.modeling.catalogue_pinrec import ALWAYS
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT
from pinrec_hf.modeling.tokenization_pinrec import EncodedRow, PinRecTokenizer

IGNORED_LABEL = -100
TARGETS = ("next", "window", "session")


@dataclass
class TargetCollator(ABC):
    """Windows and their targets to batches; what becomes a target is said by `PretrainingCollator` and by
    `FinetuningCollator`.

    Every random choice is drawn from (seed, epoch, window), so that a resumed run, or one on more processes, makes
    the same ones.

    Args:
        pinrec_tokenizer: makes the batch. (A Trainer copies what a collator has as `tokenizer`, catalogue and all, into
            every checkpoint.)
        frequencies (float `(num_items + 2,)`): each item id's share of the training targets (Q of in-batch
            negatives).
        seed (`int`)
        uniform_negatives (`int`): negatives that each window draws uniformly from the catalogue.
        drawn_from (`int`, *optional*): of its first so many items, by default all. The model's `num_items`, by which
            it corrects: a catalogue to which `pinrec index --add` added has more.
        full_softmax (`bool`): whether the item table holds the whole catalogue instead.
        condition_dropout (`float`): share of targets whose outcome is left unspecified; the others name one of the
            target's own positive outcomes.
        time_dropout (`float`): share of targets whose request time is hidden.
        recency_half_life (`float`, *optional*): seconds after which a target counts half, back from `last_time`; a
            target of unknown time counts as the oldest one at `first_time`.
    """

    pinrec_tokenizer: PinRecTokenizer
    frequencies: np.ndarray
    seed: int = 0
    uniform_negatives: int = 16
    drawn_from: int | None = None
    full_softmax: bool = False
    condition_dropout: float = 0.15
    time_dropout: float = 0.1
    recency_half_life: float | None = None
    first_time: int = 0
    last_time: int = 0

    def __call__(self, windows: Sequence[EncodedRow]) -> BatchEncoding:
        targets = [self._targets(window) for window in windows]
        num_items = len(self.pinrec_tokenizer.catalogue)
        if self.full_softmax:
            negatives = np.arange(num_items) + FIRST_ITEM
        else:
            negatives = np.concatenate([target["negatives"] for target in targets])
        hard = [target["hard_items"] for target in targets if "hard_items" in target]
        labels = [target["items"] for target in targets]
        batch = self.pinrec_tokenizer.pad(windows, extra_items=np.concatenate([negatives, *labels, *hard]))
        ids, mask = batch["item_ids"].numpy(), batch["attention_mask"].numpy()
        offsets = mask.argmax(1)

        size = max(len(target["events"]) for target in targets)
        fills = {"labels": IGNORED_LABEL, "target_timestamps": -1, "label_timestamps": -1}
        columns = {
            "target_positions": [offsets[i] + target["events"] for i, target in enumerate(targets)],
            "target_surfaces": [target["surfaces"] for target in targets],
            "target_outcomes": [target["outcomes"] for target in targets],
            "target_timestamps": [target["timestamps"] for target in targets],
            "labels": [np.searchsorted(ids, target["items"]) for target in targets],
            "label_weights": [target["weights"] for target in targets],
            "label_timestamps": [target["label_timestamps"] for target in targets],
        }
        for column, name in (("target_offsets", "offsets"), ("label_groups", "groups")):
            if name in targets[0]:
                columns[column] = [target[name] for target in targets]
        if self.pinrec_tokenizer.request_features:
            columns["target_features"] = [target["features"] for target in targets]
        for name, values in columns.items():
            grid = np.full((len(values), size), fills.get(name, 0), np.float32 if name == "label_weights" else np.int64)
            for row, value in zip(grid, values, strict=True):
                row[: len(value)] = value
            batch[name] = torch.from_numpy(grid)
        if hard:
            batch["hard_negatives"] = self._hard_negatives(targets, ids, batch["labels"])

        batch["item_frequencies"] = torch.from_numpy(self.frequencies[ids].astype(np.float32))
        rows = ids[ids >= FIRST_ITEM] - FIRST_ITEM
        if self.pinrec_tokenizer.catalogue.has_availability:
            availability = np.tile(ALWAYS, (len(ids), 1))
            availability[ids >= FIRST_ITEM] = self.pinrec_tokenizer.catalogue.availability(rows)
            batch["item_availability"] = torch.from_numpy(availability)
        if not self.full_softmax:
            counts = np.bincount(np.searchsorted(ids, negatives), minlength=len(ids))
            batch["negative_counts"] = torch.from_numpy(counts.astype(np.float32))
        return batch

    @staticmethod
    def _hard_negatives(targets: list[EncodedRow], ids: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
        """Rows in the item table `(batch, targets, n)`, padded with the target's own."""
        width = max(int(target["hard_counts"].max(initial=0)) for target in targets)
        rows = labels.clamp(min=0)[..., None].repeat(1, 1, width).numpy()
        for row, target in zip(rows, targets, strict=True):
            there = np.arange(width) < target["hard_counts"][:, None]
            row[: len(there)][there] = np.searchsorted(ids, target["hard_items"])
        return torch.from_numpy(rows)

    @abstractmethod
    def _targets(self, window: EncodedRow) -> EncodedRow:
        """A window's targets; `events` is the place of the event before each, the start event being 0."""

    def _with_choices(self, window: EncodedRow, targets: EncodedRow) -> EncodedRow:
        """Targets with what is drawn for them: the one outcome that is named, whether the request's time is hidden,
        negatives. `outcomes` are sets before, `timestamps` when the request was made."""
        rng = np.random.default_rng((self.seed, *window["key"], 1))
        weights, times = targets["weights"].astype(np.float64), targets["label_timestamps"]
        if self.recency_half_life is not None:
            age = self.last_time - np.where(times >= 0, times, self.first_time)
            weights = weights * 0.5 ** (age / self.recency_half_life)
        hidden = rng.random((2, len(times)))
        num_items = len(self.pinrec_tokenizer.catalogue) if self.drawn_from is None else self.drawn_from
        named = _one_of(targets["outcomes"], rng.random(len(times)))
        return {
            **targets,
            "outcomes": np.where(hidden[0] < self.condition_dropout, 0, named),
            "timestamps": np.where(hidden[1] < self.time_dropout, -1, targets["timestamps"]),
            "weights": weights,
            "negatives": rng.integers(num_items, size=self.uniform_negatives) + FIRST_ITEM,
        }


@dataclass
class PretrainingCollator(TargetCollator):
    """Targets on every surface: the event before each positive one predicts it, or what comes soon after.

    Args:
        target (`str`): `"next"`: the next positive event; `"window"`: one of the next `target_window`, drawn at random
            (PinRec v1, every event of a future window, an epoch after the other); `"session"`: those of the next
            `target_window` in the same feed view, of which the likeliest counts (v4, section 3.2; which one that is
            nobody knows before, so that under a sampled softmax Q is that of `"next"`, an approximation).
        target_window (`int`): positive events that an event may predict.
    """

    target: str = "next"
    target_window: int = 8

    def _targets(self, window: EncodedRow) -> EncodedRow:
        kept = slice(-(self.pinrec_tokenizer.model_max_length - 1), None)
        types, items, sets = (window[name][kept] for name in ("types", "items", "outcomes"))
        positive = sets & self.pinrec_tokenizer.positive_mask
        # an item that was merely shown was not acted on
        acted = (types == ITEM_EVENT) & (items >= FIRST_ITEM) & (sets > 0)
        first = np.zeros(len(items), bool)
        # an item that the user acted on before is no target, as in evaluation
        places = np.flatnonzero(acted)
        first[places[np.unique(items[places], return_index=True)[1]]] = True
        events = np.flatnonzero(first & (positive != 0))
        asked, wanted = self._pairs(
            window["requests"][kept][events], np.random.default_rng((self.seed, *window["key"]))
        )
        of = {name: window[name][kept][events] for name in ("surfaces", "timestamps", "weights", "features")}
        requested, happened = of["timestamps"][asked], of["timestamps"][wanted]
        targets = self._with_choices(
            window,
            {
                "events": events[asked],
                "items": items[events][wanted],
                "surfaces": of["surfaces"][wanted],
                "outcomes": positive[events][wanted],
                "timestamps": requested,
                "label_timestamps": happened,
                "weights": of["weights"][wanted],
                "features": of["features"][asked],
            },
        )
        if self.target == "window":
            targets["offsets"] = np.where((requested >= 0) & (happened >= 0), happened - requested, -1)
        if self.target == "session":  # what shares an event and a condition competes, so that both must be one's own
            targets["offsets"] = np.full(len(asked), -1)
            targets["timestamps"] = targets["timestamps"][np.searchsorted(asked, asked)]
            targets["groups"] = np.unique(asked * 64 + targets["outcomes"], return_inverse=True)[1]
        return targets

    def _pairs(self, views: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which target is asked for as if in the place of which: two indexes of targets, whose feed views are given."""
        places = np.arange(len(views))
        if self.target == "next":
            return places, places
        left = np.minimum(self.target_window, len(views) - places)
        if self.target == "window":
            return places, places + np.floor(rng.random(len(views)) * left).astype(np.int64)
        ahead = np.arange(self.target_window)
        later = np.minimum(places[:, None] + ahead, len(views) - 1)
        same_view = (ahead < left[:, None]) & (views[later] == views[:, None]) & (views[:, None] >= 0) | (ahead == 0)
        asked, step = np.nonzero(same_view)
        return asked, asked + step


@dataclass
class FinetuningCollator(TargetCollator):
    """Targets of feed views, as `view_windows` found them, each predicted from its view's request.

    Args:
        impression_negatives (`bool`): whether the view's ignored items are hard negatives of its targets. A full
            softmax has every item as a negative, them too, so that it says nothing there.
    """

    impression_negatives: bool = True

    def _targets(self, window: EncodedRow) -> EncodedRow:
        names = ("events", "items", "surfaces", "outcomes", "timestamps", "offsets", "weights", "features")
        targets = {name: window[f"target_{name}"] for name in names}
        targets = self._with_choices(window, {**targets, "label_timestamps": targets["timestamps"]})
        if self.impression_negatives and not self.full_softmax:
            targets |= {name: window[name] for name in ("hard_items", "hard_counts")}
        return targets


def _one_of(sets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Index of one bit of each bit set, chosen uniformly by a draw from [0, 1)."""
    bits = (sets[:, None] >> np.arange(63)) & 1
    wanted = np.floor(draws * bits.sum(1)) + 1
    return (bits.cumsum(1) >= wanted[:, None]).argmax(1)
