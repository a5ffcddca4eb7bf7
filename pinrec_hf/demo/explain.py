"""Why a list is what it is, and why it changed, in sentences that are counted from the answers themselves.

Sentences put names of outcomes and surfaces between backticks and titles between “quotes”.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from pinrec_hf.demo.answer import Answer, name_of

ABOUT = {"surface": "surface", "query": "query", "context_item_id": "subject", "num_steps": "steps", "k": "slots"}


def origin(now: Answer, compare_name: str = "the other model") -> list[str]:
    """Where the candidates come from: outcomes against what was asked, steps, overlap with the other model."""
    total, by_outcome = len(now.candidates), Counter(candidate.outcome for candidate in now.candidates)
    if not total:
        return ["No item is left that this request may be given."]
    parts = [
        f"{by_outcome[outcome] or 'none'}{f' of {total} come' if not i else ''} from {outcome_name(outcome)} "
        f"({share:.0%} asked for)"
        for i, (outcome, share) in enumerate(now.shares.items())
    ]
    sentences = [_sentence(parts)]
    if now.request["num_steps"] > 1:
        by_step = Counter(candidate.step for candidate in now.candidates)
        steps = range(1, now.request["num_steps"] + 1)
        brought = [f"step {step} brought {by_step[step] or 'none'}" for step in steps]
        sentences.append(_sentence(brought))
    if now.compared is not None:
        shared = {candidate.row for candidate in now.candidates} & {candidate.row for candidate in now.compared}
        sentences.append(
            f"{len(shared) or 'None'} of {total} {'is' if len(shared) == 1 else 'are'} in {compare_name}'s list too, "
            "which asks for no outcome: no dial moves it."
        )
    return sentences


def change(now: Answer, before: Answer) -> list[str]:
    """What was asked differently than before, what that did to the list, and by which way."""
    asked = _asked_differently(now, before)
    new = {candidate.row for candidate in now.candidates} - {candidate.row for candidate in before.candidates}
    gone = {candidate.row for candidate in before.candidates} - {candidate.row for candidate in now.candidates}
    if not asked:
        return ["The same request as the last, and the same list."]
    sentences = [_sentence(asked)]
    if new or gone:
        sentences.append(f"{len(new)} new against the last list, {len(gone)} gone.")
    elif [c.row for c in now.candidates] == [c.row for c in before.candidates]:
        sentences.append("The list is the same.")
    else:
        sentences.append("The same items in another order.")
    filled, filled_before = (Counter(c.outcome for c in one.candidates) for one in (now, before))
    moved = [
        f"{outcome_name(outcome)} fills {filled[outcome]} slots instead of {filled_before[outcome]}"
        for outcome in {**before.shares, **now.shares}
        if filled[outcome] != filled_before[outcome]
    ]
    if moved:
        sentences.append(_sentence(moved))
    return sentences + _aims(now, before)


def _asked_differently(now: Answer, before: Answer) -> list[str]:
    changed = []
    if now.request.get("user_id") != before.request.get("user_id"):
        changed.append("another user")
    elif now.request["history"] != before.request["history"]:
        lengths = [len(one.request["history"].get("item_id", ())) for one in (before, now)]
        changed.append("history {:,} → {:,} events".format(*lengths))
    for field, name in ABOUT.items():
        old, new = (one.request.get(field) for one in (before, now))
        if old != new:
            changed.append(f"{name} {_value(field, old)} → {_value(field, new)}")
    for outcome in {**before.shares, **now.shares}:
        old, new = before.shares.get(outcome, 0), now.shares.get(outcome, 0)
        if f"{old:.0%}" != f"{new:.0%}":
            changed.append(f"{outcome_name(outcome)} {old:.0%} → {new:.0%}")
    return changed


def _aims(now: Answer, before: Answer) -> list[str]:
    """The first step at which an outcome points elsewhere than it did, and where."""
    new, old = (
        {(one.step, one.outcome): one.nearest[0] for one in answer.traced if one.offset == 0 and one.nearest}
        for answer in (now, before)
    )
    both = [key for key in new if key in old]
    step = next((key[0] for key in both if new[key].row != old[key].row), None)
    if step is None:
        return ["What each step points at has not changed."] if both else []
    first = " first" if step == 1 else ""
    return [
        *([] if step == 1 else [f"The path is another from step {step} on."]),
        *(
            f"{outcome_name(key[1])} points{first} at “{name_of(new[key])}” instead of “{name_of(old[key])}”."
            for key in both
            if key[0] == step and new[key].row != old[key].row
        ),
    ]


def outcome_name(outcome: str | None) -> str:
    return "any outcome" if outcome is None else f"`{outcome}`"


def _value(field: str, value: Any) -> str:
    if value is None:
        return "unknown" if field == "surface" else "none"
    return f"`{value}`" if field == "surface" else f"“{value}”" if field == "query" else str(value)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(parts: list[str]) -> str:
    text = _and(parts)
    return f"{text[0].upper()}{text[1:]}."
