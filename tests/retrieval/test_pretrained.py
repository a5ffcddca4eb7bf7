"""A saved model loads whole, or is refused with what is wrong and what to do."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from pinrec_hf import PinRecRetriever
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.pretrained import load_pretrained


@pytest.fixture
def folder(saved_model, tmp_path):
    return shutil.copytree(saved_model, tmp_path / "model")


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_loads_what_was_saved(saved_model, model, tokenizer):
    loaded = PinRecRetriever.from_pretrained(saved_model)
    built = PinRecRetriever.build(model, tokenizer)
    requests = [{"history": {"item_id": ["p1"], "outcomes": [["save"]]}, "surface": "homefeed"}]
    assert loaded.rank(requests, 20).tolist() == built.rank(requests, 20).tolist()
    assert loaded.recommend([{}], k=1, columns=["title"])[0][0].title.startswith("Title of")
    assert not loaded.model.training


def test_an_index_may_be_built_again_and_of_another_kind(folder):
    assert build_index(folder, kind="hnsw").kind == "hnsw"
    assert PinRecRetriever.from_pretrained(folder).index.kind == "hnsw"
    with pytest.raises(ValueError, match="unknown index kind"):
        build_index(folder, kind="tree")
    assert PinRecRetriever.from_pretrained(folder).index.kind == "hnsw"


def test_no_index_says_how_to_make_one(folder):
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="pinrec index --model"):
        PinRecRetriever.from_pretrained(folder)


def test_an_index_of_another_encoder_is_refused(folder, make_model):
    model = make_model()
    model.item_encoder.up_proj.weight.data += 0.1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"another encoder.*pinrec index --model"):
        PinRecRetriever.from_pretrained(folder)


def test_finetuning_with_a_frozen_encoder_keeps_the_index(folder, make_model, model):
    other = make_model(outcome_budgets=model.config.outcome_budgets)
    other.outcome_head.down_proj.weight.data += 0.1
    other.save_pretrained(folder)
    assert len(PinRecRetriever.from_pretrained(folder).index) == 60


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "truncated or damaged"),
        ("config.json", "truncated or foreign"),
        ("tokenizer_config.json", "tokenizer .* truncated"),
        ("catalogue.safetensors", "truncated"),
        ("index.faiss", r"truncated.*pinrec index"),
        ("index.safetensors", r"truncated.*pinrec index"),
        ("index.json", r"truncated.*pinrec index"),
        ("items.parquet", "truncated"),
    ],
)
def test_truncated_files_are_named(folder, name, message):
    cut(folder / name)
    with pytest.raises(ValueError, match=message) as error:
        PinRecRetriever.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "catalogue.safetensors"])
def test_missing_files_are_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=r"missing|needs a catalogue|do not belong"):
        PinRecRetriever.from_pretrained(folder)


def test_weights_that_do_not_fit_are_not_filled_with_random_ones(folder):
    weights = load_file(folder / "model.safetensors")
    weights["outcome_head.another"] = weights["outcome_head.down_proj.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no outcome_head\.another"):
        load_pretrained(folder)
    del weights["outcome_head.another"], weights["outcome_head.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*outcome_head\.down_proj\.weight"):
        load_pretrained(folder)


def test_foreign_models_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="type 'bert', not a PinRec model"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["TwoTowerModel"]}))
    with pytest.raises(ValueError, match="a TwoTowerModel, not a PinRecModel"):
        load_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pretrained(tmp_path / "empty")


def test_a_name_that_is_neither_folder_nor_repo(tmp_path):
    for name in ("no such/folder/at all", "nobody-has/this-model", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="neither a folder here nor a repo"):
            PinRecRetriever.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        build_index(tmp_path / "missing")


def test_the_tokenizer_of_another_model_is_refused(folder, tokenizer, tmp_path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["surfaces"] = settings["surfaces"][::-1]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="do not belong together: surfaces"):
        load_pretrained(folder)
