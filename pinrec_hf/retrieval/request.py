"""The request schema: which fields a request has, and arguments that are one for all requests or one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

REQUEST_COLUMNS = (
    "surface",
    "timestamp",
    "query",
    "query_embedding",
    "context_item_id",
    "request_features",
    "outcome_budget",
    "num_steps",
    "exclude",
    "filters",
)
FIELDS = frozenset({"history", "k", "user_id", *REQUEST_COLUMNS})


def check_fields(requests: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: a request has no history, or a field that no request has.
    """
    for i, request in enumerate(requests):
        if not isinstance(history := request.get("history"), Mapping):
            raise ValueError(f"history {i} is {history!r}; give a dict of columns, {{}} for a user without any")
        if unknown := sorted(set(request) - FIELDS, key=str):
            raise ValueError(f"request {i} has fields {unknown}; the known ones are {sorted(FIELDS)}")


def readable(requests: Sequence[Mapping[str, Any]], tokenizer: PinRecTokenizer) -> list[dict[str, Any]]:
    """Requests of a log as a model can read them, which may be older than the log.

    Surfaces and outcomes that it does not know become unknown ones, in the history too, and request features that it
    does not read are left out. A request that a user makes is not softened like this: there a name may be misspelt.
    """
    surfaces, outcomes = {None, *tokenizer.surfaces}, {None, *tokenizer.outcomes}
    read = []
    for request in requests:
        history = dict(request["history"])
        if set(where := history.get("surface") or ()) - surfaces:
            history["surface"] = [name if name in surfaces else None for name in where]
        if set().union(*(names or () for names in history.get("outcomes") or ())) - outcomes:
            history["outcomes"] = [
                None if names is None else [name if name in outcomes else None for name in names]
                for names in history["outcomes"]
            ]
        new = {**request, "history": history}
        if new.get("surface") not in surfaces:
            new["surface"] = None
        if not tokenizer.request_features:
            new["request_features"] = None
        read.append(new)
    return read


def one_each(name: str, value: Any, n: int) -> list[Any]:
    """One value for all requests, or a list of one each.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} histories; give one for all, or one each")
    return list(value)


def list_each(name: str, value: Any, n: int) -> list[Any]:
    """One list for all, or a list of one (or None) each."""
    values = None if value is None else list(value)
    if not values or (values[0] is not None and (np.ndim(values[0]) == 0 and not isinstance(values[0], set))):
        return [values] * n
    return one_each(name, values, n)
