"""Item biases begin at what counts say: in the right columns, shrunk, and nothing else changes."""

import copy

import numpy as np
import torch

from pinrec_hf.data.collator import IGNORED_LABEL, PretrainingCollator
from pinrec_hf.data.windows import SequenceDataset, encode_split
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.training.priors import PSEUDO_TARGETS, begin_at_priors, log_priors


def test_log_priors():
    counts = np.array([0, 1, 0, 1_000_000, 6])
    conditions = np.array([[0, 0, 0, 750_000, 0], [0, 1, 0, 250_000, 6], [0, 0, 0, 0, 0]])
    priors = log_priors(np.stack([counts, *conditions]))
    assert priors.dtype == np.float32
    assert priors.shape == (5, 4)
    assert np.allclose(np.diff(priors[:, 0], axis=0)[[0, 1]], [np.log(2), -np.log(2)])
    assert np.isclose(priors[3, 0], np.log(1_000_001 / (counts.mean() + 1)))
    assert np.allclose(priors[[0, 2], 1:], 0)  # nothing known: as everybody
    assert np.allclose(priors[3, 1:3], 0, atol=1e-4)  # it is everybody
    assert np.isclose(priors[4, 1], np.log(PSEUDO_TARGETS / (PSEUDO_TARGETS + 6)), atol=1e-4)
    assert priors[4, 2] > 0
    assert not priors[:, 3].any()  # a condition that nobody met


def test_a_model_begins_with_the_targets_of_its_collator(tiny_data, tokenizer):
    dataset = SequenceDataset(encode_split(tiny_data, "train", tokenizer), 63)
    config = PinRecConfig.from_preset(
        "tiny", surfaces=tokenizer.surfaces, outcomes=tokenizer.outcomes,
        negative_outcomes=tokenizer.negative_outcomes, num_items=len(tokenizer.catalogue),
        content_size=tokenizer.catalogue.content_size, query_size=tokenizer.query_size,
    )  # fmt: skip
    model = PinRecModel(config)
    before = copy.deepcopy(model.state_dict())
    begin_at_priors(model, dataset, tokenizer.positive_mask)
    name = "item_encoder.full_ids.weight"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key != name)
    added = (model.state_dict()[name] - before[name])[FIRST_ITEM:, config.hidden_size :].numpy()

    collate = PretrainingCollator(tokenizer, np.ones(62), condition_dropout=0.0)
    batch = collate([dataset[i] for i in range(len(dataset))])
    there = batch["labels"] != IGNORED_LABEL
    rows = batch["item_ids"][batch["labels"][there]].numpy() - FIRST_ITEM
    counts = np.bincount(rows, minlength=len(added))
    assert np.allclose(added[:, 0], np.log((counts + 1) / (counts.mean() + 1)), atol=1e-5)
    for i, surface in enumerate(tokenizer.surfaces):
        own = np.bincount(rows[batch["target_surfaces"][there].numpy() == i + 1], minlength=len(added))
        expected = own.sum() / counts.sum()
        share = (own + PSEUDO_TARGETS * expected) / (counts + PSEUDO_TARGETS)
        assert np.allclose(added[:, 1 + i], np.log(share / expected), atol=1e-5), surface
    column = 1 + len(tokenizer.surfaces)
    for i, outcome in enumerate(tokenizer.outcomes):
        assert added[:, column + i].any() == (outcome not in tokenizer.negative_outcomes)


def test_what_has_no_biases_stays(tiny_data, tokenizer):
    dataset = SequenceDataset(encode_split(tiny_data, "train", tokenizer), 63)
    shared = {"surfaces": tokenizer.surfaces, "outcomes": tokenizer.outcomes, "num_items": len(tokenizer.catalogue)}
    for fields in ({"similarity": "cosine"}, {"item_id_embedding": "hashed"}):
        model = PinRecModel(PinRecConfig.from_preset("tiny", **shared, **fields))
        before = copy.deepcopy(model.state_dict())
        begin_at_priors(model, dataset, tokenizer.positive_mask)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
