"""What travels over HTTP: the one request schema of this library, events, and answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pinrec_hf.modeling.events_pinrec import LATEST

MAX_BODY = 4 * 1024 * 1024
MAX_EVENTS, MAX_REQUESTS, MAX_K, MAX_STEPS = 10_000, 64, 1_000, 16
"""Of a history and of one POST; requests in one batch; slots and steps of one request."""

Name = Annotated[str, StringConstraints(max_length=1_024)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Id = Name | Whole
Seconds = Annotated[int, Field(ge=0, lt=LATEST, description="seconds since epoch, UTC")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Value = Name | bool | Whole | Finite | None


def _column(of: Any) -> Any:
    return Annotated[list[of] | None, Field(max_length=MAX_EVENTS)]


class Strict(BaseModel):
    """No field that nobody reads, and no text where a number is due."""

    model_config = ConfigDict(extra="forbid", strict=True)


class History(Strict):
    """Columns of equal length, a place an event, oldest first. `outcomes` of an ignored impression are empty."""

    item_id: _column(Id | None) = Field(None, description="null is a query event")  # type: ignore[valid-type]
    surface: _column(Name | None) = None  # type: ignore[valid-type]
    timestamp: _column(Seconds | None) = None  # type: ignore[valid-type]
    outcomes: _column(list[Name] | None) = None  # type: ignore[valid-type]
    query: _column(Name | None) = None  # type: ignore[valid-type]
    context_item_id: _column(Id | None) = None  # type: ignore[valid-type]
    request_id: _column(Whole | None) = Field(None, description="the feed view")  # type: ignore[valid-type]


class RecommendRequest(Strict):
    """A request. Give `history`, or `user_id` alone to have the stored one; with neither the user is new."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "u17", "surface": "homefeed", "k": 10},
                {
                    "history": {
                        "item_id": ["i1", "i2"],
                        "surface": ["homefeed", "search"],
                        "outcomes": [["save"], ["click"]],
                        "timestamp": [1735689600, 1735689660],
                    },
                    "surface": "search",
                    "timestamp": 1735693200,
                    "query": "blue sofa",
                    "outcome_budget": {"save": 0.7, "click": 0.3},
                    "k": 10,
                },
            ]
        }
    )

    user_id: Id | None = None
    history: History | None = None
    surface: Name | None = None
    timestamp: Seconds | None = None
    query: Name | None = None
    query_embedding: Annotated[list[Finite], Field(max_length=4_096)] | None = None
    context_item_id: Id | None = None
    request_features: Annotated[list[Name], Field(max_length=16)] | None = None
    outcome_budget: Annotated[dict[Name, Finite], Field(max_length=64)] | None = Field(
        None, description="shares of the k slots; by default the surface's shares in training"
    )
    num_steps: int = Field(1, ge=1, le=MAX_STEPS)
    k: int = Field(100, ge=1, le=MAX_K, description="items wanted; fewer come only where fewer exist")
    exclude: Annotated[list[Id], Field(max_length=MAX_EVENTS)] | None = None
    filters: (
        Annotated[dict[Name, Value | Annotated[list[Value], Field(max_length=1_000)]], Field(max_length=16)] | None
    ) = Field(None, description="column: value, or list of values")


class BatchRequest(Strict):
    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_REQUESTS)


class Event(Strict):
    """One thing that a user did or was shown: an item, or a query."""

    user_id: Id
    timestamp: Seconds
    item_id: Id | None = None
    surface: Name | None = None
    outcomes: Annotated[list[Name], Field(max_length=64)] = Field([], description="empty: shown and ignored")
    query: Name | None = None
    context_item_id: Id | None = None
    request_id: Whole | None = None


class EventsRequest(Strict):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "user_id": "u17",
                            "item_id": "i3",
                            "surface": "homefeed",
                            "outcomes": ["save"],
                            "timestamp": 1735693100,
                        }
                    ]
                }
            ]
        }
    )

    events: list[Event] = Field(min_length=1, max_length=MAX_EVENTS)


class RecommendedItem(BaseModel):
    item_id: str | int
    score: float = Field(description="inner product; comparable within one outcome")
    outcome: str | None = Field(description="the wanted outcome that brought it, null = unspecified")
    step: int


class Recommendation(BaseModel):
    release: str = Field(description="the release that answered")
    candidates: list[RecommendedItem]


class BatchRecommendation(BaseModel):
    release: str = Field(description="one release answers the whole batch")
    results: list[list[RecommendedItem]] = Field(description="a list a request, in their order")


class Appended(BaseModel):
    appended: int = Field(description="durable new events; one that is stored already is not stored twice")


class Deleted(BaseModel):
    deleted: int


class Status(BaseModel):
    status: str
    release: str | None = None


class Problem(BaseModel):
    error: str
