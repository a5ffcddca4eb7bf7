"""Training large tables by the rows that a batch reads: the step's time does not grow with the catalogue.

AdamW passes over every row of a table, its gradient and its two moments at each step: 10^7 rows of 128 floats are 36 GB
of memory traffic, for the some thousand rows that a batch has read. Here the gradient holds those rows, and the moments
of the others rest, as in torch's `SparseAdam` (lazy Adam): a row that is read seldom keeps its momentum meanwhile.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pinrec_hf.modeling.embedding_pinrec import HashedEmbedding

LARGE = 1 << 18
"""Rows from which a table's gradients are sparse; smaller ones are trained by AdamW as ever, to the bit."""


def make_large_tables_sparse(model: nn.Module) -> bool:
    """From now on the gradients of a model's large tables hold the rows that were read; whether it has any."""
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | HashedEmbedding) and len(module.weight) >= LARGE
    ]
    for table in tables:
        table.sparse = True
    return bool(tables)


class TableAdamW(torch.optim.AdamW):
    """AdamW; of a parameter with a sparse gradient it updates the rows in that, and no row decays.

    The state has AdamW's names and shapes, so that a checkpoint of either goes on in the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (table, table.grad, group)
            for group in self.param_groups
            for table in group["params"]
            if table.grad is not None and table.grad.is_sparse
        ]
        for table, _, _ in sparse:
            table.grad = None
        super().step()
        for table, grad, group in sparse:
            self._step_rows(table, grad.coalesce(), group)
            table.grad = grad
        return loss

    def _step_rows(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        first, second = group["betas"]
        step, (rows,), values = float(state["step"]), grad.indices(), grad.values()
        mean = state["exp_avg"][rows].lerp_(values, 1 - first)
        square = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale = square.div_(1 - second**step).sqrt_().add_(group["eps"])
        table.index_add_(0, rows, mean.div_(scale), alpha=-float(group["lr"]) / (1 - first**step))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which takes no sparse gradients, for both kinds; returns the norm before."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # each row once, or the norm would miss what cancels
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)
    return norm
