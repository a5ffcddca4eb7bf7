"""A pretrained base learns new names; what it answered before keeps its bits."""

import copy

import pytest
import torch

from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer


@pytest.fixture
def grown(make_model, tokenizer):
    """A base before and after it grew, each with its tokenizer."""
    base, names = make_model(), copy.deepcopy(tokenizer)
    model = copy.deepcopy(base)
    for each in (model, names):
        each.add_surfaces(["shop", "email"])
        each.add_outcomes(["buy"])
        each.add_outcomes(["report"], negative=True)
    return base, model, names


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_old_answers_keep_their_bits(grown, tokenizer, collator, windows, requests_example, training):
    base, model, names = grown
    batch = collator(windows)
    outputs = []
    for each in (base, model):
        torch.manual_seed(0)
        outputs.append(each.train(training)(**batch))
    assert torch.equal(outputs[0].embeddings, outputs[1].embeddings)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for request in requests_example:
        fields = {name: value for name, value in request.items() if name in ("surface", "timestamp", "query")}
        old, new = (tok([request["history"]], **fields) for tok in (tokenizer, names))
        assert all(torch.equal(old[name], new[name]) for name in old)


@torch.no_grad()
def test_new_names_begin_as_the_unknown_one(grown):
    _, model, names = grown
    shop, unknown = (
        model(**names([{"item_id": ["p1"], "outcomes": [["save"]], "surface": [surface]}], surface=surface)).embeddings
        for surface in ("shop", None)
    )
    assert torch.equal(shop, unknown)
    history = {"item_id": ["p1"], "outcomes": [["buy"]], "surface": ["homefeed"]}
    batch = names([history], surface="homefeed")
    bought = model(**batch).embeddings
    batch["outcome_sets"][batch["outcome_sets"] > 0] = 1  # the bit of an outcome that nobody knows
    assert torch.equal(bought, model(**batch).embeddings)
    batch["target_outcomes"][:] = names.outcome_code("buy")
    assert torch.equal(bought, model(**batch).embeddings)


def test_new_names_are_trained(grown):
    _, model, names = grown
    batch = names([{"item_id": ["p1"], "outcomes": [["buy"]], "surface": ["shop"]}], surface="shop")
    model(**batch).embeddings.sum().backward()
    code = names.surface_code("shop")
    for table in (model.event_embedding.surfaces, model.outcome_head.surfaces):
        assert table.weight.grad[code].abs().sum() > 0
        assert table.weight.grad[1:code].abs().sum() == 0
    assert model.event_embedding.outcomes.weight.grad[names.outcome_code("buy")].abs().sum() > 0


@torch.no_grad()
def test_a_grown_base_is_saved_and_loaded(grown, tmp_path, requests_example):
    _, model, names = grown
    model.save_pretrained(tmp_path)
    names.save_pretrained(tmp_path)
    again, tokenizer = PinRecModel.from_pretrained(tmp_path), PinRecTokenizer.from_pretrained(tmp_path)
    assert again.config.surfaces == tokenizer.surfaces == [*names.surfaces[:3], "shop", "email"]
    assert again.config.outcomes == tokenizer.outcomes
    assert again.config.negative_outcomes == tokenizer.negative_outcomes == ["hide", "report"]
    weights = again.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    tokenizer([requests_example[0]["history"]], surface="shop")


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("add_surfaces", ["search"], "among"),
        ("add_surfaces", ["shop", "shop"], "twice"),
        ("add_surfaces", "shop", "a list of names"),
        ("add_surfaces", [None], "a list of names"),
        ("add_outcomes", ["save"], "among"),
        ("add_outcomes", [f"o{n}" for n in range(60)], "room for 62"),
    ],
)
def test_names_that_cannot_be_added(make_model, tokenizer, method, wrong, message):
    for each in (make_model(), copy.deepcopy(tokenizer)):
        before = list(getattr(each, "config", each).surfaces), list(getattr(each, "config", each).outcomes)
        with pytest.raises(ValueError, match=message):
            getattr(each, method)(wrong)
        assert (getattr(each, "config", each).surfaces, getattr(each, "config", each).outcomes) == before


def test_a_base_that_reads_no_surfaces_learns_their_names(make_model):
    model = make_model(signals=["time"])
    model.add_surfaces(["shop"])
    model.add_outcomes(["buy"])
    assert model.config.surfaces[-1] == "shop"
    assert model.event_embedding.surfaces is model.event_embedding.outcomes is None
