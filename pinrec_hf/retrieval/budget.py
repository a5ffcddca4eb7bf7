"""Outcome budgets: how a request's slots are divided among the outcomes it wants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

Budget = dict[str | None, float]


def check_budget(budget: Any, tokenizer: PinRecTokenizer) -> Budget:
    """A budget as given (`{"save": 0.7, "click": 0.3}`), without its zeros and largest share first.

    Shares need not sum to 1, and the order in which they are given changes nothing (JSON keeps none).

    Raises:
        ValueError: no dict; an outcome that the model does not know or that is negative; a share that is negative,
            not finite or no number; nothing above 0.
    """
    if not isinstance(budget, Mapping):
        raise ValueError(f"outcome_budget is {budget!r}; give a dict such as {{'save': 0.7, 'click': 0.3}}")
    for outcome, share in budget.items():
        tokenizer.outcome_code(outcome)
        if isinstance(share, bool) or not isinstance(share, Real) or not math.isfinite(share) or share < 0:
            raise ValueError(f"outcome_budget gives {outcome!r} the share {share!r}; give finite numbers >= 0")
    wanted = {outcome: float(share) for outcome, share in budget.items() if share > 0}
    if not wanted:
        raise ValueError(f"outcome_budget {dict(budget)!r} divides nothing; give at least one outcome a share above 0")
    return dict(sorted(wanted.items(), key=lambda pair: (-pair[1], tokenizer.outcome_code(pair[0]))))


def parse_shares(pairs: list[str]) -> dict[str, float]:
    """`["save=0.7", "click=0.3"]` to a budget, as a command line has it; a name alone has the share 1.

    Raises:
        ValueError: a share that is no number, or an outcome named twice.
    """
    budget: dict[str, float] = {}
    for pair in pairs:
        outcome, _, share = pair.rpartition("=") if "=" in pair else (pair, "", "1")
        if outcome in budget:
            raise ValueError(f"outcome {outcome!r} is given twice: {pairs}")
        try:
            budget[outcome] = float(share)
        except ValueError:
            raise ValueError(f"{pair!r} is no outcome=share; write save=0.7") from None
    return budget
