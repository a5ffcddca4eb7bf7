"""The canary: all rows of the test days are poisoned, and whatever is made or predicted before them must not sing."""

import json

import numpy as np

from pinrec_hf.data.dataset_folder import build_tokenizer
from pinrec_hf.data.windows import SequenceDataset, encode_split
from pinrec_hf.evaluation.popularity import best_popularity
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.evaluation.ranker import ModelRanker


def test_the_poison_is_there(poisoned_data):
    test_rows = [sorted(path.read_bytes() for path in (folder / "test").iterdir()) for folder in poisoned_data]
    assert test_rows[0] != test_rows[1]


def test_files_before_the_cut_stay_byte_equal(poisoned_data):
    clean, poison = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.parquet")
            if path.parent.name != "test"
        }
        for folder in poisoned_data
    )
    assert clean.keys() >= {"items.parquet", "queries.parquet"}
    assert {name.split("/")[0] for name in clean} >= {"train", "validation"}
    assert clean == poison
    metadata = [json.loads((folder / "metadata.json").read_text()) for folder in poisoned_data]
    for found in metadata:
        del found["num_users"]["test"], found["num_events"]["test"]
    assert metadata[0] == metadata[1]


def test_what_training_counts_and_validation_asks_stay_equal(poisoned_data):
    seen = []
    for folder in poisoned_data:
        tokenizer = build_tokenizer(folder, model_max_length=64)
        rows = SequenceDataset(encode_split(folder, "train", tokenizer), window=63)
        counts = rows.target_counts(tokenizer.positive_mask, len(tokenizer.catalogue))
        requests = load_requests(folder, "validation", tokenizer.catalogue)
        seen.append((counts.tolist(), rows.time_range(), list(requests.requests), requests.item_counts.tolist()))
        assert counts.sum() > 0
    assert seen[0] == seen[1]


def test_predictions_and_choices_on_validation_stay_equal(poisoned_data, model):
    found = []
    for folder in poisoned_data:
        tokenizer = build_tokenizer(folder, model_max_length=64)
        requests = load_requests(folder, "validation", tokenizer.catalogue)
        asked = list(requests.requests)
        best = best_popularity(
            folder,
            tokenizer.catalogue,
            split="validation",
            k=5,
            ks=(5,),
            half_lives=(3600.0, 86_400.0),
            progress=False,
        )
        found.append((ModelRanker(model, tokenizer).rank(asked, 10), best.ranker.rank(asked, 10), best.trials))
    (model_a, popular_a, trials_a), (model_b, popular_b, trials_b) = found
    np.testing.assert_array_equal(model_a, model_b)
    np.testing.assert_array_equal(popular_a, popular_b)
    assert trials_a == trials_b
