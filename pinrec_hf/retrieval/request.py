"""The request schema: which fields a request has, and arguments that are one for all requests or one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pinrec_hf.modeling.tokenization_pinrec import HISTORY_COLUMNS, PinRecTokenizer

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
    surfaces = {None, *tokenizer.surfaces}
    read = []
    for request in requests:
        new = {**request, "history": known_history(request["history"], tokenizer)}
        if new.get("surface") not in surfaces:
            new["surface"] = None
        if not tokenizer.request_features:
            new["request_features"] = None
        read.append(new)
    return read


def known_history(history: Mapping[str, Any], tokenizer: PinRecTokenizer) -> dict[str, Any]:
    """The history columns of a row or a request; surfaces and outcomes that the model does not know become unknown."""
    known = {name: history[name] for name in HISTORY_COLUMNS if history.get(name) is not None}
    surfaces, outcomes = {None, *tokenizer.surfaces}, {None, *tokenizer.outcomes}
    if not surfaces.issuperset(known.get("surface", ())):
        known["surface"] = [name if name in surfaces else None for name in known["surface"]]

    def read(names: Any) -> Any:
        if names is None or isinstance(names, str) or outcomes.issuperset(names):
            return names  # a string is no set of outcomes, which the tokenizer says
        return [name if name in outcomes else None for name in names]

    if "outcomes" in known:
        known["outcomes"] = list(map(read, known["outcomes"]))
    return known


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
