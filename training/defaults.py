"""What pretraining does where nothing is said: rules that read the data, and were chosen on validation (see
docs/experiments.md).

| setting | rule |
|---|---|
| `dropout` | .4 below 20 events a user, .2 below 100, else .1 |
| `signals` | no time where the log knows days only, or no times |
| `softmax` | full up to 5,000 items, else sampled |
| `feature_buckets` | twice the distinct item features, up to a power of two; at most 65,536 |
| `hash_table_size` | one row where neither queries nor item ids are hashed |
| rows a step | about 512 events: a power of two from 8 to 128 |
| uniform negatives | 1,024 a step |
| epochs | 2,000 steps, but 5 epochs at least and 20 at most; with `--max_minutes` as many as it takes |
"""

import math
from typing import Any

import numpy as np

from pinrec_hf.data.windows import SequenceDataset
from pinrec_hf.modeling.configuration_pinrec import DAY, SIGNALS
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.training.arguments import DataArguments, PinRecTrainingArguments

EVENTS_A_STEP, NEGATIVES_A_STEP = 512, 1_024
FULL_SOFTMAX_ITEMS = 5_000
MAX_FEATURE_BUCKETS = 65_536


def default_config(dataset: SequenceDataset, tokenizer: PinRecTokenizer, hashed_ids: bool = False) -> dict[str, Any]:
    """Config fields that depend on the training rows and the catalogue; `hashed_ids`: whether item ids are hashed."""
    events_a_user = dataset.row_lengths.mean() if len(dataset) else 0
    daily = all((times[times >= 0] % DAY == 0).all() for times in dataset.column("timestamps"))
    fields: dict[str, Any] = {
        "dropout": 0.4 if events_a_user < 20 else 0.2 if events_a_user < 100 else 0.1,
        "signals": [name for name in SIGNALS if name != "time" or not daily],
        "softmax": "full" if len(tokenizer.catalogue) <= FULL_SOFTMAX_ITEMS else "sampled",
        "feature_buckets": feature_buckets(tokenizer),
    }
    return fields if hashed_ids or has_queries(dataset) else {**fields, "hash_table_size": 1}


def has_queries(dataset: SequenceDataset) -> bool:
    return any((queries != 0).any() for queries in dataset.column("queries"))


def feature_buckets(tokenizer: PinRecTokenizer, rows_at_once: int = 100_000) -> int:
    """0 where items have no features."""
    distinct = np.zeros(0, np.int64)
    for start in range(0, len(tokenizer.catalogue), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(tokenizer.catalogue)))
        distinct = np.union1d(distinct, tokenizer.catalogue.features(rows))
    count = int((distinct != 0).sum())
    return min(MAX_FEATURE_BUCKETS, 2 ** math.ceil(math.log2(2 * count))) if count else 0


def choose_batches(dataset: SequenceDataset, data_args: DataArguments, training_args: PinRecTrainingArguments) -> int:
    """Fills in rows a step and epochs, where the arguments leave them open; returns uniform negatives a row."""
    processes = training_args.world_size
    if training_args.per_device_train_batch_size is None:
        rows = min(128, max(8, EVENTS_A_STEP / max(1.0, dataset.lengths.mean())))
        training_args.per_device_train_batch_size = max(1, 2 ** round(math.log2(rows)) // processes)
    rows_a_step = training_args.train_batch_size * processes * training_args.gradient_accumulation_steps
    training_args.fill_epochs(min(20, max(5, math.ceil(2_000 * rows_a_step / max(1, len(dataset))))))
    given = data_args.uniform_negatives
    return math.ceil(NEGATIVES_A_STEP / rows_a_step) if given is None else given
