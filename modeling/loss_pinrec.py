"""Sampled softmax with logQ correction: one loss for in-batch, uniform and full negatives (DESIGN, section 5).

The pool of negatives is the batch's item table. `counts` says how often each of its items was drawn, as the
target of another row or as a uniform negative, and `expected` how often it would be drawn on average (Q). Each
drawn negative is weighted by `count / expected`, so that the sum over the pool estimates the sum over the
catalogue without bias (Bengio and Senecal 2008; the positive is there with probability 1 and is not corrected,
arXiv 2507.09331).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of every rank's loss flows back to the rank that made the row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.size
        return grad[start : start + ctx.size]


def draw_log_weights(facts: Tensor, targets: Tensor, num_items: int) -> Tensor:
    """log of count over expected count (Q), whichever way an item was drawn; -inf of items that nobody expects.

    A row's own targets are no negatives of it: of all draws it meets those of other rows, here on average over draws.

    Args:
        facts (`torch.FloatTensor` of shape `(pool, 3)`): how often each item was drawn as a target and uniformly, and
            its share of the training targets.
        targets (`torch.LongTensor` of shape `(batch,)`): of each of this process's rows.
        num_items: that uniform draws come from.
    """
    drawn, uniform, frequencies = facts.unbind(1)
    own = targets.float().square().sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(own)
    met = drawn.sum() - own / drawn.sum().clamp(min=1)
    expected = met * frequencies + uniform.sum() / num_items
    # of nobody: an item of the histories, or the padding of another process's part
    return ((drawn + uniform) / expected).log().masked_fill(expected == 0, float("-inf"))


def gather_pool(ids: Tensor, *tables: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """The pools of all processes, one after the other, each padded to the longest.

    Args:
        ids (`torch.LongTensor` of shape `(pool,)`): item ids of this process's pool, ascending.
        tables (`torch.Tensor` of shape `(pool, ...)`): what belongs to each of them.

    Returns:
        the length of one process's part, the gathered ids, and the gathered tables. Padding has an id above all
        others and zeros.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ids.shape[0], ids, list(tables)
    size = torch.tensor([ids.shape[0]], device=ids.device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    part = int(size)
    missing = part - ids.shape[0]
    padded = [torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, missing)) for t in tables]
    # not `pad`, whose fill value is a double: the largest integer would become the smallest
    ids = torch.cat([ids, ids.new_full((missing,), torch.iinfo(torch.int64).max)])
    return part, _GatherRows.apply(ids), [_GatherRows.apply(table) for table in padded]


def places_in_pool(rows: Tensor, item_ids: Tensor, pool_ids: Tensor, part: int) -> Tensor:
    """Where the pool holds items of this process's table.

    Args:
        rows (`torch.LongTensor` of shape `(n, items)`): rows of this process's table.
        item_ids (`torch.LongTensor`): ids of this process's table.
        pool_ids (`torch.LongTensor` of shape `(pool,)`): ascending within each process's part of length `part`.

    Returns:
        `torch.LongTensor` of shape `(n, copies, items)`: first the place in this process's part, then those of the
        same item in the others'.
    """
    if len(pool_ids) == part:
        return rows[:, None]
    own, ids = rows + part * dist.get_rank(), item_ids[rows]
    copies = [own]
    for number, part_ids in enumerate(pool_ids.split(part)):
        place = torch.searchsorted(part_ids, ids).clamp(max=part - 1)
        copies.append((place + number * part).where(part_ids[place] == ids, own))
    return torch.stack(copies, 1)


def likeliest(embeddings: Tensor, items: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """The labels, -100 but for the one that scores highest of those of a row that share a group.

    They share a query too, so that this is the one of least loss.

    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, targets, d)`), items (`torch.FloatTensor` of shape
            `(items, d)`)
        labels (`torch.LongTensor` of shape `(batch, targets)`): row of `items`, -100 none.
        groups (`torch.LongTensor` of shape `(batch, targets)`): below the number of targets.
    """
    scores = (embeddings * items[labels.clamp(min=0)]).sum(-1).masked_fill(labels < 0, float("-inf"))
    best = torch.full_like(scores, float("-inf")).scatter_reduce(1, groups, scores, "amax")
    return labels.where(scores == best.gather(1, groups), -100)


def _logits(
    queries: Tensor, pool: Tensor, log_weights: Tensor, own: Tensor, times: Tensor, availability: Tensor | None,
    hard: Tensor | None,
) -> Tensor:  # fmt: skip
    """`(positions, pool)`: corrected scores, -inf where an item is no negative; a position's own hard negatives are
    there once, uncorrected."""
    if hard is not None:
        log_weights = log_weights.expand(len(hard), -1).scatter(1, hard.flatten(1), float("-inf"))
        log_weights = log_weights.scatter(1, hard[:, 0], 0.0)
    logits = torch.addmm(log_weights, queries, pool.T).scatter_(1, own, float("-inf"))
    if availability is not None:
        at = times[:, None]
        live = (availability[:, 0] <= at) & (at < availability[:, 1])
        logits = logits.masked_fill(~live & (at >= 0), float("-inf"))
    return logits


class _WeightedSoftmax(torch.autograd.Function):
    """Loss and gradients of `sampled_softmax_loss`, a block of positions at a time.

    The gradients are made together with the loss, while a block's logits are still in the processor's cache, so that
    `positions x pool` never exists as a whole and is passed over once instead of a dozen times.
    """

    BLOCK = 256

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, log_weights: Tensor, own: Tensor, row: Tensor,
        times: Tensor, availability: Tensor | None, weights: Tensor, hard: Tensor | None,
    ) -> Tensor:  # fmt: skip
        grad_queries, grad_pool = torch.zeros_like(queries), torch.zeros_like(pool)
        positive_logits = (queries * positives).sum(-1)
        pull = torch.empty_like(positive_logits)
        total = queries.new_zeros(())
        for start in range(0, len(queries), _WeightedSoftmax.BLOCK):
            block = slice(start, start + _WeightedSoftmax.BLOCK)
            logits = _logits(
                queries[block], pool, log_weights, own[row[block]], times[block], availability,
                None if hard is None else hard[block],
            )  # fmt: skip
            positive = positive_logits[block]
            top = torch.maximum(logits.amax(1), positive)
            logits.sub_(top[:, None]).exp_()
            positive_share = (positive - top).exp()
            normaliser = logits.sum(1) + positive_share
            total += (weights[block] * (normaliser.log() + top - positive)).sum()
            logits.mul_((weights[block] / normaliser)[:, None])
            grad_queries[block] = logits @ pool
            grad_pool.addmm_(logits.T, queries[block])
            pull[block] = weights[block] * (positive_share / normaliser - 1)
        ctx.save_for_backward(grad_queries.addcmul_(pull[:, None], positives), pull[:, None] * queries, grad_pool)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None, None, None, None, None


def sampled_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    log_weights: Tensor,
    own: Tensor,
    row: Tensor,
    times: Tensor,
    availability: Tensor | None,
    weights: Tensor,
    hard: Tensor | None = None,
) -> Tensor:
    """Weighted sum over positions of -log softmax of the target against a weighted pool.

    Args:
        queries (`torch.FloatTensor` of shape `(positions, d)`): user embeddings, similarity scale included.
        positives (`torch.FloatTensor` of shape `(positions, d)`): item embeddings of the targets.
        pool (`torch.FloatTensor` of shape `(pool, d)`): item embeddings of the negatives.
        log_weights (`torch.FloatTensor` of shape `(pool,)`): log of count over expected count; -inf if undrawn,
            0 for a full softmax.
        own (`torch.LongTensor` of shape `(batch, items)`): places in the pool of a row's own items, the targets
            included: no negatives.
        row (`torch.LongTensor` of shape `(positions,)`): each position's row.
        times (`torch.LongTensor` of shape `(positions,)`): of the requests, -1 unknown.
        availability (`torch.LongTensor` of shape `(pool, 2)`, *optional*): an item is a negative from, until
            (exclusive); of a request at an unknown time, always.
        weights (`torch.FloatTensor` of shape `(positions,)`)
        hard (`torch.LongTensor` of shape `(positions, copies, n)`, *optional*): places in the pool of items that are
            negatives of this position alone, such as what was shown beside the target and ignored. They count once,
            at the first place and with weight 1 (no draw brought them, so there is no Q); `own` and `availability`
            mask them too.

    Returns:
        `torch.FloatTensor` of shape `()`, float32 (float64 if the queries are).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        queries, positives, pool, log_weights, weights = (
            tensor.to(dtype) for tensor in (queries, positives, pool, log_weights, weights)
        )
        if not torch.compiler.is_compiling():
            return _WeightedSoftmax.apply(
                queries, positives, pool, log_weights, own, row, times, availability, weights, hard
            )
        # a compiler makes its own blocks, and can't follow a loop over a number of positions that it doesn't know
        logits = _logits(queries, pool, log_weights, own[row], times, availability, hard)
        positive = (queries * positives).sum(-1)
        top = torch.maximum(logits.amax(1), positive).detach()
        normaliser = (logits - top[:, None]).exp().sum(1) + (positive - top).exp()
        return (weights * (normaliser.log() + top - positive)).sum()
