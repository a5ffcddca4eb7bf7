"""Large tables learn by the rows that a batch reads: as AdamW does where all rows are read, and resumably."""

import copy

import pytest
import torch

from pinrec_hf.modeling.embedding_pinrec import HashedEmbedding
from pinrec_hf.training import table_adam
from pinrec_hf.training.arguments import PinRecTrainingArguments
from pinrec_hf.training.table_adam import TableAdamW, clip_gradients, make_large_tables_sparse
from pinrec_hf.training.trainer import PinRecTrainer

ROWS = 12


def net() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    table = HashedEmbedding(8, 2, ROWS)
    torch.nn.init.normal_(table.weight)
    return torch.nn.ModuleDict({"ids": table, "linear": torch.nn.Linear(8, 1)})


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(table_adam, "LARGE", ROWS)


def train(model, optimizer, batches):
    norms = []
    for hashes in batches:
        (model["linear"](model["ids"](hashes)) - 1).pow(2).mean().backward()
        norms.append(clip_gradients(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(norms)


def batches(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 2**60, (size,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_adamw_where_every_row_is_read(small_is_large, fused):
    plain, sparse = net(), net()
    assert make_large_tables_sparse(sparse)
    every = batches(8, 500)  # reads each of 24 rows
    options = {"lr": 1e-2, "fused": fused, "weight_decay": 0.0}
    norms = [
        train(model, kind(model.parameters(), **options), every)
        for model, kind in ((plain, torch.optim.AdamW), (sparse, TableAdamW))
    ]
    assert torch.allclose(*norms, rtol=1e-5)
    for a, b in zip(plain.parameters(), sparse.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_rows_that_nobody_read_rest(small_is_large):
    model = net()
    make_large_tables_sparse(model)
    optimizer, before = TableAdamW(model.parameters(), lr=1e-2), model["ids"].weight.clone()
    (hashes,) = batches(1, 2)
    train(model, optimizer, [hashes, hashes])
    changed = (model["ids"].weight != before).any(1)
    assert 2 <= changed.sum() <= 4
    assert (optimizer.state[model["ids"].weight]["exp_avg"].any(1) == changed).all()


def test_a_resumed_run_ends_in_the_same_bits(small_is_large):
    whole, stopped = net(), net()
    for model in (whole, stopped):
        make_large_tables_sparse(model)
    steps = batches(6, 5)
    train(whole, TableAdamW(whole.parameters(), lr=1e-2), steps)
    first = TableAdamW(stopped.parameters(), lr=1e-2)
    train(stopped, first, steps[:3])
    saved = copy.deepcopy(first.state_dict())
    second = TableAdamW(stopped.parameters(), lr=1e-2)
    second.load_state_dict(saved)
    train(stopped, second, steps[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_gradients_of_both_kinds_are_clipped_as_torch_clips(small_is_large):
    plain, sparse = net(), net()
    make_large_tables_sparse(sparse)
    hashes = torch.tensor([5, 5, 9])
    for model in (plain, sparse):
        model["linear"](model["ids"](hashes)).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert torch.allclose(clip_gradients(sparse.parameters(), 0.1), norm)
    assert torch.allclose(sparse["ids"].weight.grad.to_dense(), plain["ids"].weight.grad)
    assert torch.allclose(sparse["linear"].weight.grad, plain["linear"].weight.grad)


@pytest.mark.parametrize("large", [False, True])
def test_the_trainer_chooses_by_the_tables_size(make_model, tmp_path, monkeypatch, large):
    monkeypatch.setattr(table_adam, "LARGE", 60 if large else 10_000)
    arguments = PinRecTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    trainer = PinRecTrainer(make_model(), arguments)
    assert isinstance(trainer.create_optimizer(), TableAdamW) == large
    assert trainer.model.item_encoder.full_ids.sparse == large
    assert not trainer.model.event_embedding.surfaces.sparse
