"""`PinRecConfig`: what a PinRec model is made of, and the three presets."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

NO_ITEM, UNKNOWN_ITEM, FIRST_ITEM = 0, 1, 2
"""Item ids inside the model: none (padding, or an event without an item), unknown, then catalogue row + 2."""

START_EVENT, ITEM_EVENT, QUERY_EVENT, SUBJECT_EVENT = 0, 1, 2, 3
"""Event types: the start of every sequence, an item acted on, a search query, a subject item."""

HOUR, DAY = 3_600, 86_400
TIME_PERIODS = (HOUR // 4, HOUR // 2, HOUR * 3 // 4, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 16 * HOUR, DAY, 7 * DAY)
"""Seconds. The paper's, up to a week: longer ones tell days of a short log apart, which says nothing of later days."""

Budget = dict[str | None, float]
"""Shares of a request's slots by outcome; `None` is an unspecified one."""

SIGNALS = ("surface", "outcome", "time", "context")

MAX_REQUEST_FEATURES, REQUEST_FEATURE_BITS = 5, 12
"""A request's features are one integer: the 12-bit hash of each, side by side, 0 where there is none."""

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64},
    "small": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024},
}
"""`base` is the paper's size (PinRec, arXiv 2504.10507, section 4); `small` is for a CPU; `tiny` for tests."""


MAX_OUTCOMES = 62
"""An event's set of outcomes is one integer: a bit each, and one for the unknown ones."""


def more_names(field: str, names: Sequence[str] | None, new: Sequence[str]) -> list[str]:
    """Names of surfaces or outcomes after those that are there.

    Raises:
        ValueError: no list of names, one that is there already or given twice, or too many outcomes.
    """
    names = list(names or [])
    if isinstance(new, str) or not all(isinstance(name, str) for name in new):
        raise ValueError(f"{field} to add are a list of names, not {new!r}")
    if len({*names, *new}) < len(names) + len(new):
        raise ValueError(f"{field} {list(new)}: a name is given twice, or is among {names} already")
    if field == "outcomes" and len(names) + len(new) > MAX_OUTCOMES:
        raise ValueError(f"{len(names)} + {len(new)} outcomes: an event's set of outcomes has room for {MAX_OUTCOMES}")
    return [*names, *new]


@strict
class PinRecConfig(PreTrainedConfig):
    r"""Configuration of a [`PinRecModel`].

    Args:
        surfaces (`list[str]`): names of the product surfaces, in the order of their codes (code 0 is "unknown").
        outcomes (`list[str]`): names of all outcomes, in the order of their codes (code 0 is "unspecified").
        negative_outcomes (`list[str]`): the outcomes that are an input but never a target (`hide`).
        outcome_budgets (`dict[str, dict[str, float]]`): the default outcome budget of each surface.
        signals (`list[str]`): what an event and a request tell the model besides the item and its order:
            any of `"surface"`, `"outcome"`, `"time"` and `"context"` (queries and subject items are events).
            None of them is SASRec.
        time_periods (`list[int]`): periods, in seconds, at which absolute time is seen as sin and cos.
        time_offsets (`list[int]`): seconds after a request that an embedding can be asked for, ascending from 0
            (`[0, 30, 60, 180]`); none by default.
        num_items (`int`): rows of the catalogue that the id table covers (later rows share the unknown id).
        content_size, query_size (`int`): width of the items' and queries' content vectors, 0 for none.
        item_id_embedding (`str`, *optional*): `"full"` (one row an item), `"hashed"` (k hash functions into k
            tables of width `hidden_size / k`) or `None` (content only).
        hash_functions, hash_table_size (`int`): k and the rows of each table, for hashed ids and queries.
        feature_buckets (`int`): rows of the embedding bag of item features, 0 for none.
        request_feature_buckets (`int`): rows of the embedding bag of request features (`device=ios`), 0 for none;
            at most 4,095.
        similarity (`str`): `"dot"` (with item biases) or `"cosine"` (with a learned temperature).
        bias_size (`int`, *optional*): biases of an item under a dot product: one whoever asks, and one more for each
            surface and outcome that it was pretrained with; 0 under cosine.
        softmax (`str`): `"sampled"` (logQ-corrected) or `"full"` (small catalogues).
        pooled_history (`bool`): whether the outcome head also attends to the events themselves.
        item_id_dropout (`float`): share of items whose id is replaced by the unknown id in training, so that
            an item is also found by its content (PinFM, 2507.12704).
        outcome_dropout (`float`): share of input events whose outcomes are masked in training (UniPinRec).
        dropout, attention_dropout (`float`): the usual.
        head_dropout (`float`): of the hidden state before the outcome head (KuaiRand gains by .2, ML-1M loses by .1).
        catalogue_fingerprint (`str`, *optional*): of the catalogue that the model was trained on.
        preset (`str`, *optional*): the preset that made it.
        embedding_norm (`float`, *optional*): mean length of the embeddings of validation requests, biases left out,
            when training ended: what those of later days are held against.
    """

    model_type = "pinrec"
    keys_to_ignore_at_inference = ["cache", "last_hidden_state"]

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 256
    rope_theta: float | int = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | int = 0.02
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    head_dropout: float | int = 0.0
    use_cache: bool = False

    surfaces: list[str] | None = None
    outcomes: list[str] | None = None
    negative_outcomes: list[str] | None = None
    outcome_budgets: dict | None = None
    signals: list[str] | None = None
    time_periods: list[int] | None = None
    time_offsets: list[int] | None = None

    num_items: int = 0
    content_size: int = 0
    query_size: int = 0
    item_id_embedding: str | None = "full"
    hash_functions: int = 2
    hash_table_size: int = 65_536
    feature_buckets: int = 0
    request_feature_buckets: int = 0
    similarity: str = "dot"
    bias_size: int | None = None
    softmax: str = "sampled"
    pooled_history: bool = False
    item_id_dropout: float | int = 0.1
    outcome_dropout: float | int = 0.2
    catalogue_fingerprint: str | None = None
    preset: str | None = None
    embedding_norm: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.surfaces = list(self.surfaces or [])
        self.outcomes = list(self.outcomes or [])
        self.negative_outcomes = list(self.negative_outcomes or [])
        self.outcome_budgets = dict(self.outcome_budgets or {})
        self.signals = list(SIGNALS if self.signals is None else self.signals)
        self.time_periods = list(TIME_PERIODS if self.time_periods is None else self.time_periods)
        self.time_offsets = list(self.time_offsets or [])
        if self.bias_size is None:
            named = [names for signal, names in (("surface", self.surfaces), ("outcome", self.outcomes))
                     if signal in self.signals]  # fmt: skip
            self.bias_size = 1 + sum(map(len, named)) if self.similarity == "dot" else 0
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **kwargs: Any) -> "PinRecConfig":
        """A config of the named size; keyword arguments override its fields.

        Raises:
            ValueError: for a preset or a field that does not exist.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} does not exist; choose one of {sorted(PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"PinRecConfig has no field {unknown}; its fields are {sorted(known)}")
        return cls(**{**PRESETS[preset], "preset": preset, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As everywhere in transformers, but another model's config is refused, which they only warn about."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the config of a {found!r} model, not of a {cls.model_type!r} one; check the path"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def positive_outcomes(self) -> list[str]:
        """The outcomes that can be a target, in the order of their codes."""
        return [name for name in self.outcomes or [] if name not in (self.negative_outcomes or [])]

    @property
    def embedding_size(self) -> int:
        """Width of item and user embeddings: a dot product carries the item's biases as more dimensions."""
        return self.hidden_size + (self.bias_size or 0)

    def validate_pinrec(self) -> None:
        """Refuses fields that contradict each other; runs when a config is made, loaded or saved."""
        choices = {
            "similarity": ("dot", "cosine"),
            "softmax": ("sampled", "full"),
            "item_id_embedding": ("full", "hashed", None),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hash_functions", "hash_table_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for field in ("num_items", "content_size", "query_size", "feature_buckets", "request_feature_buckets"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must be 0 (none) or more")
        if self.max_position_embeddings < 2 or cast(int, self.intermediate_size) < 2:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} and intermediate_size="
                f"{self.intermediate_size} must be at least 2"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is none of transformers' activations; 'silu' is the usual"
            )
        if self.bias_size is not None and (self.bias_size > 0) != (self.similarity == "dot"):
            raise ValueError(
                f"bias_size={self.bias_size}: at least 1 under a dot product, 0 under cosine; or leave it out"
            )
        if self.request_feature_buckets > 4_095:
            raise ValueError(f"request_feature_buckets={self.request_feature_buckets}: a request feature has 12 bits")
        for field in ("dropout", "attention_dropout", "head_dropout", "item_id_dropout", "outcome_dropout"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} is a share and must lie between 0 and 1")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of twice num_attention_heads="
                f"{self.num_attention_heads} (rotary positions turn pairs)"
            )
        if self.signals is not None and (unknown := sorted(set(self.signals) - set(SIGNALS))):
            raise ValueError(f"signals {unknown} do not exist; choose among {list(SIGNALS)}")
        if any(period <= 0 for period in self.time_periods or []):
            raise ValueError(f"time_periods={self.time_periods} must be seconds above 0")
        if (offsets := self.time_offsets) and (offsets[0] != 0 or sorted(set(offsets)) != offsets):
            raise ValueError(f"time_offsets={offsets} must be seconds that ascend from 0, such as [0, 30, 60, 180]")
        for field in ("surfaces", "outcomes"):
            names = getattr(self, field) or []
            if len(set(names)) != len(names):
                raise ValueError(f"{field} names something twice: {names}")
        if (count := len(self.outcomes or [])) > MAX_OUTCOMES:
            raise ValueError(f"{count} outcomes: an event's set of outcomes has room for {MAX_OUTCOMES}")
        if stray := sorted(set(self.negative_outcomes or []) - set(self.outcomes or [])):
            raise ValueError(f"negative_outcomes {stray} are not among the outcomes {self.outcomes}")
        for surface, budget in (self.outcome_budgets or {}).items():
            if surface not in (self.surfaces or []):
                raise ValueError(f"outcome_budgets name surface {surface!r}, which is not among {self.surfaces}")
            check_budget(budget, self)
            if None in budget:
                raise ValueError(f"outcome_budgets of {surface!r} have an unspecified outcome, which JSON cannot name")
        if not (self.item_id_embedding or self.content_size or self.feature_buckets) and self.num_items:
            raise ValueError("an item needs an id embedding, content vectors or features to be told from another")


def check_budget(budget: Any, config: PinRecConfig) -> Budget:
    """A budget as given (`{"save": 0.7, "click": 0.3}`), without its zeros and largest share first.

    Shares need not sum to 1, and the order in which they are given changes nothing (JSON keeps none). `None` is an
    unspecified outcome.

    Raises:
        ValueError: no dict; an outcome that the model does not know or that is negative; a share that is negative,
            not finite or no number; nothing above 0.
    """
    if not isinstance(budget, Mapping):
        raise ValueError(f"outcome_budget is {budget!r}; give a dict such as {{'save': 0.7, 'click': 0.3}}")
    positive = config.positive_outcomes
    for outcome, share in budget.items():
        if outcome in (config.negative_outcomes or []):
            raise ValueError(f"outcome {outcome!r} is negative and cannot be asked for; choose among {positive}")
        if outcome is not None and outcome not in positive:
            raise ValueError(f"outcome {outcome!r} is not among this model's outcomes {positive}")
        number = isinstance(share, Real) and not isinstance(share, bool)
        if not number or not 0 <= share <= sys.float_info.max:
            raise ValueError(f"outcome_budget gives {outcome!r} the share {share!r}; give finite numbers >= 0")
    wanted = {outcome: float(share) for outcome, share in budget.items() if share > 0}
    if not wanted:
        raise ValueError(f"outcome_budget {dict(budget)!r} divides nothing; give at least one outcome a share above 0")
    return dict(sorted(wanted.items(), key=lambda pair: (-pair[1], [None, *positive].index(pair[0]))))
