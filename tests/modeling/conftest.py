"""Batches of the tiny log, for the model's tests."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import BatchEncoding

from pinrec_hf.data.collator import PretrainingCollator
from pinrec_hf.modeling.events_pinrec import HISTORY_COLUMNS


@pytest.fixture(scope="session")
def windows(tiny_data, tokenizer):
    """Six users of very different lengths, encoded, with the keys that the collator's choices are drawn from."""
    table = pq.read_table(tiny_data / "train")
    columns = [name for name in HISTORY_COLUMNS if name in table.column_names]
    rows = tokenizer.encode([{name: row[name] for name in columns} for row in table.to_pylist()])
    by_length = sorted(rows, key=lambda row: len(row["items"]))
    chosen = [by_length[i] for i in (0, 20, 40, 60, 70, 79)]
    return [{**row, "key": np.array([0, i])} for i, row in enumerate(chosen)]


@pytest.fixture(scope="session")
def collator(tokenizer):
    """Every item is as often a target as any other, as far as Q knows."""
    size = len(tokenizer.catalogue)
    return PretrainingCollator(tokenizer, np.array([0, 0, *[1 / size] * size]), uniform_negatives=8)


@pytest.fixture
def training_batch(collator, windows) -> BatchEncoding:
    """Inputs of `forward` with labels: 6 rows, padded on the left."""
    return collator(windows)
