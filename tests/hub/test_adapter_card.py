"""An adapter's card names its base as the Hub knows it, and no adapter is pushed whose base is a local folder."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from pinrec_hf.cli import main
from pinrec_hf.hub.card import is_local, write_card
from pinrec_hf.hub.files import list_files


@pytest.fixture
def adapter(tmp_path):
    """The files of an adapter as `training/finetune.py --lora` leaves them."""
    folder = tmp_path / "pinrec-base-search"
    folder.mkdir()
    local = "/home/me/pinrec-base"
    lora = {"peft_type": "LORA", "base_model_name_or_path": local, "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    about = {
        "format": 1,
        "surface": "search",
        "outcome_budget": {"save": 0.7, "click": 0.3},
        "base_model": local,
        "base_revision": None,
        "base_fingerprint": "ab12",
    }
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    (folder / "surface_config.json").write_text(json.dumps(about))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 9, "epoch": 1.0, "log_history": []}))
    save_file({"a": np.zeros((4, 32), np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_the_card_tells_base_surface_and_budget(adapter):
    text = write_card(adapter, repo="org/pinrec-base-search", base="org/pinrec-base").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/pinrec-base", "adapter", "peft")
    assert "for the surface `search`" in text
    assert "save 70%, click 30%" in text
    assert 'load_surface_adapters(base, {"search": "org/pinrec-base-search"})' in text
    assert "LoRA of rank 4, alpha 8, dropout 0.1" in text
    assert "fingerprint `ab12`" in text
    assert "9 steps, 1 epochs" in text
    assert "not measured" in text
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/pinrec-base"
    about = json.loads((adapter / "surface_config.json").read_text())
    assert (about["base_model"], about["surface"], about["format"]) == ("org/pinrec-base", "search", 1)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "surface_config.json"}
    assert list_files(adapter).sizes.keys() == names


def test_a_base_of_this_machine_is_not_named_and_not_pushed(adapter, capsys):
    text = write_card(adapter).read_text()
    assert "/home/me" not in text
    assert ModelCard(text).data.base_model is None
    assert main(["push", "--model", str(adapter), "--repo", "org/x"]) == 2
    assert "--base ORG/NAME" in capsys.readouterr().err


def test_local_folders_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert [is_local(base) for base in ("runs/base", "/a/b", "./b", "~/b", "pinrec-base")] == [True] * 5
    assert not is_local("org/pinrec-base")


def test_an_adapter_without_its_surface_config_is_refused(adapter):
    (adapter / "surface_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no surface_config\.json"):
        write_card(adapter)
