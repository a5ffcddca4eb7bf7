"""Outcome budgets as a command line has them."""

from __future__ import annotations


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
