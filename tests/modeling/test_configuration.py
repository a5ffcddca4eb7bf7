"""The config refuses what cannot work, says why, and comes back from a file as it was."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError

from pinrec_hf.modeling.configuration_pinrec import PRESETS, PinRecConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "128"}, "hidden_size.*expected int"),
        ({"surfaces": "homefeed"}, "surfaces"),
        ({"outcomes": ["save", 1]}, "outcomes"),
        ({"pooled_history": "yes"}, "pooled_history"),
        ({"similarity": "euclid"}, r"similarity='euclid' is not one of \('dot', 'cosine'\)"),
        ({"softmax": "half"}, "softmax='half' is not one of"),
        ({"item_id_embedding": "table"}, "item_id_embedding='table' is not one of"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "multiple of twice num_attention_heads=4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_items": -1}, "num_items=-1 must be 0"),
        ({"request_feature_buckets": 5_000}, "request_feature_buckets=5000"),
        ({"dropout": 1.5}, "dropout=1.5 is a share"),
        ({"item_id_dropout": -0.1}, "item_id_dropout=-0.1 is a share"),
        ({"signals": ["surface", "weather"]}, r"signals \['weather'\] do not exist; choose among"),
        ({"surfaces": ["a", "a"]}, "surfaces names something twice"),
        ({"outcomes": [f"o{i}" for i in range(63)]}, "63 outcomes.*room for 62"),
        ({"outcomes": ["save"], "negative_outcomes": ["hide"]}, r"negative_outcomes \['hide'\] are not among"),
        ({"surfaces": ["a"], "outcome_budgets": {"b": {"save": 1.0}}}, "surface 'b', which is not among"),
        ({"surfaces": ["a"], "outcomes": ["save"], "outcome_budgets": {"a": {"sav": 1.0}}}, "'sav' is not among"),
        ({"surfaces": ["a"], "outcome_budgets": {"a": {None: 1.0}}}, "unspecified outcome, which JSON cannot name"),
        ({"surfaces": ["a"], "outcomes": ["save"], "outcome_budgets": {"a": {None: 0.0, "save": 1.0}}}, "JSON cannot"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 and .* must be at least 2"),
        ({"intermediate_size": 1}, "intermediate_size=1 must be at least 2"),
        ({"rope_theta": 0}, "rope_theta=0 must be above 0"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo' is none of"),
        ({"num_items": 5, "item_id_embedding": None}, "an id embedding, content vectors or features"),
    ],
)
def test_bad_fields_are_refused_with_the_reason(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        PinRecConfig(**fields)


def test_a_contradiction_made_later_is_refused_at_saving(tmp_path):
    config = PinRecConfig()
    config.similarity = "euclid"
    with pytest.raises(StrictDataclassError, match="similarity='euclid'"):
        config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="expected int"):
        config.hidden_size = "128"


def test_presets():
    assert PinRecConfig.from_preset("base").num_hidden_layers == 12
    for name, fields in PRESETS.items():
        config = PinRecConfig.from_preset(name)
        assert config.preset == name
        assert {field: getattr(config, field) for field in fields} == fields
    assert PinRecConfig.from_preset("tiny", hidden_size=64, dropout=0).hidden_size == 64
    with pytest.raises(ValueError, match=r"preset 'huge' does not exist; choose one of \['base', 'small', 'tiny'\]"):
        PinRecConfig.from_preset("huge")
    with pytest.raises(ValueError, match=r"no field \['drop_out'\]; its fields are .*'dropout'"):
        PinRecConfig.from_preset("tiny", drop_out=0.1)


def test_derived_fields():
    config = PinRecConfig(hidden_size=32, outcomes=["save", "hide", "click"], negative_outcomes=["hide"])
    assert config.positive_outcomes == ["save", "click"]
    assert (config.embedding_size, config.intermediate_size) == (32 + 1 + 3, 128)
    assert PinRecConfig(hidden_size=32, similarity="cosine").embedding_size == 32
    assert config.signals == ["surface", "outcome", "time", "context"]
    assert PinRecConfig(signals=[]).signals == []


def test_round_trip(tmp_path):
    config = PinRecConfig.from_preset(
        "tiny",
        surfaces=["home feed", "süche"],
        outcomes=["save", "hide"],
        negative_outcomes=["hide"],
        outcome_budgets={"home feed": {"save": 1.0}},
        signals=[],
        num_items=7,
        item_id_embedding="hashed",
        catalogue_fingerprint="ab",
    )
    config.save_pretrained(tmp_path)
    loaded = PinRecConfig.from_pretrained(tmp_path)
    before, after = config.to_dict(), loaded.to_dict()
    del before["architectures"], after["architectures"]
    assert after == before
    assert loaded.signals == []


def test_none_survives_a_round_trip(tmp_path):
    # the default is "full": a config of content only must not come back with ids
    PinRecConfig(item_id_embedding=None, content_size=4, num_items=3).save_pretrained(tmp_path)
    assert PinRecConfig.from_pretrained(tmp_path).item_id_embedding is None


def test_another_models_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 128}))
    with pytest.raises(ValueError, match="config of a 'bert' model, not of a 'pinrec' one"):
        PinRecConfig.from_pretrained(tmp_path)
