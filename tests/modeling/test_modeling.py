"""The model is a good citizen of transformers: however it is run, the answers are the same."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM
from pinrec_hf.modeling.embedding_pinrec import GAP_PERIODS, MICROSECONDS, _phase
from pinrec_hf.modeling.modeling_pinrec import HashedEmbedding, PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import check_catalogue, encode_items, encode_requests

EVENTS = ("event_items", "event_types", "event_queries", "surface_ids", "outcome_sets", "timestamps", "time_gaps")
TARGETS = ("target_positions", "target_surfaces", "target_outcomes", "target_timestamps")


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def with_attention(model: PinRecModel, implementation: str) -> PinRecModel:
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other


def gradients(model: PinRecModel, batch, train: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train(train)
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["plain", "pooled_history"])
def any_model(request, model, make_model) -> PinRecModel:
    return model if request.param == "plain" else make_model(pooled_history=True)


# -- shapes and outputs ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs(model, tokenizer, training_batch):
    output = model(**training_batch)
    rows, length = training_batch["event_items"].shape
    targets = training_batch["labels"].shape[1]
    assert output.last_hidden_state.shape == (rows, length, 32)
    assert output.embeddings.shape == (rows, targets, 39)
    assert (output.embeddings[..., 32] == 1).all()  # what the bias that an item has for all is multiplied by
    assert output.loss.shape == ()
    assert output.loss > 0
    assert output.hidden_states is output.attentions is output.cache is None
    assert model.get_item_features(**items_of(training_batch)).shape == (len(training_batch["item_ids"]), 39)
    assert encode_items(model, tokenizer).shape == (60, 39)


def items_of(batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("item_ids", "item_vectors", "item_features", "item_hashes")}


@torch.no_grad()
def test_hidden_states_and_attentions(model, training_batch):
    output = with_attention(model, "eager")(**training_batch, output_hidden_states=True, output_attentions=True)
    rows, length = training_batch["event_items"].shape
    assert [h.shape for h in output.hidden_states] == [(rows, length, 32)] * 3
    assert [a.shape for a in output.attentions] == [(rows, 2, length, length)] * 2
    assert close(output.hidden_states[-1], output.last_hidden_state)
    real = training_batch["attention_mask"].bool()
    assert close(output.attentions[0].sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), 2))
    assert not output.attentions[0].triu(1).transpose(1, 2)[real].any()


@torch.no_grad()
def test_loss_is_the_mean_over_targets(model, training_batch):
    targets = int((training_batch["labels"] >= 0).sum())
    mean, total = (model(**training_batch, num_items_in_batch=n).loss for n in (None, 1))
    assert close(mean * targets, total)
    training_batch["labels"] = torch.full_like(training_batch["labels"], -100)
    assert model(**training_batch).loss == 0


def test_no_target_gives_no_nan(model, training_batch):
    training_batch["labels"] = torch.full_like(training_batch["labels"], -100)
    for count in (None, 0):  # alone, and as the Trainer counts
        found = gradients(model, {**training_batch, "num_items_in_batch": count})[1]
        assert all(not grad.any() for grad in found.values())
    none = {name: training_batch[name][:, :0] for name in (*TARGETS, "labels", "label_weights", "label_timestamps")}
    output = model(**{**training_batch, **none})
    assert output.loss == 0
    assert output.embeddings.shape == (6, 0, 39)


# -- however it is run ------------------------------------------------------------------------------------------


def test_eager_equals_sdpa(any_model, training_batch):
    losses, grads = zip(
        *(gradients(with_attention(any_model, name), training_batch) for name in ("eager", "sdpa")), strict=True
    )
    assert close(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.isfinite(grad).all(), name
        assert close(grad, grads[1][name]), name


@torch.no_grad()
def test_flex_attention(model, training_batch):
    real = training_batch["attention_mask"].bool()
    with torch.compiler.set_stance("force_eager"):  # compiled for a CPU it takes minutes, and has no backward
        outputs = [with_attention(model, name)(**training_batch) for name in ("sdpa", "flex_attention")]
    assert close(*(output.last_hidden_state[real] for output in outputs), tolerance=1e-4)


@torch.no_grad()
def test_padding_side_and_neighbours_do_not_matter(any_model, tokenizer, requests_example):
    right = copy.copy(tokenizer)
    right.padding_side = "right"
    expected = encode_requests(any_model, tokenizer, requests_example, outcomes=[None, "save", "click"])
    assert expected.shape == (5, 3, 39)
    assert np.abs(np.diff(expected, axis=1)).max() > 0.01
    for tok in (tokenizer, right):
        alone = [
            encode_requests(any_model, tok, [request], outcomes=[None, "save", "click"]) for request in requests_example
        ]
        assert np.allclose(np.concatenate(alone), expected, atol=1e-5)
        together = encode_requests(any_model, tok, requests_example, outcomes=[None, "save", "click"])
        assert np.allclose(together, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_equals_padded(any_model, attention, training_batch):
    model = with_attention(any_model, attention)
    padded = model(**training_batch)
    real = training_batch["attention_mask"].bool()
    packed = {name: training_batch[name][real][None] for name in EVENTS}
    lengths = real.sum(1)
    starts = lengths.cumsum(0) - lengths
    packed |= {name: training_batch[name] for name in ("query_hashes", "query_vectors")} | items_of(training_batch)
    for name in TARGETS:
        packed[name] = training_batch[name].clone()
    valid = training_batch["labels"] >= 0
    first = real.int().argmax(1)
    packed["target_positions"] += (starts - first)[:, None]
    for name in TARGETS:
        packed[name] = packed[name][valid][None]
    output = model(**packed, position_ids=torch.cat([torch.arange(n) for n in lengths])[None])
    assert close(output.last_hidden_state[0], padded.last_hidden_state[real])
    assert close(output.embeddings[0], padded.embeddings[valid])


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 3, -1])
def test_cache_equals_no_cache(any_model, tokenizer, requests_example, split):
    for side in ("left", "right"):
        tok = copy.copy(tokenizer)
        tok.padding_side = side
        for fields in [dict(requests_example[1]), requests_example[0] | {"context_item_id": "p3"}]:
            del fields["user_id"]
            histories = [fields.pop("history"), {"item_id": ["p1", "p2"], "outcomes": [["save"]] * 2}]
            batch = tok(histories[: 1 if side == "right" else 2], **fields)
            expected = any_model(**batch)
            # nothing is asked of the first chunk
            table = {name: value for name, value in batch.items() if name not in (*EVENTS, *TARGETS, "attention_mask")}
            first = {name: batch[name][:, :split] for name in EVENTS}
            cache = any_model(**first, **table, attention_mask=batch["attention_mask"][:, :split], use_cache=True).cache
            second = {name: batch[name][:, split:] for name in EVENTS}
            targets = {name: batch[name] for name in TARGETS}
            targets["target_positions"] = targets["target_positions"] - first["event_items"].shape[1]
            output = any_model(**second, **table, **targets, attention_mask=batch["attention_mask"], cache=cache)
            assert close(output.last_hidden_state, expected.last_hidden_state[:, split:])
            assert close(output.embeddings, expected.embeddings)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_last_event_alone_is_what_it_is_among_all(any_model, attention, tokenizer, requests_example):
    model = with_attention(any_model, attention)
    fields = {name: [request.get(name) for request in requests_example] for name in ("surface", "timestamp", "query")}
    for requests in (slice(0, 4), slice(1, 2)):  # padded, and one alone, which needs no mask
        histories = [request["history"] for request in requests_example[requests]]
        batch = tokenizer(histories, **{name: values[requests] for name, values in fields.items()})
        with torch.compiler.set_stance("force_eager"):
            whole, last = (model(**batch, last_event_only=only, use_cache=True) for only in (False, True))
        assert close(last.embeddings, whole.embeddings, tolerance=1e-4)
        assert close(last.last_hidden_state[:, -1], whole.last_hidden_state[:, -1], tolerance=1e-4)
        # a mask of flex attention cannot be cut
        assert last.last_hidden_state.shape[1] == 1 or attention == "flex_attention"
        for mine, other in zip(last.cache.layers, whole.cache.layers, strict=True):
            assert close(mine.keys, other.keys)
            assert close(mine.values, other.values)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, training_batch, reentrant):
    loss, expected = gradients(model, training_batch, train=True)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.config.use_cache = True  # is turned off while training so
    checkpointed, grads = gradients(other, training_batch, train=True)
    assert close(loss, checkpointed)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert close(grad, expected[name]), name


@torch.no_grad()
def test_bf16(any_model, training_batch):
    expected = any_model(**training_batch)
    half = copy.deepcopy(any_model).to(torch.bfloat16)(**training_batch)
    assert half.embeddings.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    scale = expected.embeddings.abs().max()
    assert (half.embeddings.float() - expected.embeddings).abs().max() < 0.05 * scale
    assert abs(half.loss - expected.loss) < 0.05 * expected.loss
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(any_model(**training_batch).loss - expected.loss) < 0.05 * expected.loss


@pytest.mark.parametrize(("pooled_history", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_compile_without_graph_breaks(make_model, training_batch, pooled_history, backend):
    torch.compiler.reset()
    model = make_model(pooled_history=pooled_history)
    expected, grads = gradients(model, training_batch)
    loss = torch.compile(model, fullgraph=True, backend=backend)(**training_batch).loss
    assert close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            assert close(parameter.grad, grads[name], 1e-4), name
    torch.compiler.reset()


@torch.no_grad()
def test_export(model, tokenizer, requests_example):
    batch = dict(tokenizer([request["history"] for request in requests_example], query="lamp", surface="search"))
    program = torch.export.export(model, (), batch, strict=False)
    assert close(program.module()(**batch)["embeddings"], model(**batch).embeddings)


@torch.no_grad()
def test_a_batch_without_queries_needs_no_table_of_them(model, tokenizer):
    batch = tokenizer([{"item_id": ["p1", "p2"], "outcomes": [["save"]] * 2}])
    table = [batch.pop(name, None) for name in ("query_hashes", "query_vectors")]
    expected = model(**batch).embeddings
    if table[0] is not None:
        assert close(model(**batch, query_hashes=table[0], query_vectors=table[1]).embeddings, expected)
    assert not model.get_query_features(torch.tensor([0]), torch.zeros(1, 6)).any()


# -- what it may see ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_later_events_change_nothing_before(any_model, tokenizer):
    history = {
        "item_id": ["p1", "p2", "p3", "p4"],
        "outcomes": [["save"], ["click"], ["hide"], ["save"]],
        "timestamp": [1_700_000_000 + 60 * i for i in range(4)],
        "surface": ["homefeed"] * 4,
    }
    other = {
        "item_id": ["p1", "p2", "p9", "gone"],
        "outcomes": [["save"], ["click"], ["save"], ["click"]],
        "timestamp": [1_700_000_000, 1_700_000_060, 1_700_900_000, None],
        "surface": ["homefeed", "homefeed", "search", None],
    }
    batches = [tokenizer([h], query="rug") for h in (history, other)]
    for batch in batches:
        for name, value in zip(TARGETS, (2, 1, 1, 1_700_000_100), strict=True):
            batch[name] = torch.full((1, 1), value)
    a, b = (any_model(**batch) for batch in batches)
    assert close(a.last_hidden_state[:, :3], b.last_hidden_state[:, :3], 1e-6)
    assert close(a.embeddings, b.embeddings, 1e-6)
    assert not close(a.last_hidden_state[:, 3], b.last_hidden_state[:, 3], 0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("signals", "differ"),
    [
        ([], set()),
        (["surface"], {"surface"}),
        (["outcome"], {"outcomes", "wanted"}),
        (["time"], {"timestamp", "now"}),
        (["surface", "outcome", "time"], {"surface", "outcomes", "wanted", "timestamp", "now"}),
    ],
)
def test_signals(make_model, tokenizer, signals, differ):
    model = make_model(signals=signals)
    history = {
        "item_id": ["p1", "p2"],
        "outcomes": [["save"], ["click"]],
        "surface": ["homefeed"] * 2,
        "timestamp": [5, 99],
    }
    request = {"history": history, "surface": "homefeed", "timestamp": 999}
    expected = encode_requests(model, tokenizer, [request])
    changed = {
        "surface": {**request, "history": history | {"surface": ["search"] * 2}},
        "outcomes": {**request, "history": history | {"outcomes": [["click"], ["hide"]]}},
        "timestamp": {**request, "history": history | {"timestamp": [7, 800]}},
        "now": {**request, "timestamp": 10_000},
        "item_id": {**request, "history": history | {"item_id": ["p2", "p1"]}},
    }
    different = {
        name for name, other in changed.items() if not np.allclose(encode_requests(model, tokenizer, [other]), expected)
    }
    if not np.allclose(encode_requests(model, tokenizer, [request], outcomes=["save"]), expected):
        different.add("wanted")
    assert different == differ | {"item_id"}


@torch.no_grad()
def test_request_features(make_model, tiny_data):
    from pinrec_hf.data.dataset_folder import build_tokenizer

    tok = build_tokenizer(tiny_data, model_max_length=64, request_features=True)
    model = make_model(request_feature_buckets=500)
    lists = [None, [], ["device=ios"], ["device=web"], ["device=ios", "app=3"], ["app=3", "device=ios"]]
    request = {"history": {"item_id": ["p1"], "outcomes": [["save"]]}, "surface": "search"}
    users = encode_requests(
        model, tok, [request | {"request_features": features} for features in lists], [None, "save"]
    )
    assert np.allclose(users[0], users[1], atol=1e-5)
    np.testing.assert_allclose(users[4], users[5], rtol=1e-4, atol=1e-5)
    assert len(np.unique(users[:, 0].round(3), axis=0)) == 4
    assert np.allclose(encode_requests(model, tok, [request], [None, "save"])[0], users[0], atol=1e-6)


# -- items -------------------------------------------------------------------------------------------------------


def item_table(tokenizer, rows):
    return {name: torch.from_numpy(value) for name, value in tokenizer.item_table(np.array(rows) + FIRST_ITEM).items()}


@torch.no_grad()
def test_time_offsets(make_model, training_batch):
    model = make_model(time_offsets=[0, 30, 60]).eval()
    asked = {seconds: model(**training_batch, target_offsets=torch.full_like(training_batch["labels"], seconds))
             for seconds in (-1, 0, 29, 30, 45, 60, 10**6)}  # fmt: skip
    different = [asked[seconds].embeddings for seconds in (-1, 0, 30, 60)]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    for seconds, same in ((29, 0), (45, 30), (10**6, 60)):
        torch.testing.assert_close(asked[seconds].embeddings, asked[same].embeddings)
    torch.testing.assert_close(model(**training_batch).embeddings, asked[0].embeddings)


@torch.no_grad()
def test_missing_inputs_are_named(model, training_batch):
    for field in ("item_vectors", "item_features", "target_timestamps"):
        with pytest.raises(ValueError, match=field):
            model(**{name: value for name, value in training_batch.items() if name != field})


@torch.no_grad()
def test_an_item_is_the_same_in_any_table(model, tokenizer):
    together, alone = item_table(tokenizer, [0, 3, 7]), item_table(tokenizer, [3])
    assert close(model.get_item_features(**together)[1:2], model.get_item_features(**alone))


@torch.no_grad()
@pytest.mark.parametrize("ids", ["full", "hashed", None])
def test_unseen_items_are_told_apart_by_content_only(make_model, tokenizer, ids):
    """Items that the id table does not cover share the unknown id, and still differ by content."""
    model = make_model(item_id_embedding=ids, num_items=50)
    table = item_table(tokenizer, [5, 55, 56])
    items = model.get_item_features(**table)
    assert not close(items[1], items[2], 1e-3)
    same_content = table | {name: table[name][[0, 1, 1]] for name in ("item_vectors", "item_features")}
    items = model.get_item_features(**same_content)
    assert close(items[1], items[2]) == (ids != "hashed")


@torch.no_grad()
def test_item_id_dropout(make_model, tokenizer):
    table = item_table(tokenizer, [5, 6])
    table |= {name: table[name][[0, 0]] for name in ("item_vectors", "item_features")}
    for ids in ("full", "hashed"):
        model = make_model(item_id_embedding=ids, item_id_dropout=1.0)
        items = model.get_item_features(**table)
        assert not close(items[0], items[1], 1e-3)
        items = model.train().get_item_features(**table)
        assert close(items[0], items[1])
        half = make_model(item_id_embedding=ids, item_id_dropout=0.5).train()
        many = {name: value[:1].expand(1000, *value.shape[1:]) for name, value in table.items()}
        torch.manual_seed(0)
        dropped = (half.get_item_features(**many) - items[:1]).abs().sum(1) < 1e-4
        assert 400 < dropped.sum() < 600
    # without content there is nothing to find an item by: its id stays
    model = make_model(content_size=0, feature_buckets=0, item_id_dropout=1.0).train()
    del table["item_vectors"]
    items = model.get_item_features(**table)
    assert not close(items[0], items[1], 1e-3)


@torch.no_grad()
def test_outcome_dropout(make_model, training_batch):
    model = make_model(outcome_dropout=1.0, dropout=0.0, item_id_dropout=0.0)
    other = dict(training_batch) | {"outcome_sets": torch.randint_like(training_batch["outcome_sets"], 0, 15)}
    assert not close(model(**training_batch).last_hidden_state, model(**other).last_hidden_state, 1e-2)
    model.train()
    assert close(model(**training_batch).last_hidden_state, model(**other).last_hidden_state)


def test_hashed_embedding():
    table = HashedEmbedding(8, functions=2, rows=1_000)
    torch.nn.init.normal_(table.weight)
    hashes = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3_000))
    vectors = table(hashes)
    # 3,000 items in 1,000 rows: every one shares a row in each half, hardly any shares both
    assert len(vectors[:, :4].unique(dim=0)) < 1_001
    assert len(vectors.unique(dim=0)) > 2_980
    counts = torch.bincount((vectors[:, :4, None] == table.weight[:1_000].T).all(1).int().argmax(1), minlength=1_000)
    assert counts.max() < 15  # 3 on average: evenly spread
    assert not table(torch.tensor([0])).any()
    with pytest.raises(ValueError, match=r"hash_functions=3 must .* divide hidden size 8"):
        HashedEmbedding(8, functions=3, rows=10)


def test_a_bag_is_the_sum_of_its_values():
    table = HashedEmbedding(8, functions=1, rows=50)
    torch.nn.init.normal_(table.weight)
    hashes = torch.tensor([[11, -7, 11], [5, 0, 0], [0, 0, 0]])
    loop, bag = table(hashes).sum(-2), table.bag(hashes)
    torch.testing.assert_close(bag, loop)
    assert not bag[2].any()
    torch.testing.assert_close(*(torch.autograd.grad((x * x).sum(), table.weight)[0] for x in (bag, loop)))


def test_cosine(make_model, training_batch):
    model = make_model(similarity="cosine")
    output = model(**training_batch)
    items = model.get_item_features(**items_of(training_batch))
    assert output.embeddings.shape[-1] == items.shape[-1] == 32
    assert close(output.embeddings.norm(dim=-1), torch.ones_like(output.embeddings[..., 0]))
    assert close(items.norm(dim=-1), torch.ones(len(items)))
    output.loss.backward()
    assert model.log_temperature.grad.abs() > 0
    with torch.no_grad():  # the temperature never falls below 0.01
        floor, below = (model.log_temperature.fill_(t) and model(**training_batch).loss for t in (np.log(0.01), -20.0))
    assert close(floor, below)


def test_initialisation(make_config):
    fresh = PinRecModel(make_config(similarity="cosine"))
    assert close(fresh.log_temperature.exp(), torch.tensor([0.05]))
    assert fresh.item_encoder.full_ids.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (fresh.layers[0].input_layernorm.weight == 1).all()


# -- files -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"similarity": "cosine", "item_id_embedding": "hashed", "pooled_history": True}]
)
def test_save_and_load_sharded(make_model, training_batch, tmp_path, fields):
    model = make_model(**fields)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.bin"))
    assert not (tmp_path / "generation_config.json").exists()
    loaded = PinRecModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(loaded(**training_batch).loss, model(**training_batch).loss)
    half = PinRecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert PinRecModel.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()


def test_bad_checkpoints(model, tmp_path):
    model.save_pretrained(tmp_path / "good")
    weights = tmp_path / "good" / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 100, 50, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="good is truncated or damaged; copy it again"):
            PinRecModel.from_pretrained(tmp_path / "good")
    weights.write_bytes(whole)

    tensors = load_file(weights)
    tensors["foreign.weight"] = tensors.pop("outcome_head.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*'outcome_head.up_proj.weight'.*another model's"):
        PinRecModel.from_pretrained(tmp_path / "good")
    weights.unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        PinRecModel.from_pretrained(tmp_path / "good")

    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    )
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="config of a 'bert' model"):
        PinRecModel.from_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another model's checkpoint"):
        PinRecModel.from_pretrained(tmp_path / "bert")


def test_a_tokenizer_of_another_catalogue_is_refused(model, tokenizer, requests_example):
    check_catalogue(model, tokenizer)
    other = PinRecTokenizer(
        catalogue=tokenizer.catalogue.append(["new"], vectors=np.ones((1, 8))), surfaces=tokenizer.surfaces,
        outcomes=tokenizer.outcomes,
    )  # fmt: skip
    for refused in (lambda: encode_items(model, other), lambda: encode_requests(model, other, requests_example)):
        with pytest.raises(ValueError, match=r"trained on the catalogue \w+, the tokenizer holds \w+ \(61 items\)"):
            refused()


def test_the_phase_of_a_long_gap_is_exact():
    """In float32 a year's gap was off by more than a turn at the shortest periods, and differently on each device."""
    gaps = [1, 59, 86_400, 30 * 86_400 + 7, 90 * 86_400 + 1, 400 * 86_400]
    phases = _phase(torch.tensor(gaps) * MICROSECONDS, torch.tensor(GAP_PERIODS)).sin()
    exact = [[math.sin(2 * math.pi * (gap * MICROSECONDS % period) / period) for period in GAP_PERIODS] for gap in gaps]
    torch.testing.assert_close(phases, torch.tensor(exact), atol=2e-6, rtol=0)
    assert GAP_PERIODS[0] == MICROSECONDS
    assert GAP_PERIODS[-1] == 28 * 86_400 * MICROSECONDS
