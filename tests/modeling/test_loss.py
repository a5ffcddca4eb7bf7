"""The loss is the softmax that it claims to be: exactly, in its gradients, on average over pools, across processes."""

import copy
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, PinRecConfig
from pinrec_hf.modeling.loss_pinrec import (
    _WeightedSoftmax,
    gather_pool,
    likeliest,
    places_in_pool,
    sampled_softmax_loss,
)
from pinrec_hf.modeling.modeling_pinrec import PinRecModel

NUM_ITEMS = 50
ALWAYS = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def plain_loss(queries, positives, pool, log_weights, own, row, times, availability, weights, hard=None):
    """The definition, a position at a time."""
    total = 0.0
    for p in range(len(queries)):
        logits = [queries[p] @ positives[p]]
        for j in range(len(pool)):
            dead = availability is not None and not availability[j, 0] <= times[p] < availability[j, 1]
            log_weight = 0 if hard is not None and j in hard[p, 0] else log_weights[j]
            if j not in own[row[p]] and not (dead and times[p] >= 0) and log_weight > -torch.inf:
                logits.append(queries[p] @ pool[j] + log_weight)
        total = total + weights[p] * (torch.stack(logits).logsumexp(0) - logits[0])
    return total


def example(positions: int, pool: int, dtype: torch.dtype = torch.float64, rows: int = 4) -> dict[str, torch.Tensor]:
    """Random arguments of `sampled_softmax_loss`, every kind of mask among them."""
    g = torch.Generator().manual_seed(0)
    return {
        "queries": torch.randn(positions, 5, generator=g, dtype=dtype).requires_grad_(),
        "positives": torch.randn(positions, 5, generator=g, dtype=dtype).requires_grad_(),
        "pool": torch.randn(pool, 5, generator=g, dtype=dtype).requires_grad_(),
        "log_weights": torch.randn(pool, generator=g, dtype=dtype).where(
            torch.rand(pool, generator=g) > 0.2, -torch.inf
        ),
        "own": torch.randint(pool, (rows, pool // 3), generator=g),
        "row": torch.randint(rows, (positions,), generator=g),
        "times": torch.randint(-1, 10, (positions,), generator=g),
        "availability": torch.randint(0, 10, (pool, 2), generator=g).sort(1).values,
        "weights": torch.rand(positions, generator=g, dtype=dtype) + 0.5,
    }


# -- the function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_availability", [True, False])
@pytest.mark.parametrize("num_hard", [None, 0, 4])
def test_value_and_gradients(monkeypatch, compiling, dtype, tolerance, with_availability, num_hard):
    monkeypatch.setattr(_WeightedSoftmax, "BLOCK", 7)  # 20 positions: two whole blocks and a part
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    given = example(20, 12, dtype)
    if not with_availability:
        given["availability"] = None
    if num_hard is not None:  # among them items drawn anyway, undrawn, a row's own, not live, and repeated ones
        given["hard"] = torch.randint(12, (20, 1, num_hard), generator=torch.Generator().manual_seed(1))
    inputs = [given[name] for name in ("queries", "positives", "pool")]
    loss, expected = sampled_softmax_loss(**given), plain_loss(**given)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    # the loss is divided by the number of targets: the factor reaches every gradient
    for ours, theirs in zip(
        torch.autograd.grad(loss / 3, inputs), torch.autograd.grad(expected / 3, inputs), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    given = example(6, 5)
    fixed = {name: given.pop(name) for name in list(given)[3:]}
    assert torch.autograd.gradcheck(lambda q, p, n: sampled_softmax_loss(q, p, n, **fixed), tuple(given.values()))


def test_extreme_logits_and_an_empty_pool():
    given = example(6, 5, torch.float32)
    for name in ("queries", "pool", "positives"):
        given[name] = (given[name].detach() * 100).requires_grad_()
    loss = sampled_softmax_loss(**given)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(given[name].grad).all() for name in ("queries", "positives", "pool"))
    given["own"] = torch.arange(5).expand(4, -1)  # nothing but the positive is left
    assert sampled_softmax_loss(**given) == 0
    given["own"] = given["own"][:, :0]
    given["log_weights"][:] = -torch.inf
    assert sampled_softmax_loss(**given) == 0


def test_bf16_is_computed_in_float32():
    given = example(20, 12, torch.float32)
    expected = sampled_softmax_loss(**given)
    half = given | {name: given[name].detach().bfloat16() for name in ("queries", "positives", "pool")}
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_softmax_loss(**half)
    assert loss.dtype == torch.float32
    exact = sampled_softmax_loss(**{n: v.float() if v.dtype == torch.bfloat16 else v for n, v in half.items()})
    assert loss == exact
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_places_in_pool(monkeypatch):
    pool = torch.tensor([0, 1, 4, 9, 0, 1, 9, 2**63 - 1])  # two processes' parts, the second padded
    rows = torch.tensor([[2, 1], [1, 2]])
    assert places_in_pool(rows, pool[:4], pool[:4], 4).tolist() == [[[2, 1]], [[1, 2]]]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    # of the second process, whose items 9 and 1 the first process holds too
    assert places_in_pool(rows, pool[4:7], pool, 4).tolist() == [
        [[6, 5], [3, 1], [6, 5]],
        [[5, 6], [1, 3], [5, 6]],
    ]


def test_one_process_gathers_nothing():
    ids, table = torch.arange(3), torch.ones(3, 2)
    part, same_ids, (same,) = gather_pool(ids, table)
    assert part == 3
    assert same_ids is ids
    assert same is table


# -- the pool: which items are negatives, and how much each counts -------------------------------------------------


@pytest.fixture(scope="module")
def loss_model() -> PinRecModel:
    return PinRecModel(PinRecConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, num_items=NUM_ITEMS))


class Batch:
    """The inputs of `PinRecModel._loss` over a catalogue of 50 items: random, to be changed by a test."""

    def __init__(self, rows: int, targets: int = 1, uniform: int = 0, seed: int = 0, scale: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        popularity = 1 / np.arange(1, NUM_ITEMS + 1)
        self.popularity = popularity / popularity.sum()
        drawn = rng.choice(NUM_ITEMS, (rows, targets), p=self.popularity)
        self.labels = torch.from_numpy(drawn + FIRST_ITEM)
        self.event_items = torch.from_numpy(rng.integers(0, NUM_ITEMS + FIRST_ITEM, (rows, 3)))
        counts = np.bincount(rng.integers(NUM_ITEMS, size=uniform), minlength=NUM_ITEMS)
        self.negative_counts = torch.tensor([0, 0, *counts], dtype=torch.float32)
        self.frequencies = torch.tensor([0, 0, *self.popularity], dtype=torch.float32)
        self.item_ids = torch.arange(NUM_ITEMS + FIRST_ITEM)
        fixed = torch.Generator().manual_seed(7)  # the same items in every batch
        self.items = torch.randn(NUM_ITEMS + FIRST_ITEM, 9, generator=fixed) * scale
        self.embeddings = torch.randn(rows, targets, 9, generator=torch.Generator().manual_seed(seed))
        self.times = torch.full((rows, targets), -1)
        self.availability = self.hard = None

    def loss(self, model: PinRecModel, softmax: str = "sampled") -> torch.Tensor:
        model.config.softmax = softmax
        return model._loss(
            self.embeddings, self.labels, None, self.times, self.items, self.item_ids, self.event_items,
            self.availability, self.frequencies, self.negative_counts, None, self.hard,
        )  # fmt: skip


def bias(model: PinRecModel, rows: int, targets: int, uniform: int, repeats: int) -> float:
    """Sampled loss minus full loss, same masks, on average over pools (and users)."""
    batches = [Batch(rows, targets, uniform, seed) for seed in range(repeats)]
    return float(np.mean([(b.loss(model) - b.loss(model, "full")).item() for b in batches]))


@pytest.mark.parametrize(
    ("small", "large", "repeats"),
    [
        # rows, targets a row, uniform draws
        pytest.param((64, 1, 0), (256, 1, 0), 800, id="in-batch"),
        pytest.param((16, 4, 0), (64, 4, 0), 800, id="in-batch, several targets a row"),
        pytest.param((2, 1, 64), (2, 1, 256), 2_000, id="uniform"),
        pytest.param((16, 2, 32), (64, 2, 128), 800, id="mixture"),
    ],
)
def test_bias_shrinks_as_one_over_the_pool(loss_model, small, large, repeats):
    """Stated tolerance: a pool of n draws from a Zipf law of 50 items is off by less than 16 / n, and four times the
    pool by a quarter of that (at most .45, for the noise of the measurement)."""
    found = [bias(loss_model, *shape, repeats) for shape in (small, large)]
    for (rows, targets, uniform), value in zip((small, large), found, strict=True):
        assert abs(value) < 16 / (rows * targets + uniform), found
    assert abs(found[1]) < 0.45 * abs(found[0]), found


def test_every_draw_of_the_pool_counts_once(loss_model):
    """Items drawn twice, as targets or uniformly, against the definition: a sum over draws, not over items."""
    batch = Batch(rows=5, targets=2, uniform=9)
    batch.labels[0, 0] = batch.labels[3, 1] = batch.labels[4, 0] = 10  # one item is the target of three users
    draws = batch.labels.flatten().tolist()
    for item, count in enumerate(batch.negative_counts.long().tolist()):
        draws += [item] * count
    expected_counts = 8 * batch.frequencies + 9 / NUM_ITEMS  # of ten targets a row meets the eight of the others
    total = 0.0
    for row in range(5):
        own = {*batch.event_items[row].tolist(), *batch.labels[row].tolist()}
        for target in range(2):
            scores = batch.items @ batch.embeddings[row, target]
            negatives = sum(scores[item].exp() / expected_counts[item] for item in draws if item not in own)
            positive = scores[batch.labels[row, target]]
            total += (positive.exp() + negatives).log() - positive
    assert batch.loss(loss_model).item() == pytest.approx(total.item() / 10, rel=1e-5)


@pytest.mark.parametrize(("rows", "targets", "uniform"), [(2, 12, 16), (4, 6, 0), (1, 12, 24)])
def test_few_rows_of_many_targets_estimate_the_catalogue(rows, targets, uniform):
    """Where all scores are 0, the negatives of the catalogue weigh as many as there are."""
    items = 400
    model = PinRecModel(PinRecConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, num_items=items))
    popularity = 1 / np.arange(20, 20 + items)
    popularity /= popularity.sum()
    rng = np.random.default_rng(0)
    weights = torch.zeros(rows, targets)
    weights[0] = 1
    weighed, there = [], []
    for _ in range(800):
        labels = np.stack([rng.choice(items, targets, replace=False, p=popularity) for _ in range(rows)])
        counts = np.bincount(rng.integers(items, size=uniform), minlength=items)
        loss = model._loss(
            torch.zeros(rows, targets, 9), torch.from_numpy(labels + FIRST_ITEM), weights,
            torch.full((rows, targets), -1), torch.zeros(items + FIRST_ITEM, 9), torch.arange(items + FIRST_ITEM),
            torch.zeros(rows, 1, dtype=torch.int64), None, torch.tensor([0, 0, *popularity]).float(),
            torch.tensor([0, 0, *counts]).float(), None,
        )  # fmt: skip
        weighed.append(np.exp(loss.item() * rows) - 1)
        there.append(items - targets)
    # a row draws each item once, so that popular ones are drawn a little less often than their share says
    assert np.mean(weighed) == pytest.approx(np.mean(there), rel=0.05)


def test_full_softmax_is_the_textbooks(loss_model):
    batch = Batch(rows=4)
    batch.event_items[:] = 0
    logits = batch.embeddings[:, 0] @ batch.items[FIRST_ITEM:].T
    expected = torch.nn.functional.cross_entropy(logits, batch.labels[:, 0] - FIRST_ITEM)
    assert batch.loss(loss_model, "full").item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("softmax", ["sampled", "full"])
def test_a_users_own_items_are_no_negatives(loss_model, softmax):
    batch = Batch(rows=3, targets=2, uniform=200)
    batch.labels[:] = torch.tensor([[10, 11], [12, 13], [14, 15]])
    batch.event_items[:] = torch.tensor([[20, 21, 10], [22, 22, 0], [0, 0, 0]])
    # row 0's embeddings find its own items irresistible: as negatives they would cost a thousand
    irresistible = torch.zeros(9)
    irresistible[0] = 1000
    batch.items[:, 0] = 0
    before = batch.loss(loss_model, softmax)
    batch.embeddings[0, 0] = irresistible
    batch.embeddings[1:, :, 0] = 0
    batch.items[[11, 20, 21], 0] = 1
    assert batch.loss(loss_model, softmax) < before + 5
    # for another user's item they do cost
    batch.items[12, 0] = 1
    assert batch.loss(loss_model, softmax) > before + 100


@pytest.mark.parametrize("softmax", ["sampled", "full"])
def test_none_and_unknown_are_never_negatives(loss_model, softmax):
    batch = Batch(rows=3, uniform=20)
    batch.event_items[:] = 30
    before = batch.loss(loss_model, softmax)
    batch.items[:FIRST_ITEM] = 1e4 * batch.embeddings[0]
    assert batch.loss(loss_model, softmax) == before


@pytest.mark.parametrize("softmax", ["sampled", "full"])
def test_items_that_were_not_live_are_no_negatives(loss_model, softmax):
    batch = Batch(rows=3, uniform=500)
    batch.labels[:] = torch.tensor([[10], [11], [12]])
    batch.event_items[:] = 0
    batch.availability = torch.tensor(ALWAYS).repeat(NUM_ITEMS + FIRST_ITEM, 1)
    batch.times[:] = torch.tensor([[100], [200], [-1]])
    always = batch.loss(loss_model, softmax)
    batch.availability[10] = torch.tensor([100, 200])  # live for row 0 only, and for row 2, whose time is unknown
    batch.items[10] = 50 * batch.embeddings[1, 0]
    assert batch.items[10] @ batch.embeddings[1, 0] > 100
    batch.embeddings[2] = 0
    late = batch.loss(loss_model, softmax)
    assert torch.isfinite(late)
    assert late < always + 100
    batch.availability[10, 1] = 201
    assert batch.loss(loss_model, softmax) > late + 20


@pytest.mark.parametrize("softmax", ["sampled", "full"])
def test_hard_negatives_serve_their_own_position(loss_model, softmax):
    """Undrawn items, once each and uncorrected; another position, even of the same row, sees none of them."""
    batch = Batch(rows=3, targets=2)
    batch.labels[:] = torch.tensor([[10, 11], [12, 13], [14, 15]])
    batch.event_items[:] = torch.tensor([20, 20, 0])
    without = batch.loss(loss_model, softmax)
    batch.hard = batch.labels[..., None].repeat(1, 1, 3)
    assert batch.loss(loss_model, softmax) == without  # padding
    batch.hard[1, 0] = torch.tensor([30, 31, 30])
    batch.hard[1, 1, 0] = 20  # acted on by this user: no negative
    loss = batch.loss(loss_model, softmax)
    if softmax == "full":  # they are in it already, as negatives that count once
        assert loss == without
        return
    items, query = batch.items, batch.embeddings[1, 0]
    expected = 4 * batch.frequencies
    drawn = [10, 11, 14, 15]  # not 12 and 13, the row's own
    normaliser = items[12] @ query, *(items[i] @ query - expected[i].log() for i in drawn)
    harder = *normaliser, items[30] @ query, items[31] @ query
    added = torch.stack(harder).logsumexp(0) - torch.stack(normaliser).logsumexp(0)
    assert (loss - without).item() == pytest.approx(added.item() / 6, rel=1e-3)


def test_hard_negatives_do_not_bias_the_rest(loss_model):
    """With every item as a hard negative of each position, the sampled loss is the full one for every pool."""
    for seed in range(5):
        batch = Batch(rows=8, targets=2, uniform=6, seed=seed)
        batch.hard = torch.arange(FIRST_ITEM, NUM_ITEMS + FIRST_ITEM).expand(8, 2, -1)
        assert batch.loss(loss_model).item() == pytest.approx(batch.loss(loss_model, "full").item(), rel=1e-5)


def test_an_empty_pool_and_items_that_are_no_targets(loss_model):
    batch = Batch(rows=1)
    assert batch.loss(loss_model) == 0  # the only draw is the user's own
    batch = Batch(rows=2)
    batch.labels[:] = torch.tensor([[10], [11]])
    batch.event_items[:] = 40
    batch.frequencies[:] = 0
    batch.frequencies[[10, 11]] = 0.5
    loss = batch.loss(loss_model)  # items of frequency 0 are expected of nobody
    assert torch.isfinite(loss)
    assert loss > 0
    batch.labels[1] = 12  # a target that training had none of: no Q, hence no negative
    assert torch.isfinite(batch.loss(loss_model))


def test_sampled_needs_its_facts(loss_model):
    batch = Batch(rows=2)
    batch.negative_counts = None
    with pytest.raises(ValueError, match="needs item_frequencies and negative_counts; see PretrainingCollator"):
        batch.loss(loss_model)


@torch.no_grad()
def test_hidden_times_still_decide_what_was_live(make_model, collator, windows):
    """`target_timestamps` may be hidden from the model; the pool goes by `label_timestamps`."""
    model = make_model()
    batch = collator(windows)
    batch["target_timestamps"] = torch.full_like(batch["target_timestamps"], -1)
    with_time = model(**batch).loss
    without = model(**{name: value for name, value in batch.items() if name != "label_timestamps"}).loss
    dead = batch["item_availability"][:, 0] > batch["label_timestamps"].max()
    assert dead.any() or (batch["item_availability"][:, 1] < ALWAYS[1]).any()
    assert with_time < without  # fewer negatives


# -- two processes -----------------------------------------------------------------------------------------------


def shared_hard_negatives(batch: dict, shared: torch.Tensor) -> torch.Tensor:
    """Three items that both processes' pools hold, others for each label: which depends on the label's id alone."""
    ids, own = batch["item_ids"], batch["labels"].clamp(min=0)
    wanted = shared[(ids[own][..., None] + torch.arange(3)) % len(shared)]
    return torch.searchsorted(ids, wanted)


def gradient_of(model: PinRecModel, batch: dict, targets: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(**batch, num_items_in_batch=targets).loss
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def one_of_two(rank: int, port: int, model: PinRecModel, batches: list[dict], targets: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loss, grads = gradient_of(model, batches[rank], targets)
    flat = torch.cat([loss[None], *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    if rank == 0:
        results[:] = flat
    dist.destroy_process_group()


def test_two_processes_equal_one_on_both_batches(make_model, collator, windows):
    """Pools are gathered: the sums of losses and gradients are those of one process on the concatenated batch."""
    model = make_model()
    halves = [dict(collator(part)) for part in (windows[:2], windows[2:])]
    assert len(halves[0]["item_ids"]) != len(halves[1]["item_ids"])
    whole = dict(collator(windows))
    first, second = (half["item_ids"] for half in halves)
    shared = first[torch.isin(first, second) & (first >= FIRST_ITEM)]
    assert len(shared) > 5
    for batch in (*halves, whole):  # their copies in the other process's part must not count besides
        batch["hard_negatives"] = shared_hard_negatives(batch, shared)
    targets = int((whole["labels"] >= 0).sum())
    loss, grads = gradient_of(copy.deepcopy(model), whole, targets)
    results = torch.zeros(1 + sum(grad.numel() for grad in grads)).share_memory_()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked: two more imports of torch and transformers would take longer than all other tests of this file
    mp.start_processes(one_of_two, (port, model, halves, targets, results), nprocs=2, start_method="fork")
    assert results[0].item() == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([grad.flatten() for grad in grads])
    assert expected.abs().max() > 1e-3
    assert torch.allclose(results[1:], expected, rtol=1e-4, atol=1e-6)


def test_of_a_group_only_the_likeliest_counts():
    items = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    embeddings = torch.tensor([[[1.0, 0.5]] * 5])
    labels, groups = torch.tensor([[1, 2, 3, 2, -100]]), torch.tensor([[0, 0, 1, 1, 0]])
    assert likeliest(embeddings, items, labels, groups).tolist() == [[1, -100, 3, -100, -100]]
