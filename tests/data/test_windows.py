"""Rows become windows: every event in one of them, found again from the cache, in an order that the seed decides."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinrec_hf.data.collator import IGNORED_LABEL, PretrainingCollator
from pinrec_hf.data.dataset_folder import build_tokenizer
from pinrec_hf.data.windows import LengthGroupedSampler, SequenceDataset, encode_split
from pinrec_hf.modeling.configuration_pinrec import ITEM_EVENT
from pinrec_hf.modeling.events_pinrec import EVENT_COLUMNS, HISTORY_COLUMNS

FEATURES = datasets.Features(
    {name: datasets.List(datasets.Value(np.dtype(t).name)) for name, t in EVENT_COLUMNS.items()}
)


def dataset_of(rows: list[list[int]], chunk: int = 3, **columns) -> datasets.Dataset:
    """Encoded rows in chunks of a few: items as given, everything else as `columns` says (or ones)."""
    table = {
        name: [np.asarray(columns[name][i] if name in columns else np.ones(len(row)), t) for i, row in enumerate(rows)]
        for name, t in EVENT_COLUMNS.items()
    }
    table["items"] = [np.asarray(row, np.int64) for row in rows]
    whole = datasets.Dataset.from_dict(table, features=FEATURES).data.table
    parts = [whole.slice(i, chunk).combine_chunks() for i in range(0, len(rows), chunk)]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(parts)))


# -- encode_split ------------------------------------------------------------------------------------------------


def test_encoded_rows_are_what_the_tokenizer_says(tiny_data, tokenizer):
    encoded = encode_split(tiny_data, "train", tokenizer)
    rows = pq.read_table(tiny_data / "train").to_pylist()
    assert len(encoded) == len(rows) == 80
    dataset = SequenceDataset(encoded, window=10_000)
    histories = [{name: row[name] for name in HISTORY_COLUMNS if name in row} for row in rows]
    for i, expected in enumerate(tokenizer.encode(histories)):
        for name in EVENT_COLUMNS:
            assert np.array_equal(dataset[i][name], expected[name]), name
            assert dataset[i][name].dtype == EVENT_COLUMNS[name]


def test_the_cache_is_found_again_and_knows_what_it_was_made_of(tiny_data, tokenizer):
    def files(tok):
        return [file["filename"] for file in encode_split(tiny_data, "train", tok).cache_files]

    first = files(tokenizer)
    assert first == files(tokenizer) == files(build_tokenizer(tiny_data, model_max_length=32))
    reads_features = build_tokenizer(tiny_data, request_features=True)
    keeps_ignored = build_tokenizer(tiny_data)
    keeps_ignored.keep_ignored = True
    other_names = build_tokenizer(tiny_data)
    other_names.surfaces = other_names.surfaces[::-1]
    made = {*first, *files(reads_features), *files(keeps_ignored), *files(other_names)}
    assert len(made) == 4
    assert all(encode_split(tiny_data, "train", reads_features)[0]["features"])
    assert not any(encode_split(tiny_data, "train", tokenizer)[0]["features"])


def test_rewritten_files_are_encoded_again(tiny_data, tokenizer, tmp_path):
    (tmp_path / "train").mkdir()
    table = pq.read_table(tiny_data / "train")
    for rows in (80, 7):
        pq.write_table(table.slice(0, rows), tmp_path / "train" / "part-00000.parquet")
        assert len(encode_split(tmp_path, "train", tokenizer)) == rows


def test_a_folder_without_the_split(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"has no train/\*.parquet; make it with `pinrec prepare`"):
        encode_split(tmp_path, "train", tokenizer)


# -- SequenceDataset ---------------------------------------------------------------------------------------------


def test_windows_count_from_the_newest_event():
    rows = [list(range(10, 17)), [], [20], [30, 31, 32], [], list(range(40, 46))]
    dataset = SequenceDataset(dataset_of(rows, chunk=2), window=3)
    windows = [dataset[i]["items"].tolist() for i in range(len(dataset))]
    # a user of whom nothing is left has no window
    assert windows == [[14, 15, 16], [11, 12, 13], [10], [20], [30, 31, 32], [43, 44, 45], [40, 41, 42]]
    assert dataset.lengths.tolist() == [3, 3, 1, 1, 3, 3, 3]
    assert dataset[4]["key"].tolist() == [0, 4]
    dataset.set_epoch(2)
    assert dataset[4]["key"].tolist() == [2, 4]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 4))
def test_each_event_is_in_one_window(lengths, window, chunk):
    ends = np.cumsum(lengths)
    rows = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    dataset = SequenceDataset(dataset_of(rows, chunk), window)
    windows = [dataset[i]["items"].tolist() for i in range(len(dataset))]
    assert sorted(event for w in windows for event in w) == list(range(ends[-1]))
    assert [len(w) for w in windows] == dataset.lengths.tolist()
    assert all(0 < len(w) <= window for w in windows)


@pytest.mark.parametrize("window", [3, 63])
def test_target_counts_are_the_collators_targets(tiny_data, tokenizer, window):
    """Q is the share of the targets: what is counted must be what an epoch trains on, repeats left out."""
    dataset = SequenceDataset(encode_split(tiny_data, "train", tokenizer), window)
    counts = dataset.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue))
    batch = PretrainingCollator(tokenizer, np.ones(62))([dataset[i] for i in range(len(dataset))])
    labels = batch["labels"][batch["labels"] != IGNORED_LABEL]
    assert counts.tolist() == np.bincount(batch["item_ids"][labels], minlength=62).tolist()
    assert not counts[:2].any()


@pytest.mark.parametrize("ahead", [3, 8])
def test_target_counts_of_a_window_are_what_is_drawn_on_average(tiny_data, tokenizer, ahead):
    dataset = SequenceDataset(encode_split(tiny_data, "train", tokenizer), 63)
    counts = dataset.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue), ahead)
    collator = PretrainingCollator(tokenizer, np.ones(62), target="window", target_window=ahead)
    drawn = np.zeros(62)
    for epoch in range(60):
        dataset.set_epoch(epoch)
        batch = collator([dataset[i] for i in range(len(dataset))])
        drawn += np.bincount(batch["item_ids"][batch["labels"][batch["labels"] != IGNORED_LABEL]], minlength=62) / 60
    assert drawn.sum() == pytest.approx(counts.sum())
    errors = np.abs(drawn - counts)[counts > 0] / np.sqrt(counts[counts > 0] / 60)
    assert errors.mean() < 1.0  # of a Poisson count .8
    plain = dataset.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue))
    assert np.abs(drawn - plain).sum() > 2 * np.abs(drawn - counts).sum()


def test_time_range():
    rows = [[2, 3], [2], [4]]
    times = [[-1, 50], [70], [-1]]
    assert SequenceDataset(dataset_of(rows, 1, timestamps=times), 2).time_range() == (50, 70)
    assert SequenceDataset(dataset_of(rows, timestamps=[[-1, -1], [-1], [-1]]), 2).time_range() == (0, 0)
    types = [[ITEM_EVENT, 2], [ITEM_EVENT], [ITEM_EVENT]]
    counts = SequenceDataset(dataset_of(rows, types=types, outcomes=[[2, 2], [4], [2]]), 2).target_counts(2, 3)
    assert counts.tolist() == [0, 0, 1, 0, 1]


# -- order -------------------------------------------------------------------------------------------------------


def order(lengths, batch_size=4, seed=0, epoch=0, **kwargs) -> list[int]:
    sampler = LengthGroupedSampler(lengths, batch_size, seed, **kwargs)
    assert len(sampler) == len(lengths)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 60, 203)
    np.random.seed(1)
    first = order(lengths)
    np.random.seed(2)
    assert order(lengths) == first
    assert sorted(first) == list(range(203))
    assert all(type(i) is int for i in first)
    assert order(lengths, seed=1) != first
    assert order(lengths, epoch=1) != first
    assert order(np.zeros(0, np.int64)) == []


@pytest.mark.parametrize("size", [200, 203, 3])
def test_batches_hold_similar_lengths_in_random_order(size):
    lengths = np.random.default_rng(0).integers(1, 60, size)
    batches = [lengths[part] for part in np.split(np.array(order(lengths, batches_per_group=10)), range(4, size, 4))]
    padding = sum(batch.max() * len(batch) for batch in batches) / lengths.sum()
    shuffled = np.random.default_rng(0).permutation(lengths)
    naive = sum(part.max() * len(part) for part in np.split(shuffled, range(4, size, 4))) / lengths.sum()
    if size > 100:
        assert padding < 1.1 < naive
        longest = [batch.max() for batch in batches]
        assert sorted(longest) != longest != sorted(longest, reverse=True)
