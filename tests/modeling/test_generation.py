"""Generation is the model asked again and again: by hand, row by row, without a cache; and budgets are checked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT, PinRecConfig, check_budget
from pinrec_hf.retrieval.encode import encode_items

FIELDS = ("surface", "timestamp", "query", "context_item_id")
BUDGET = {"save": 0.7, "click": 0.3}


def batch_of(tokenizer, requests, num_steps=1):
    fields = {name: [request.get(name) for request in requests] for name in FIELDS}
    return tokenizer([request["history"] for request in requests], num_steps=num_steps, **fields)


def known_codes(tokenizer, request):
    """Item codes of what the user acted on and of the subject; what was shown and ignored may come again."""
    history, subject = request["history"], request.get("context_item_id")
    acted = [item for item, names in zip(history.get("item_id", []), history.get("outcomes", []), strict=True) if names]
    known = [*acted, *([] if subject is None else [subject])]
    return [row + FIRST_ITEM for row in tokenizer.catalogue.rows(known) if row >= 0]


@pytest.fixture
def items(model, tokenizer):
    return torch.from_numpy(encode_items(model, tokenizer))


@torch.no_grad()
def test_one_step_is_forward(model, tokenizer, requests_example):
    batch = batch_of(tokenizer, requests_example)
    output = model.generate(**batch, outcome_budget={"save": 3, "click": 1})
    assert output.embeddings.shape == (len(requests_example), 2, model.config.embedding_size)
    for place, code in enumerate(map(tokenizer.outcome_code, ("save", "click"))):
        batch["target_outcomes"] = torch.full_like(batch["target_positions"], code)
        torch.testing.assert_close(output.embeddings[:, place], model(**batch).embeddings[:, 0])
        assert (output.outcomes[:, place] == code).all()
    torch.testing.assert_close(output.weights, torch.tensor([[0.75, 0.25]]).expand(len(requests_example), -1))
    assert (output.steps == 1).all()
    assert output.fed_items is None


@torch.no_grad()
@pytest.mark.parametrize("pooled_history", [False, True])
def test_steps_are_the_history_with_what_was_fed_back(make_model, tokenizer, requests_example, pooled_history):
    """Against the definition: no cache, the fed items as events of a longer history."""
    model = make_model(pooled_history=pooled_history)
    items = torch.from_numpy(encode_items(model, tokenizer))
    for request in requests_example:
        output = model.generate(
            **batch_of(tokenizer, [request], 4), outcome_budget=BUDGET, num_steps=4, item_embeddings=items
        )
        # in turns by budget: .7, then 1.4 - 1 = .4 against .6, then 2.1 - 1 = 1.1 against -.1
        fed_outcomes = ["save", "click", "save"]
        taken = known_codes(tokenizer, request)
        asked = batch_of(tokenizer, [request])
        for step in range(4):
            codes = torch.tensor([[tokenizer.outcome_code(name) for name in BUDGET]])
            step_batch = {**asked, "target_outcomes": codes}
            for name in ("target_positions", "target_surfaces", "target_timestamps"):
                step_batch[name] = asked[name].expand(-1, 2)
            expected = model(**step_batch).embeddings[0]
            torch.testing.assert_close(output.embeddings[0, 2 * step : 2 * step + 2], expected, rtol=1e-5, atol=1e-5)
            if step == 3:
                break
            outcome = fed_outcomes[step]
            scores = expected[list(BUDGET).index(outcome)] @ items.T
            scores[[code - FIRST_ITEM for code in taken]] = -torch.inf
            nearest = int(scores.argmax()) + FIRST_ITEM
            assert output.fed_items[0, step] == nearest
            taken.append(nearest)
            asked = longer(asked, tokenizer, nearest, outcome)


def longer(batch, tokenizer, item, outcome):
    """A batch of one request with one more event at the request's time."""
    time, last = batch["target_timestamps"][0, 0], batch["timestamps"][0, -1]
    gap = max(0, int(time - last)) if time >= 0 and last >= 0 else -1
    table = np.union1d(batch["item_ids"].numpy(), [item])
    events = torch.from_numpy(np.searchsorted(table, batch["item_ids"].numpy()))[batch["event_items"]]
    new = {
        "event_items": int(np.searchsorted(table, item)), "event_types": ITEM_EVENT, "event_queries": 0,
        "surface_ids": batch["target_surfaces"][0, 0], "outcome_sets": 1 << tokenizer.outcome_code(outcome),
        "timestamps": time, "time_gaps": gap, "attention_mask": 1,
    }  # fmt: skip
    grown = {**batch, "event_items": events}
    for name, value in new.items():
        grown[name] = torch.cat([grown[name], torch.tensor([[int(value)]])], 1)
    grown.update({name: torch.from_numpy(v) for name, v in tokenizer.item_table(table).items()})
    grown["target_positions"] = batch["target_positions"] + 1
    return grown


@torch.no_grad()
@pytest.mark.parametrize("snapped", [True, False])
def test_a_batch_equals_its_rows(model, tokenizer, requests_example, items, snapped):
    budgets = [None, {"save": 1}, {"click": 2, "save": 1}, BUDGET, None][: len(requests_example)]
    budgets += [None] * (len(requests_example) - len(budgets))
    options = {"num_steps": 3, "item_embeddings": items if snapped else None}
    whole = model.generate(**batch_of(tokenizer, requests_example, 3), outcome_budget=budgets, **options)
    for i, (request, budget) in enumerate(zip(requests_example, budgets, strict=True)):
        alone = model.generate(**batch_of(tokenizer, [request], 3), outcome_budget=budget, **options)
        there = whole.weights[i] > 0
        torch.testing.assert_close(whole.embeddings[i][there], alone.embeddings[0], rtol=1e-5, atol=1e-5)
        for name in ("outcomes", "steps", "offsets", "weights"):
            torch.testing.assert_close(getattr(whole, name)[i][there], getattr(alone, name)[0])
        assert not snapped or torch.equal(whole.fed_items[i], alone.fed_items[0])
    torch.testing.assert_close(whole.weights.sum(1), torch.ones(len(requests_example)))


@torch.no_grad()
def test_what_is_fed_back_is_neither_seen_nor_fed_before(model, tokenizer, requests_example, items):
    batch = batch_of(tokenizer, requests_example, 12)
    fed = model.generate(**batch, num_steps=12, item_embeddings=items).fed_items
    for row, request in zip(fed.tolist(), requests_example, strict=True):
        assert len(set(row)) == len(row)
        assert not set(known_codes(tokenizer, request)) & set(row)


@torch.no_grad()
def test_neither_the_subject_nor_what_a_mask_hides_is_fed_back(model, tokenizer, items):
    request = {"history": {}, "surface": "related", "context_item_id": "p2"}
    batch = batch_of(tokenizer, [request], 12)
    fed = model.generate(**batch, num_steps=12, item_embeddings=items).fed_items[0].tolist()
    (subject,) = tokenizer.catalogue.rows(["p2"]) + FIRST_ITEM
    assert subject not in fed
    mask = torch.ones(1, 60, dtype=torch.bool)
    mask[0, [code - FIRST_ITEM for code in fed[:5]]] = False
    others = model.generate(**batch, num_steps=12, item_embeddings=items, item_mask=mask).fed_items[0].tolist()
    assert len(set(others)) == 11
    assert not set(fed[:5]) & set(others)
    with pytest.raises(ValueError, match=r"item_mask is \(1, 59\); give \(batch, item_embeddings\), \(1, 60\)"):
        model.generate(**batch, num_steps=2, item_embeddings=items, item_mask=mask[:, 1:])


@torch.no_grad()
def test_raw_feedback_has_the_length_of_the_historys_items(model, tokenizer, requests_example, monkeypatch):
    request = requests_example[0]
    batch, seen = batch_of(tokenizer, [request], 2), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **kw: (seen.append(kw), forward(self, **kw))[1])
    output = model.generate(**batch, num_steps=2, outcome_budget={"save": 1})
    fed = seen[1]["item_embeds"][0, 0]
    is_item = batch["event_types"][0] == ITEM_EVENT
    codes = batch["item_ids"][batch["event_items"][0][is_item]]
    table = model.get_item_features(**{n: torch.from_numpy(v) for n, v in tokenizer.item_table(codes.numpy()).items()})
    size = model.config.hidden_size
    torch.testing.assert_close(fed.norm(), table[:, :size].norm(dim=-1).mean())
    direction = output.embeddings[0, 0, :size]
    torch.testing.assert_close(fed / fed.norm(), direction / direction.norm())


@torch.no_grad()
def test_a_seed_draws_the_outcome_that_is_fed_back(model, tokenizer, requests_example, items):
    batch = batch_of(tokenizer, requests_example, 6)
    runs = [
        model.generate(**batch, outcome_budget=BUDGET, num_steps=6, item_embeddings=items, seed=seed)
        for seed in (0, 0, 1, None, None)
    ]
    assert torch.equal(runs[0].embeddings, runs[1].embeddings)
    assert not torch.equal(runs[0].embeddings, runs[2].embeddings)
    assert torch.equal(runs[3].embeddings, runs[4].embeddings)
    alone = [batch_of(tokenizer, [request], 6) for request in requests_example]
    rows = [model.generate(**b, outcome_budget=BUDGET, num_steps=6, item_embeddings=items, seed=1) for b in alone]
    for row, whole in zip(rows, runs[2].embeddings, strict=True):  # what shares a batch changes no draw
        torch.testing.assert_close(row.embeddings[0], whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_seeds_draw_outcomes_by_their_shares(model, tokenizer, requests_example, monkeypatch):
    batch, seen, forward = batch_of(tokenizer, requests_example[:1], 2), [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **kw: (seen.append(kw), forward(self, **kw))[1])
    for seed in range(200):
        model.generate(**batch, outcome_budget={"save": 0.9, "click": 0.1}, num_steps=2, seed=seed)
    fed = [int(inputs["outcome_sets"][0, -1]) for inputs in seen[1::2]]
    saves = fed.count(1 << tokenizer.outcome_code("save"))
    assert saves + fed.count(1 << tokenizer.outcome_code("click")) == 200
    assert 160 <= saves <= 197  # 180 expected, 4 standard deviations


@torch.no_grad()
def test_when_no_item_is_left_the_nearest_of_all_is_fed(model, tokenizer, items):
    history = {"item_id": tokenizer.catalogue.ids(np.arange(60)), "outcomes": [["save"]] * 60}
    batch = tokenizer([history], surface="homefeed", num_steps=3)
    everything = {int(code) for code in batch["item_ids"] if code > 1}
    assert len(everything) == 60
    output = model.generate(**batch, num_steps=3, outcome_budget={"save": 1}, item_embeddings=items)
    for step in range(2):
        nearest = (output.embeddings[0, step] @ items.T).argmax() + 2
        assert output.fed_items[0, step] == nearest


@torch.no_grad()
def test_several_steps_in_bf16(make_model, tokenizer, requests_example, items):
    model = make_model().to(torch.bfloat16)
    batch = batch_of(tokenizer, requests_example, 3)
    output = model.generate(**batch, num_steps=3, outcome_budget=BUDGET, item_embeddings=items)
    assert torch.isfinite(output.embeddings).all()


@torch.no_grad()
def test_offsets_are_embeddings_of_a_step(make_model, tokenizer, requests_example):
    model = make_model(time_offsets=[0, 30, 60])
    batch = batch_of(tokenizer, requests_example[:1], 2)
    output = model.generate(**batch, outcome_budget=BUDGET, num_steps=2, offsets=[0, 60])
    assert output.offsets[0].tolist() == [0, 60] * 4
    save, click = map(tokenizer.outcome_code, BUDGET)
    assert output.outcomes[0].tolist() == [save, save, click, click] * 2
    torch.testing.assert_close(output.weights[0], torch.tensor([0.7, 0.7, 0.3, 0.3] * 2) / 4)
    alone = model.generate(**batch, outcome_budget=BUDGET, num_steps=2)  # "now" is what is fed back
    torch.testing.assert_close(output.embeddings[:, ::2], alone.embeddings)
    turned = model.generate(**batch, outcome_budget=BUDGET, num_steps=2, offsets=[60, 0])  # wherever it stands
    torch.testing.assert_close(turned.embeddings[:, 1::2], alone.embeddings)
    with pytest.raises(ValueError, match=r"offsets \[60\] lack 0"):
        model.generate(**batch, num_steps=2, offsets=[60])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 1.5}, "num_steps is 1.5"),
        ({"num_steps": 65}, "positions"),
        ({"offsets": [30]}, "time_offsets"),
        ({"offsets": []}, "time_offsets"),
        ({"item_embeddings": torch.zeros(60, 3), "num_steps": 2}, r"item_embeddings are \(60, 3\)"),
        ({"item_embeddings": torch.zeros(59, 67), "num_steps": 2}, "of the whole catalogue"),
        ({"outcome_budget": {"purchase": 1}}, r"'purchase' is not among.*save"),
        ({"outcome_budget": {"hide": 1}}, "negative"),
        ({"outcome_budget": {"save": float("nan")}}, "finite"),
        ({"outcome_budget": {"save": -1}}, "finite numbers >= 0"),
        ({"outcome_budget": {"save": 0}}, "divides nothing"),
        ({"outcome_budget": [{"save": 1}]}, "1 entries for"),
        ({"outcome_budget": [["save"]] * 5}, "give a dict"),
    ],
)
def test_bad_input(model, tokenizer, requests_example, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**batch_of(tokenizer, requests_example), **options)


def test_padding_on_the_right_is_refused(model, tokenizer, requests_example, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "right")
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(**batch_of(tokenizer, requests_example))


def test_the_tokenizer_keeps_positions_free(model, tokenizer):
    long = {"item_id": ["p1"] * 200, "outcomes": [["save"]] * 200}
    batch = tokenizer([long], num_steps=16)
    assert batch["event_items"].shape[1] == 64 - 15
    assert model.generate(**batch, num_steps=16).embeddings.shape[1] == 16
    for steps in (0, 64):
        with pytest.raises(ValueError, match=f"num_steps={steps}"):
            tokenizer([long], num_steps=steps)


NAMES = PinRecConfig(outcomes=["save", "click", "hide"], negative_outcomes=["hide"])


@given(st.dictionaries(st.sampled_from(["save", "click", None]), st.floats(0, 1e6), min_size=1))
def test_budgets_keep_what_is_asked_for_largest_first(budget):
    if not any(budget.values()):
        with pytest.raises(ValueError, match="divides nothing"):
            check_budget(budget, NAMES)
        return
    checked = check_budget(budget, NAMES)
    assert checked == {name: share for name, share in budget.items() if share > 0}
    assert list(checked.values()) == sorted(checked.values(), reverse=True)
    assert list(checked) == list(check_budget(dict(reversed(budget.items())), NAMES))
